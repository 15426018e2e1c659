"""What lies beside a model's tokenizer goes through an import and an export: templates, settings of
generation, end tokens, special tokens.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_slm import export_hf, import_hf
from megatron_slm.convert.beside_tokenizer import read_beside
from megatron_slm.convert.safetensors_folder import SafetensorsFolder
from megatron_slm.tokenization import load_tokenizer
from tests.unit.convert.small_models import small_model, word_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def chat_model(folder: Path) -> Path:
    """A model as chat models are published: generation ends at either of two ids."""
    small_model("llama", eos_token_id=[1, 5]).save_pretrained(folder)
    word_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    generation = {"eos_token_id": [5, 1], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "x": "y"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "extra": 1}))
    return folder


@pytest.fixture
def imported(tmp_path) -> Path:
    source = chat_model(tmp_path / "chat")
    assert import_hf.main(["--input", str(source), "--output", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def exported(run: Path, output: Path, *options: str) -> int:
    return export_hf.main(["--checkpoint", str(run), "--output", str(output), *options])


def test_a_chat_model_is_still_one_after_an_export(imported, tmp_path, capsys):
    output = tmp_path / "out"
    assert exported(imported, output) == 0
    said = capsys.readouterr().out
    assert "the chat template, the settings of generation, the end tokens 5, 1" in said
    from transformers import AutoTokenizer, GenerationConfig

    generation = GenerationConfig.from_pretrained(output)
    assert generation.eos_token_id == [1, 5]
    assert (generation.temperature, generation.top_p) == (0.6, 0.9)
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == [1, 5]
    tokenizer = AutoTokenizer.from_pretrained(output)
    told = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert told == "a"
    assert (output / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    settings = json.loads((output / "tokenizer_config.json").read_text())
    assert (settings["x"], settings["extra"]) == ("y", 1)


def test_an_export_knows_when_what_it_took_over_has_changed(imported, tmp_path, capsys):
    output = tmp_path / "out"
    assert exported(imported, output) == 0
    assert exported(imported, output) == 0
    assert "done before" in capsys.readouterr().out
    (tmp_path / "chat" / "chat_template.jinja").write_text("another")
    assert exported(imported, output) == 3
    assert "files: it has" in capsys.readouterr().err
    assert exported(imported, output, "--overwrite") == 0
    assert (output / "chat_template.jinja").read_text() == "another"


def test_only_an_export_of_ours_is_overwritten(imported, tmp_path, capsys):
    """Not a download that has a config.json as well."""
    original = chat_model(tmp_path / "download")
    before = {path.name: path.read_bytes() for path in original.glob("*.*")}
    assert exported(imported, original, "--overwrite") == 2
    assert "is no folder that export_hf wrote" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in original.glob("*.*")} == before


def test_an_export_that_fails_leaves_the_earlier_one(imported, tmp_path, capsys, monkeypatch):
    from megatron_slm.convert import huggingface

    output = tmp_path / "out"
    assert exported(imported, output) == 0
    before = {path.name: path.read_bytes() for path in output.glob("*.*")}

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "write_safetensors", full_disk)
    assert exported(imported, output, "--overwrite", "--dtype", "bf16") == 3
    assert "export_hf: no space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.glob("*.*")} == before
    assert not list(tmp_path.glob(".writing*"))


def test_weights_in_fp16_are_the_nearest_and_never_infinite(imported, tmp_path, capsys):
    assert exported(imported, tmp_path / "half", "--dtype", "fp16") == 0
    half, source = SafetensorsFolder(tmp_path / "half"), SafetensorsFolder(tmp_path / "chat")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    for name in source:
        assert torch.equal(half[name], source[name].half()), name
    model = small_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = 7e4
    model.save_pretrained(tmp_path / "large")
    word_tokenizer(tmp_path / "large")
    run = tmp_path / "large_run"
    assert import_hf.main(["--input", str(tmp_path / "large"), "--output", str(run)]) == 0
    assert exported(run, tmp_path / "too_large", "--dtype", "fp16") == 3
    message = capsys.readouterr().err
    assert "model.norm.weight has values up to 70000" in message
    assert not list(tmp_path.glob("*too_large*"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("generation_config.json", {"eos_token_id": [99]}, "eos_token_id 99 is no id"),
        ("added_tokens.json", {"<|turn|>": 40}, "'<|turn|>' (40)"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "q"}}}, "'q' (7)"),
        ("generation_config.json", [], "expected a JSON object, got list"),
    ],
)
def test_what_contradicts_the_tokenizer_is_refused_on_import(name, content, said, tmp_path, capsys):
    source = chat_model(tmp_path / "chat")
    (source / name).write_text(json.dumps(content))
    assert import_hf.main(["--input", str(source), "--output", str(tmp_path / "run")]) == 3
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_added_tokens_that_the_tokenizer_has_are_no_fault(tmp_path):
    source = chat_model(tmp_path / "chat")
    (source / "added_tokens.json").write_text(json.dumps({"</s>": 1}))
    assert import_hf.main(["--input", str(source), "--output", str(tmp_path / "run")]) == 0


def test_a_folder_with_a_tokenizer_alone_gives_nothing(tmp_path):
    word_tokenizer(tmp_path)
    beside = read_beside(load_tokenizer(tmp_path))
    assert beside.fingerprint is None
    assert beside.said() == []
