"""Whole folders: checkpoints of real megatron-core layouts out to Hugging Face and its models in,
compared by logits.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_slm import export_hf, import_hf
from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    damaged_files,
    read_checkpoint_info,
    resolve_checkpoint,
)
from megatron_slm.config.architecture import architecture_differences
from megatron_slm.config.schema import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_slm.convert.huggingface import export
from megatron_slm.convert.safetensors_folder import SafetensorsFolder, write_safetensors
from megatron_slm.convert.stored_state import FullState, read_full_state
from megatron_slm.testing.spawn import run_on_cpu
from megatron_slm.tokenization import load_tokenizer
from tests.unit.convert.families import PEERS, SIZES, VARIANTS
from tests.unit.convert.small_models import word_tokenizer

TOKENS_BS = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(5))


def settings(variant: str, groups) -> Config:
    parallel = ParallelConfig(tensor=groups.tp_size, pipeline=groups.pp_size)
    return Config(
        model=ModelConfig(**(SIZES | VARIANTS[variant])),
        data=DataConfig(sequence_length=24),
        parallel=parallel,
    )


def describe(config: Config) -> CheckpointInfo:
    return CheckpointInfo(
        model=asdict(config.model), sequence_length=24, tokenizer={}, step=7, tokens_processed=700
    )


def logits_BSV(model, groups) -> torch.Tensor:
    """Whole logits on every rank; pipeline size 1."""
    positions_BS = torch.arange(24).expand(2, 24)
    with torch.no_grad():
        part = model.eval()(TOKENS_BS, positions_BS, None)
    parts = [torch.empty_like(part) for _ in range(groups.tp_size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=groups.tp)
    return torch.cat(parts, dim=-1)[..., :101].float()


def save_and_run(groups, folder: str) -> dict[str, torch.Tensor]:
    """Save one checkpoint per variant, with every parameter drawn at random; return its logits and
    those of the imported models.
    """
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.checkpoint.weights import load_weights
    from megatron_slm.model.build import build_model

    results = {}
    for variant in VARIANTS:
        config = settings(variant, groups)
        models = build_model(config, 101, groups)
        torch.manual_seed(11)
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        CheckpointStore(Path(folder, variant), groups).save(
            models, None, describe(config), trainer_state(None, groups)
        )
        results[variant] = logits_BSV(models[0], groups)
    for name in PEERS:
        config.model = read_checkpoint_info(f"{folder}/imported_{name}").reference_model()
        models = build_model(config, 101, groups)
        load_weights(models, f"{folder}/imported_{name}", groups)
        results[f"imported {name}"] = logits_BSV(models[0], groups)
    return results


def save_again(groups, source: str, target: str, variant: str) -> None:
    """Load a checkpoint into this layout and save it from there."""
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.checkpoint.weights import load_weights
    from megatron_slm.model.build import build_model

    config = settings(variant, groups)
    config.parallel.expert = groups.ep_size
    models = build_model(config, 101, groups)
    info = load_weights(models, source, groups)
    CheckpointStore(target, groups).save(models, None, info, trainer_state(None, groups))


def huggingface_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(TOKENS_BS).logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of runs saved by two tensor-parallel processes and of the models they imported,
    logits of all of them).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(13)
    for name, peer_settings in PEERS.items():
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **peer_settings))
        with torch.no_grad():
            for parameter in peer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        peer.save_pretrained(folder / f"peer_{name}", max_shard_size="40KB")
        word_tokenizer(folder / f"peer_{name}")
        assert (
            import_hf.main(
                [
                    "--input",
                    str(folder / f"peer_{name}"),
                    "--output",
                    str(folder / f"imported_{name}"),
                ]
            )
            == 0
        )
    return folder, run_on_cpu(save_and_run, str(folder), tp=2)[0]


def small_sentencepiece_model() -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h ab ba abc"] * 20),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_logits_are_those_of_our_model(runs, tmp_path, variant, capsys):
    folder, logits = runs
    output = tmp_path / "export"
    assert (
        export_hf.main(
            ["--checkpoint", str(folder / variant), "--output", str(output), "--tokenizer", "none"]
        )
        == 0
    )
    assert json.loads((output / "config.json").read_text())["architectures"] == [
        variant.split(",")[0]
    ]
    ours, theirs = logits[variant], huggingface_logits(output)
    assert ours.abs().max() > 0.5
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-4), (ours - theirs).abs().max()


@pytest.mark.parametrize("name", PEERS)
def test_imported_logits_are_those_of_the_hugging_face_model(runs, name):
    folder, logits = runs
    theirs = huggingface_logits(folder / f"peer_{name}")
    assert theirs.abs().max() > 0.5
    ours = logits[f"imported {name}"]
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-4), (ours - theirs).abs().max()
    checkpoint = resolve_checkpoint(folder / f"imported_{name}")
    info = read_checkpoint_info(checkpoint)
    assert not damaged_files(checkpoint)
    assert (
        info.sequence_length,
        info.tokenizer["vocabulary_size"],
        info.model["vocabulary_size"],
    ) == (64, 28, 101)


@pytest.mark.parametrize(
    "variant, layout", [("LlamaForCausalLM", dict(pp=2)), ("MixtralForCausalLM", dict(dp=2, ep=2))]
)
def test_the_layout_of_the_checkpoint_does_not_matter(runs, tmp_path, variant, layout):
    """Saved from 2 tensor ranks, loaded and saved again by 2 pipeline or expert ranks: the same
    whole tensors.
    """
    folder, _ = runs
    source, target = folder / variant, tmp_path / "again"
    run_on_cpu(save_again, str(source), str(target), variant, **layout)
    before, after = (
        read_full_state(resolve_checkpoint(source)),
        read_full_state(resolve_checkpoint(target)),
    )
    assert set(before) == set(after)
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_own_export_comes_back_as_the_same_model(runs, tmp_path, variant, capsys):
    """With the tokenizer of its corpora, although the export holds another form of it."""
    folder, _ = runs
    vocabulary = tmp_path / "t.model"
    vocabulary.write_bytes(small_sentencepiece_model())
    export_it = ["--checkpoint", str(folder / variant), "--output", str(tmp_path / "export")]
    assert export_hf.main([*export_it, "--tokenizer", str(vocabulary)]) == 0
    assert "does not say whether documents begin" in capsys.readouterr().err
    import_it = ["--input", str(tmp_path / "export"), "--output", str(tmp_path / "back")]
    assert import_hf.main(import_it) == 0
    before, after = read_checkpoint_info(folder / variant), read_checkpoint_info(tmp_path / "back")
    assert not architecture_differences(before.model_config(), after.model_config())
    assert after.sequence_length == before.sequence_length
    assert after.tokenizer["fingerprint"] == load_tokenizer(vocabulary).fingerprint
    states = [
        read_full_state(resolve_checkpoint(run)) for run in (folder / variant, tmp_path / "back")
    ]
    for name, tensor in states[0].items():
        assert torch.equal(tensor[:101], states[1][name][:101]), name


def test_an_import_says_how_its_corpora_are_begun(runs, tmp_path, capsys):
    from tokenizers import Tokenizer, processors

    source = tmp_path / "peer"
    shutil.copytree(runs[0] / "peer_qwen2", source)
    fast = Tokenizer.from_file(str(source / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    fast.save(str(source / "tokenizer.json"))
    assert import_hf.main(["--input", str(source), "--output", str(tmp_path / "imported")]) == 0
    assert "make the corpora with --prepend-bos" in capsys.readouterr().out


def test_a_second_import_does_nothing_and_another_one_is_refused(runs, capsys):
    folder, _ = runs
    source, imported = folder / "peer_qwen2", folder / "imported_qwen2"
    arguments = ["--input", str(source), "--output", str(imported)]
    before = resolve_checkpoint(imported).stat().st_mtime_ns
    assert import_hf.main(arguments) == 0
    assert "done before" in capsys.readouterr().out
    assert resolve_checkpoint(imported).stat().st_mtime_ns == before
    assert import_hf.main([*arguments, "--dtype", "bf16"]) == 2
    assert "dtype: it has 'fp32', this command has 'bf16'" in capsys.readouterr().err


def test_export_is_written_whole_or_not_at_all(runs, tmp_path, capsys):
    folder, _ = runs
    run, output = str(folder / "Qwen3ForCausalLM"), tmp_path / "export"
    arguments = ["--checkpoint", run, "--output", str(output), "--tokenizer", "none"]
    assert export_hf.main(arguments) == 0
    stamp = (output / "config.json").stat().st_mtime_ns
    with open(output / "README.md", "a") as card:
        card.write("The licence is Apache 2.0.\n")  # completed by the user
    assert export_hf.main(arguments) == 0
    assert "done before, from step" in capsys.readouterr().out
    assert (output / "config.json").stat().st_mtime_ns == stamp
    assert export_hf.main([*arguments, "--dtype", "bf16"]) == 2
    assert "dtype: it has 'fp32', this command has 'bf16'" in capsys.readouterr().err
    (output / "model.safetensors").write_bytes(b"cut")
    assert export_hf.main(arguments) == 3
    assert "has changed since it was exported" in capsys.readouterr().err
    assert export_hf.main([*arguments, "--overwrite", "--dtype", "bf16"]) == 0
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert SafetensorsFolder(output)["model.norm.weight"].dtype == torch.bfloat16

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("only copy")
    assert (
        export_hf.main(
            ["--checkpoint", run, "--output", str(precious), "--tokenizer", "none", "--overwrite"]
        )
        == 2
    )
    assert (precious / "thesis.txt").read_text() == "only copy"

    state = FullState(resolve_checkpoint(run))
    broken = {name: state[name] for name in state if name != "output_layer.weight"}
    with pytest.raises(ValueError, match="lacks output_layer.weight"):
        export(broken, read_checkpoint_info(run), None, output, overwrite=True)
    assert SafetensorsFolder(output)["model.norm.weight"].dtype == torch.bfloat16


def test_large_models_are_sharded_with_an_index(tmp_path):
    tensors = {f"model.layers.{i}.weight": torch.full((8, 8), float(i)) for i in range(5)}
    write_safetensors(tensors.items(), tmp_path, largest_shard_bytes=600)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 256
    back = SafetensorsFolder(tmp_path)
    assert set(back) == set(tensors) == set(index["weight_map"])
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_damaged_or_unfinished_checkpoint_is_a_sentence(runs, tmp_path, capsys):
    source = resolve_checkpoint(runs[0] / "LlamaForCausalLM")
    copy = tmp_path / "checkpoints" / source.name
    shutil.copytree(source, copy)
    largest = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert (
        export_hf.main(
            [
                "--checkpoint",
                str(tmp_path),
                "--output",
                str(tmp_path / "out"),
                "--tokenizer",
                "none",
            ]
        )
        == 3
    )
    assert largest.name in capsys.readouterr().err
    (copy / ".metadata").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint: .metadata not found"):
        read_full_state(copy)
    assert not (tmp_path / "out").exists()
