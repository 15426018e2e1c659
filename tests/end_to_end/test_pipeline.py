"""The whole chain on a little real text, through the programs a user runs: every stage reads what
the one before wrote.

The reference is trained under torchrun and exported as a user would. The others are the same
programs in warm processes.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.manifest import check_corpus
from megatron_slm.tokenization import load_tokenizer
from tests.end_to_end.warm_programs import ROOT, environment, run_program

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


def write_texts(folder: Path) -> None:
    """corpus.jsonl and held_out.jsonl: modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text() for name in MODULES if (library / name).exists()]
    for name, part in (("corpus", texts[:-2]), ("held_out", texts[-2:])):
        lines = [json.dumps({"text": text}) for text in part]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def start(*words, check: bool = True) -> subprocess.CompletedProcess:
    """Run Python as a user would."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def training_words(folder: Path, name: str, steps: int, *more) -> list[str]:
    settings = {
        "--run.folder": folder / name,
        "--schedule.train_steps": steps,
        "--model.layers": 2,
        "--model.hidden_size": 32,
        "--model.ffn_hidden_size": 64,
        "--model.query_groups": 2,
        "--data.tokenizer": folder / "tok.model",
        "--data.train": f"[{folder}/corpus]",
        "--data.validation": f"[{{name: target, corpus: {folder}/held_out}}]",
        "--data.sequence_length": 64,
        "--monitoring.validation_batches": 2,
        "--monitoring.log_interval_steps": 2,
    }
    return [*(str(word) for pair in settings.items() for word in pair), *map(str, more)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Text, tokenizer, corpora, reference, scores and a selectively trained model in one folder."""
    folder = tmp_path_factory.mktemp("chain")
    write_texts(folder)
    text = folder / "corpus.jsonl"
    tokenizer = folder / "tok"
    start(
        *("-m", "tokenizer.train", "--input", text),
        *("--output-prefix", tokenizer, "--vocab-size", 600),
    )
    for name in ("corpus", "held_out"):
        start(
            *("-m", "data_tools.preprocess", "--input", folder / f"{name}.jsonl"),
            *("--tokenizer", folder / "tok.model", "--output-prefix", folder / name),
            *("--workers", 2),
        )
    start(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "megatron_slm.train"),
        *training_words(folder, "reference", 4, "--parallel.tensor", 2),
    )
    run_program(
        "megatron_slm.score",
        *("--checkpoint", folder / "reference", "--corpus", folder / "corpus"),
        *("--output", folder / "scores", "--window-tokens", 64),
        processes=2,
    )
    selection = ("--selection.scorer", "excess_loss")
    scores = ("--selection.reference.scores", f"[{folder}/scores]")
    words = training_words(folder, "slm", 6, *selection, *scores, "--parallel.pipeline", 2)
    run_program("megatron_slm.train", *words, processes=2)
    return folder


@pytest.fixture(scope="module")
def reference_hf(chain) -> Path:
    """The reference as a Hugging Face folder."""
    run = chain / "reference"
    output = chain / "reference_hf"
    start("-m", "megatron_slm.export_hf", "--checkpoint", run, "--output", output)
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
    """Every stored score of the first window (tokens 1 to 63), against plain torch on the exported
    reference.
    """
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
    done = run_program(
        "megatron_slm.export_hf", "--checkpoint", chain / "slm", "--output", chain / "hf"
    )
    assert "adds no begin or end token to a text, as in the corpora" in done.stdout
    done = run_program(
        "megatron_slm.check_export",
        "--checkpoint",
        chain / "slm",
        "--export",
        chain / "hf",
        "--corpus",
        chain / "held_out",
    )
    assert "logits agree" in done.stdout


def test_a_huggingface_model_scores_as_our_own_in_two_processes(chain, reference_hf):
    corpus = ("--corpus", chain / "corpus", "--window-tokens", 64, "--shard-tokens", 8192)
    model = ("--huggingface", reference_hf, "--micro-batch-size", 8)
    words = (*corpus, "--output", chain / "hf_scores", *model)
    done = run_program("megatron_slm.import_scores", *words, processes=2)
    assert done.stdout.count("complete") == 1  # one process speaks
    ours, theirs = (
        np.fromfile(chain / folder / "loss.bin", np.float16).astype(np.float32)
        for folder in ("scores", "hf_scores")
    )
    np.testing.assert_allclose(theirs, ours, atol=5e-3)
    again = run_program("megatron_slm.import_scores", *words, processes=2)
    assert "done before, complete" in again.stdout


def test_our_export_imported_again_scores_tokens_as_the_reference_did(chain, reference_hf):
    """Its tokenizer is known as the corpus's, although the export holds it in another form."""
    run_program("megatron_slm.import_hf", "--input", reference_hf, "--output", chain / "again")
    run_program(
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


def test_an_evaluation_repeats_the_last_validation_of_training(chain, reference_hf):
    """In another layout than the run's; its export agrees."""
    trained = records(chain / "reference", "validation")[-1]
    sequences = ("--sequences", 2 * 8)  # monitoring.validation_batches x data.global_batch_size
    run_program(
        "megatron_slm.evaluate",
        *("--checkpoint", chain / "reference", "--parallel.pipeline", 2, *sequences),
        *("--output", chain / "evaluation.json"),
        processes=2,
    )
    metrics = json.loads((chain / "evaluation.json").read_text())["metrics"]
    names = [name for name in trained if name.startswith("validation/target/")]
    assert {name.rpartition("/")[2] for name in names} == {"loss", "perplexity", "tokens"}
    for name in names:
        assert metrics[name] == pytest.approx(trained[name], rel=1e-5), name
    run_program(
        "megatron_slm.evaluate",
        *("--huggingface", reference_hf, "--sequence-length", 64, *sequences),
        *("--corpora", f"[{{name: target, corpus: {chain}/held_out}}]"),
        *("--output", chain / "evaluation_hf.json"),
    )
    exported = json.loads((chain / "evaluation_hf.json").read_text())["metrics"]
    assert exported == pytest.approx(metrics, rel=1e-5)


def test_bits_per_byte_are_those_of_the_text(chain):
    output = chain / "whole.json"
    run_program("megatron_slm.evaluate", "--checkpoint", chain / "reference", "--output", output)
    metrics = json.loads(output.read_text())["metrics"]
    tokenizer = load_tokenizer(chain / "tok.model")
    expected_bytes = 0
    for line in (chain / "held_out.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        first = tokenizer.decode(tokenizer.encode(text)[:1])  # it does not count
        expected_bytes += len(text.encode()) - len(first.encode())
    assert metrics["validation/target/bytes"] == expected_bytes
    total_nats = metrics["validation/target/loss"] * metrics["validation/target/tokens"]
    bits_per_byte = metrics["validation/target/bits_per_byte"]
    assert bits_per_byte == pytest.approx(total_nats / np.log(2) / expected_bytes, rel=1e-9)


def test_report_is_one_page(chain):
    run_program(
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
        words = training_words(chain, "refused", 1)
        done = start("-m", "megatron_slm.train", *words, check=False)
    finally:
        corpus.write_bytes(whole)
    assert done.returncode == 3
    assert "content has changed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (chain / "refused" / "metrics.jsonl").exists()
