"""Hugging Face folders that say something twice, not at all, or something that is not done here.

Each is a sentence with the file's name and exit code 3, and nothing is written.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_slm import import_hf
from megatron_slm.convert.families.registry import MODEL_TYPES
from megatron_slm.convert.hf_settings import model_config, read_by_transformers
from tests.unit.convert.small_models import small_model, word_tokenizer


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A folder with one small model of each kind that the faults are made in."""
    folder = tmp_path_factory.mktemp("originals")
    for model_type, shard_size in (("llama", "1GB"), ("qwen2", "6KB"), ("mixtral", "1GB")):
        small_model(model_type).save_pretrained(folder / model_type, max_shard_size=shard_size)
        word_tokenizer(folder / model_type)
    return folder


@pytest.fixture
def copied(originals, tmp_path):
    def copy(model_type: str) -> Path:
        return shutil.copytree(originals / model_type, tmp_path / "model")

    return copy


def refused(source: Path, capsys, *options: str) -> str:
    """The sentence with which an import of `source` ends. Nothing may be left of it."""
    output = source.parent / "run"
    arguments = ["--input", str(source), "--output", str(output), *options]
    assert import_hf.main(arguments) == 3
    assert not list(output.rglob("*.*")), "nothing is written before all checks have passed"
    assert not list(output.glob("checkpoints/*"))
    return capsys.readouterr().err


def change_config(source: Path, **changes) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def change_tensors(source: Path, change) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NTK = {"rope_type": "ntk", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_causal": False}, "is_causal False, expected True: attention here is causal"),
        ({"residual_multiplier": 0.2}, "residual_multiplier 0.2: nothing here reads it"),
        ({"sliding_window": 8}, "sliding_window 8: nothing here reads it"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "lacks model.layers.0.mlp.down_proj.bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, expected 1.0"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, "per_layer_config"),
        ({"quantization_config": {"bits": 4}}, "dequantise"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "code of its own"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; expected silu"),
        ({"rope_scaling": YARN}, "both rope_parameters"),
        ({"rope_scaling": NTK, "rope_parameters": "absent"}, "rotary scaling 'ntk'"),
        (
            {"rope_scaling": DYNAMIC, "rope_parameters": "absent"},
            "original_max_position_embeddings 16, and max_position_embeddings is 64",
        ),
        (
            {"rope_scaling": YARN | {"mscale": 2.0}, "rope_parameters": "absent"},
            "has mscale 2.0, which the kind yarn does not read here",
        ),
        (
            {"rope_scaling": YARN | {"truncate": False}, "rope_parameters": "absent"},
            "has truncate False",
        ),
        ({"rope_theta": 5.0}, "rope_theta is given as 5.0 and as 500.0"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0}},
            "of the kind linear lacks factor",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "mrope_section": [2]}},
            "mrope_section",
        ),
        ({"num_attention_heads": 3}, "transformers cannot read it"),
        ({"vocab_size": 40}, "model.embed_tokens.weight has shape (48, 16), its config.json"),
        ({"model_type": "opt"}, "model_type 'opt'; expected one of llama, mistral"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_is_not_followed_is_named(changes, said, copied, capsys):
    source = copied("llama")
    change_config(source, **changes)
    message = refused(source, capsys)
    assert said in message
    assert str(source) in message


def test_several_settings_are_named_at_once(copied, capsys):
    source = copied("llama")
    change_config(source, is_causal=False, use_mrope=True, logit_scale=2.0)
    message = refused(source, capsys)
    for name in ("is_causal", "use_mrope", "logit_scale"):
        assert name in message


@pytest.mark.parametrize(
    ("model_type", "changes", "window", "full"),
    [
        ("mistral", {"sliding_window": 16}, 16, []),
        ("mistral", {}, 4096, []),
        ("mistral", {"sliding_window": None}, 0, []),
        ("ministral", {}, 4096, []),
        ("mixtral", {"sliding_window": 16}, 16, []),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096, []),
        ("qwen2", {"sliding_window": 16, "max_window_layers": 0}, 0, []),
        (
            "qwen3",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            16,
            [0],
        ),
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            16,
            [1],
        ),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True}, 0, []),
        ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": True}, 16, []),
    ],
)
def test_a_window_is_read_layer_by_layer(model_type, changes, window, full):
    config = small_model(model_type).config.to_dict()
    del config["sliding_window"]
    config.pop("layer_types", None)
    ours, sequence_length = model_config(config | changes)
    assert (ours.attention_window_tokens, ours.full_attention_layers) == (window, full)
    assert sequence_length == 64


def test_kinds_of_layers_that_contradict_the_window_are_refused():
    config = small_model("qwen3").config.to_dict()
    mixed = {"layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ValueError, match="sliding_window is not set, or not used"):
        model_config(config | mixed)
    with pytest.raises(ValueError, match="in a mistral every layer is of full_attention"):
        model_config(small_model("mistral").config.to_dict() | mixed)
    chunked = {"layer_types": ["full_attention", "chunked_attention"]}
    with pytest.raises(ValueError, match="layer_types chunked_attention"):
        model_config(config | chunked)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_absent_key_has_the_default_of_its_family(model_type):
    """Read from transformers' own class, which differs between families."""
    config = {"model_type": model_type}
    theirs = read_by_transformers(config)
    ours, sequence_length = model_config(config)
    assert sequence_length == theirs.max_position_embeddings
    if ours.position_embedding == "rope":
        rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
        assert ours.rope_base == rope["rope_theta"]
        assert ours.rope_fraction == rope.get("partial_rotary_factor", 1.0)
    epsilon = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}
    assert ours.norm_epsilon == getattr(theirs, epsilon.get(model_type, "rms_norm_eps"))
    assert ours.layers == theirs.num_hidden_layers
    assert ours.vocabulary_size == theirs.vocab_size
    if model_type == "mixtral":
        assert (ours.rope_base, ours.norm_epsilon) == (1e6, 1e-5)


def test_what_transformers_writes_can_be_read():
    """Also under the names that version 5 gives: num_local_experts of a Qwen3-MoE."""
    for model_type in MODEL_TYPES:
        config = small_model(model_type).config.to_dict()
        ours, _ = model_config(json.loads(json.dumps(config, default=str)))
        assert ours.experts == (4 if "moe" in model_type or model_type == "mixtral" else 0)


def test_swish_is_another_name_of_silu(copied, tmp_path):
    source = copied("llama")
    change_config(source, hidden_act="swish")
    assert import_hf.main(["--input", str(source), "--output", str(tmp_path / "run")]) == 0


def test_a_mixture_that_cannot_be_trained_here_is_refused(copied, capsys):
    source = copied("mixtral")
    change_config(source, num_experts_per_tok=1)
    assert "num_experts_per_tok 1 with weights that sum to 1: the one expert's weight" in refused(
        source, capsys
    )


def test_one_file_beside_shards_is_refused(copied, capsys):
    source = copied("qwen2")
    save_file({"a": torch.ones(2)}, source / "model.safetensors")
    assert "which of them is meant is not known" in refused(source, capsys)


def test_a_tensor_in_two_shards_is_refused(copied, capsys):
    source = copied("qwen2")
    first, second = sorted(source.glob("model-*.safetensors"))[:2]
    save_file(load_file(second) | {k: v + 1 for k, v in load_file(first).items()}, second)
    message = refused(source, capsys)
    assert f"is in {first.name} and in {second.name}" in message


def test_an_index_that_is_not_true_is_refused(copied, capsys):
    source = copied("qwen2")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.more.weight"] = sorted(set(index["weight_map"].values()))[0]
    path.write_text(json.dumps(index))
    assert "model.more.weight" in refused(source, capsys)
    path.write_text("{}")
    assert f"{path}: no index of safetensors files" in refused(source, capsys)


def _cut_embedding(tensors) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:40].clone()


def _uneven_gate(tensors) -> None:
    gate = "model.layers.0.mlp.gate_proj.weight"
    up = "model.layers.0.mlp.up_proj.weight"
    both = torch.cat([tensors[gate], tensors[up]])
    tensors[gate] = both[:23].clone()
    tensors[up] = both[23:].clone()


def _heads_moved(tensors) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def _integers(tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def _eight_bits(tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_cut_embedding, "model.embed_tokens.weight has shape (40, 16), its config.json says (48"),
        (_uneven_gate, "gate_proj.weight has shape (23, 16), its config.json says (24, 16)"),
        (_heads_moved, "k_proj.weight has shape (16, 16), its config.json says (8, 16)"),
        (_integers, "model.norm.weight is stored as I8"),
        (_eight_bits, "model.norm.weight is stored as F8_E4M3"),
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
)
def test_a_tensor_of_another_shape_is_named_before_anything_is_written(
    change, said, copied, capsys
):
    source = copied("llama")
    change_tensors(source, change)
    assert said in refused(source, capsys)


def test_a_head_that_differs_from_tied_embeddings_is_refused(copied, capsys, tmp_path):
    source = copied("llama")
    change_config(source, tie_word_embeddings=True)
    assert "tie_word_embeddings is true, but lm_head.weight is stored and differs" in refused(
        source, capsys
    )
    change_tensors(
        source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert import_hf.main(["--input", str(source), "--output", str(tmp_path / "tied")]) == 0


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not readable as safetensors"),
        (lambda path: path.write_bytes(b""), "it has 0 bytes"),
        (lambda path: path.write_bytes(LFS_POINTER), "pointer of Git LFS"),
        (lambda path: path.unlink(), "not found"),
    ],
    ids=("truncated", "empty", "pointer", "missing"),
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_damaged_file_is_named(model_type, damage, said, copied, capsys):
    source = copied(model_type)
    path = sorted(source.glob("*.safetensors"))[-1]
    damage(path)
    message = refused(source, capsys)
    assert said in message
    assert path.name in message


def test_other_kinds_of_folders_get_a_hint(copied, capsys, tmp_path):
    source = copied("llama")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "save_pretrained writes safetensors" in refused(source, capsys)
    (source / "config.json").unlink()
    (source / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refused(source, capsys)
    assert "no such folder" in refused(tmp_path / "nowhere", capsys)
    (source / "config.json").write_text("[")
    assert f"{source / 'config.json'}: not readable" in refused(source, capsys)


def test_a_write_that_fails_leaves_nothing(copied, capsys, tmp_path, monkeypatch):
    from megatron_slm.convert import huggingface

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "write_full_state", full_disk)
    arguments = ["--input", str(copied("llama")), "--output", str(tmp_path / "run")]
    assert import_hf.main(arguments) == 3
    assert capsys.readouterr().err == "import_hf: no space left on device\n"
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
