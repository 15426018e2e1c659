"""The program `plan`: what it prints, what it reads, what it refuses and what it offers instead."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm import plan as program

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "launch" / "recipes"


def run(*words: str) -> int:
    return program.main(["--config", str(RECIPES / "tinyllama_1.1b_math_slm.yaml"), *words])


def test_a_plan_that_fits(capsys):
    assert run("--gpu", "h100", "--nodes", "4", "--proposals", "2") == 0
    printed = capsys.readouterr().out
    for words in (
        "1,100,048,384",
        "32 H100",
        "gradients, fp32",
        "FLOPs per token",
        "reduce-scatter of gradients",
        "GPU-hours",
        "score store",
        "It fits",
    ):
        assert words in printed


def test_a_plan_that_does_not_fit_says_what_does(capsys):
    assert run("--gpu", "A100 40GB", "--nodes", "4", "--data.micro_batch_size", "16") == 1
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "--data.micro_batch_size 8" in printed


def test_json_holds_everything(capsys):
    assert run("--nodes", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 1_100_048_384
    assert found["fits"]
    assert found["job"]["layout"]["data"] == 32
    assert found["memory"][0]["total"] == sum(
        value for part, value in found["memory"][0].items() if part != "total"
    )
    assert found["duration"]["tokens_per_second"] > 0
    assert found["proposals"][0]["overrides"]
    assert found["scoring"]["store_bytes"] == 2 * 1_048_576 * 14306


def test_the_shape_of_an_online_reference_is_read_from_its_checkpoint(tmp_path, capsys):
    step = tmp_path / "reference" / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    model = {
        "layers": 2,
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "attention_heads": 4,
        "vocabulary_size": 32000,
    }
    description = {
        "model": model,
        "sequence_length": 2048,
        "tokenizer": {},
        "step": 1,
        "tokens_processed": 1,
    }
    (step / "model.json").write_text(json.dumps(description))
    (step / "checksums.json").write_text("{}")
    reference = str(tmp_path / "reference")
    online = ["--selection.reference.scores", "[]", "--selection.reference.checkpoint", reference]
    assert run("--nodes", "4", "--json", "--proposals", "0", *online) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"][0]["reference"] == 2 * (
        2 * 32000 * 256 + 2 * (4 * 256 * 256 + 3 * 512 * 256 + 2 * 256) + 256
    )


def test_the_corpus_and_another_reference_are_read_from_this_machine(tmp_path, capsys):
    """The corpus's tokens come from its manifest, the reference's shape from its own recipe."""
    manifest = {
        "format_version": 1,
        "documents": 1,
        "tokens": 5_000_000,
        "token_dtype": "uint16",
        "bin_bytes": 0,
        "idx_bytes": 0,
        "bin_sha256": "",
        "idx_sha256": "",
        "tokenizer": dict.fromkeys(("eod_id", "fingerprint", "kind", "path", "vocabulary_size"), 0),
        "append_eod": True,
        "sources": [],
        "created_by": {},
        "rejected": {},
    }
    (tmp_path / "corpus.manifest.json").write_text(json.dumps(manifest))
    recipe = str(RECIPES / "quickstart.yaml")
    options = ["--data.train", f"[{tmp_path / 'corpus'}]", "--reference-config", recipe]
    assert run("--nodes", "4", "--json", "--proposals", "0", *options) == 0
    scoring = json.loads(capsys.readouterr().out)["scoring"]
    assert scoring["tokens"] == 5_000_000
    assert scoring["store_bytes"] == 10_000_000
    assert scoring["flops_per_token"] < 4 * 128 * 32000


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--gpu", "TPU"], "--gpu: got 'TPU'; expected one of B200"),
        (["--nodes", "3"], "data.global_batch_size: got 512"),
        (["--nodes", "0"], "--nodes"),
        (["--efficiency", "50"], "--efficiency"),
        (["--parallel.tensr", "2"], "did you mean parallel.tensor"),
        (["--model.vocabulary_size", "0"], "give the size"),
    ],
)
def test_what_cannot_be_planned(words, expected, capsys):
    assert run(*words) == 2
    assert expected in capsys.readouterr().err


def test_gpus_that_the_batch_cannot_use_are_answered_with_what_can(capsys):
    """512 sequences over 3 nodes of 8: no layout.

    The nearest batches and numbers of nodes are named, and each works.
    """
    assert run("--nodes", "3") == 2
    said = capsys.readouterr().err
    assert "data.global_batch_size: got 512" in said
    offers = [line.split(": ", 1)[1].split() for line in said.splitlines() if "predicted" in line]
    changes = {tuple(offer[:2]) for offer in offers}
    assert changes == {
        ("--data.global_batch_size", "504"),
        ("--data.global_batch_size", "528"),
        ("--nodes", "2"),
        ("--nodes", "4"),
    }
    for offer in offers:
        assert (
            run("--proposals", "0", *([] if "--nodes" in offer else ["--nodes", "3"]), *offer) == 0
        )


def test_a_layout_that_the_gpus_cannot_hold_is_answered_with_one_they_can(capsys):
    assert run("--nodes", "4", "--parallel.tensor", "3", "--parallel.sequence", "true") == 2
    said = capsys.readouterr().err
    (offer,) = [line.split(": ", 1)[1] for line in said.splitlines() if "predicted" in line]
    assert run("--nodes", "4", "--proposals", "0", *offer.split()) == 0


def test_a_configuration_that_no_layout_mends_gets_no_offers(capsys):
    assert run("--nodes", "4", "--selection.keep_fraction", "2.0") == 2
    assert "predicted" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["100e9", "100B", "100_000_000_000", "100000000000"])
def test_numbers_of_tokens_are_taken_as_people_write_them(text, capsys):
    assert run("--nodes", "4", "--json", "--proposals", "0", "--corpus-tokens", text) == 0
    assert json.loads(capsys.readouterr().out)["scoring"]["tokens"] == 100_000_000_000


def test_epochs_are_shown_and_many_are_warned_of(capsys):
    options = ("--nodes", "4", "--proposals", "0")
    assert run(*options, "--corpus-tokens", "14B") == 0
    printed = capsys.readouterr().out
    assert "14 B tokens: 1.07 epochs" in printed
    assert "WARNING" not in printed
    assert run(*options, "--corpus-tokens", "1.2M") == 0
    printed = capsys.readouterr().out
    assert "WARNING: the run passes 12,501 times over its data" in printed
    assert run(*options) == 0
    assert "size not known" in capsys.readouterr().out


def test_rows_that_do_not_pay_are_named(capsys):
    options = ("--nodes", "4", "--proposals", "0", "--device.layers", "torch")
    assert run(*options, "--selection.backward_rows", "every_layer_approximate") == 0
    printed = capsys.readouterr().out
    assert "backward_rows every_layer_approximate: does not pay at hidden size 2048" in printed


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(
        word in printed
        for word in (
            "--gpu",
            "--nodes",
            "--efficiency",
            "examples:",
            "exit codes:",
            "Nothing is started",
        )
    )


def test_planning_loads_no_torch():
    code = (
        "import sys; from megatron_slm import plan; code = plan.main(['--config', "
        f"{str(RECIPES / 'tinyllama_1.1b_math_slm.yaml')!r}, '--nodes', '4']); assert code == 0 "
        "and not [name for name in ('torch', 'megatron', 'transformers') if name in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
