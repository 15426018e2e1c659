"""The whole chain on a little real text, through the programs a user runs: every stage reads what the one before wrote."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.manifest import check_corpus

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "argparse.py",
    "ast.py",
    "cgi.py",
    "cmd.py",
    "configparser.py",
    "csv.py",
    "datetime.py",
    "difflib.py",
    "dis.py",
    "enum.py",
    "functools.py",
    "glob.py",
)


def program(*arguments, processes: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """Run a program of the project as a user would, with `processes` > 0 under torchrun."""
    start = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
        ]
        if processes
        else [sys.executable, "-m"]
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*start, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, (
        f"{arguments[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Text, tokenizer, corpora, reference, scores and a selectively trained model in one folder."""
    folder = tmp_path_factory.mktemp("chain")
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text() for name in MODULES if (library / name).exists()]
    for name, part in (("corpus", texts[:-2]), ("held_out", texts[-2:])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in part)
        )
    program(
        "tokenizer.train",
        "--input",
        folder / "corpus.jsonl",
        "--output-prefix",
        folder / "tok",
        "--vocab-size",
        600,
    )
    for name in ("corpus", "held_out"):
        program(
            "data_tools.preprocess",
            "--input",
            folder / f"{name}.jsonl",
            "--tokenizer",
            folder / "tok.model",
            "--output-prefix",
            folder / name,
            "--workers",
            2,
        )
    common = [
        "--model.layers",
        2,
        "--model.hidden_size",
        32,
        "--model.ffn_hidden_size",
        64,
        "--model.query_groups",
        2,
        "--data.tokenizer",
        folder / "tok.model",
        "--data.train",
        f"[{folder}/corpus]",
        "--data.validation",
        f"[{{name: target, corpus: {folder}/held_out}}]",
        "--data.sequence_length",
        64,
        "--monitoring.validation_batches",
        2,
        "--monitoring.log_interval_steps",
        2,
    ]
    program(
        "megatron_slm.train",
        *common,
        "--run.folder",
        folder / "reference",
        "--schedule.train_steps",
        4,
        "--parallel.tensor",
        2,
        processes=2,
    )
    program(
        "megatron_slm.score",
        "--checkpoint",
        folder / "reference",
        "--corpus",
        folder / "corpus",
        "--output",
        folder / "scores",
        "--window-tokens",
        64,
        processes=2,
    )
    program(
        "megatron_slm.train",
        *common,
        "--run.folder",
        folder / "slm",
        "--schedule.train_steps",
        6,
        "--selection.scorer",
        "excess_loss",
        "--selection.reference.scores",
        f"[{folder}/scores]",
        "--parallel.pipeline",
        2,
        processes=2,
    )
    return folder


@pytest.fixture(scope="module")
def reference_hf(chain) -> Path:
    """The reference as a Hugging Face folder."""
    run, output = chain / "reference", chain / "reference_hf"
    program("megatron_slm.export_hf", "--checkpoint", run, "--output", output)
    return output


def records(run: Path, kind: str) -> list[dict]:
    return [
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == kind
    ]


def test_selective_training_logs_what_it_did(chain):
    last = records(chain / "slm", "train")[-1]
    assert last["step"] == 6
    assert last["tokens/processed"] == 6 * 8 * 64
    assert last["selection/kept_fraction"] == pytest.approx(0.6, abs=0.01)
    assert last["tokens/selected"] == pytest.approx(0.6 * last["tokens/processed"], rel=0.02)
    assert (
        last["loss/selected"] - last["loss/reference_selected"]
        > last["loss/all"] - last["loss/reference"]
    ), "selected tokens have the larger excess"
    assert len(last["selection/rate_by_reference_loss"]) == 20
    assert [record["step"] for record in records(chain / "slm", "validation")] == [0, 6]


def test_run_folder_stands_alone(chain):
    run = chain / "slm"
    for name in (
        "config.yaml",
        "versions.txt",
        "metrics.jsonl",
        "token_view.jsonl",
        "checkpoints/step_00000006/model.json",
        "checkpoints/latest",
    ):
        assert (run / name).exists(), name
    assert list(run.glob("wandb/offline-run-*")), "a W&B run, offline because there is no key"
    assert "torch 2.13.0" in (run / "versions.txt").read_text()


def test_scores_are_the_references_own_losses(chain, reference_hf):
    """Every stored score of the first window (tokens 1 to 63), against plain torch on the exported reference."""
    import torch
    from transformers import AutoModelForCausalLM

    manifest = check_corpus(chain / "corpus")
    tokens = torch.from_numpy(
        np.fromfile(chain / "corpus.bin", manifest.token_dtype)[:64].astype(np.int64)
    )
    stored = np.fromfile(chain / "scores" / "loss.bin", np.float16)
    assert len(stored) == manifest.tokens
    assert np.isnan(stored[0])
    logits = AutoModelForCausalLM.from_pretrained(reference_hf, dtype=torch.float32)(
        tokens[None, :-1]
    ).logits[0]
    expected = (
        torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").detach().numpy()
    )
    np.testing.assert_allclose(
        stored[1:64].astype(np.float32), expected, atol=5e-3
    )  # fp16 storage of 6 nats


def test_export_has_our_logits(chain):
    done = program(
        "megatron_slm.export_hf", "--checkpoint", chain / "slm", "--output", chain / "hf"
    )
    assert "adds no begin or end token to a text, as in the corpora" in done.stdout
    done = program(
        "megatron_slm.check_export",
        "--checkpoint",
        chain / "slm",
        "--export",
        chain / "hf",
        "--corpus",
        chain / "held_out",
    )
    assert "logits agree" in done.stdout


def test_our_export_imported_again_prices_tokens_as_the_reference_did(chain, reference_hf):
    """Its tokenizer is known as the corpus's, although the export holds it in another form."""
    program("megatron_slm.import_hf", "--input", reference_hf, "--output", chain / "again")
    program(
        "megatron_slm.score",
        "--checkpoint",
        chain / "again",
        "--corpus",
        chain / "corpus",
        "--output",
        chain / "again_scores",
    )
    first, again = (
        np.fromfile(chain / folder / "loss.bin", np.float16).astype(np.float32)
        for folder in ("scores", "again_scores")
    )
    np.testing.assert_allclose(again, first, atol=5e-3)


def test_report_is_one_page(chain):
    program(
        "megatron_slm.report",
        "--runs",
        chain / "reference",
        chain / "slm",
        "--output",
        chain / "report.html",
    )
    page = (chain / "report.html").read_text()
    assert page.count("data:image/svg+xml") >= 3
    assert "<script" not in page


def test_a_changed_corpus_is_refused_before_training(chain):
    corpus = chain / "corpus.bin"
    whole = corpus.read_bytes()
    try:
        corpus.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        done = program(
            "megatron_slm.train",
            "--data.tokenizer",
            chain / "tok.model",
            "--data.train",
            f"[{chain}/corpus]",
            "--run.folder",
            chain / "refused",
            "--schedule.train_steps",
            1,
            check=False,
        )
    finally:
        corpus.write_bytes(whole)
    assert done.returncode == 3
    assert "content has changed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (chain / "refused" / "metrics.jsonl").exists()
