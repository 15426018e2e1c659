"""Every program says --help, --version and what is wrong with its input before it loads torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "megatron", "transformers", "matplotlib", "wandb", "pyarrow", "triton")
PROGRAMS = (
    "megatron_slm.train",
    "megatron_slm.score",
    "megatron_slm.evaluate",
    "megatron_slm.harness",
    "megatron_slm.plan",
    "megatron_slm.report",
    "megatron_slm.export_hf",
    "megatron_slm.import_hf",
    "megatron_slm.import_scores",
    "megatron_slm.check_export",
    "megatron_slm.check_scores",
    "megatron_slm.submit",
    "tokenizer.train",
    "tokenizer.evaluate",
    "data_tools.preprocess",
    "data_tools.to_text",
    "data_tools.merge",
    "data_tools.split",
    "data_tools.verify",
    "data_tools.inspect_corpus",
)
TRAIN = (
    "--schedule.train_steps 1 --data.tokenizer nowhere.model --data.train nowhere --run.folder run "
).split()
FAULTS = [
    ("megatron_slm.train", TRAIN, 3, "data.train: "),
    ("megatron_slm.train", [*TRAIN, "--selection.scorer", "exces_loss"], 2, "did you mean"),
    ("megatron_slm.train", [*TRAIN, "--selection.scorer", "excess_loss"], 2, "reference.scores"),
    (
        "megatron_slm.train",
        [
            *TRAIN,
            "--selection.scorer",
            "excess_loss",
            "--selection.reference.checkpoint",
            "nowhere",
        ],
        3,
        "selection.reference.checkpoint: ",
    ),
    ("megatron_slm.train", [*TRAIN, "--checkpoint.initialize_from", "nowhere"], 3, "nowhere"),
    (
        "megatron_slm.score",
        "--checkpoint nowhere --corpus nowhere --output s".split(),
        3,
        "nowhere",
    ),
    ("megatron_slm.evaluate", "--checkpoint nowhere".split(), 3, "nowhere"),
    ("megatron_slm.evaluate", "--checkpoint a --huggingface b".split(), 2, "give one of"),
    (
        "megatron_slm.evaluate",
        [*"--huggingface nowhere --sequence-length 8 --corpora".split(), "[{name: n, corpus: c}]"],
        3,
        "no local Hugging Face model",
    ),
    ("megatron_slm.plan", "--config nowhere.yaml".split(), 2, "no such file"),
    ("megatron_slm.submit", "--folder p --local".split(), 2, "neither is given"),
    ("megatron_slm.report", "--runs nowhere --output r.html".split(), 3, "nowhere"),
    ("megatron_slm.export_hf", "--checkpoint nowhere --output e".split(), 3, "nowhere"),
    (
        "megatron_slm.import_scores",
        "--corpus nowhere --output s --jsonl nowhere.jsonl --window-tokens 8".split(),
        3,
        "nowhere",
    ),
    (
        "megatron_slm.import_scores",
        "--corpus nowhere --output s --huggingface nowhere --window-tokens 8".split(),
        3,
        "nowhere",
    ),
    ("data_tools.verify", "c --rescore-tolerance-nats nan".split(), 2, "got nan; expected number"),
    (
        "data_tools.preprocess",
        "--input n --tokenizer t --output-prefix o --save-every-seconds nan".split(),
        2,
        "--save-every-seconds nan",
    ),
    (
        "megatron_slm.check_export",
        "--checkpoint c --export e --corpus c --sequences 0".split(),
        2,
        "got 0; expected whole number, at least 1",
    ),
    (
        "megatron_slm.import_scores",
        "--corpus c --output s --jsonl j --window-tokens 0".split(),
        2,
        "got 0; expected whole number, at least 1",
    ),
    ("megatron_slm.import_hf", "--input nowhere --output runs/n".split(), 3, "nowhere"),
    (
        "megatron_slm.check_scores",
        "--corpus c --scores nowhere --reference nowhere".split(),
        3,
        "nowhere",
    ),
    (
        "megatron_slm.check_scores",
        "--corpus c --scores s --reference r --windows 0".split(),
        2,
        "got 0; expected whole number, at least 1",
    ),
    (
        "megatron_slm.check_export",
        "--checkpoint nowhere --export nowhere --corpus nowhere".split(),
        3,
        "nowhere",
    ),
    (
        "data_tools.preprocess",
        "--input n --tokenizer t.model --output-prefix o".split(),
        3,
        "t.model",
    ),
    ("data_tools.to_text", "--input n --output o --template {q}".split(), 3, "n"),
    ("data_tools.merge", "--input n --output-prefix o".split(), 3, "n"),
    ("data_tools.split", "--held-out-documents 1 nowhere a b".split(), 2, "usage"),
    ("data_tools.verify", ["nowhere"], 3, "nowhere"),
    ("data_tools.inspect_corpus", ["nowhere"], 3, "nowhere"),
    ("tokenizer.train", "--input n.jsonl --output-prefix v --vocab-size 300".split(), 3, "n.jsonl"),
    ("megatron_slm.plan", "--node 4".split(), 2, "did you mean --nodes?"),
    ("megatron_slm.report", "--run a".split(), 3, "a"),
    ("megatron_slm.export_hf", "--chekpoint a --output b".split(), 2, "checkpoint"),
    ("megatron_slm.export_hf", "--checkpoint a --output b --dtype fp23".split(), 2, "mean fp32?"),
    ("data_tools.verify", "nowhere --sample-document 1 --score s".split(), 3, "nowhere"),
    ("data_tools.verify", "nowhere --sample_documents 1".split(), 2, "mean --sample-documents?"),
]
RUN = f"""
import contextlib, importlib, io, json, sys
for line in sys.stdin:
    program, argv = json.loads(line)
    code, said = 0, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = importlib.import_module(program).main(argv)
        except SystemExit as stopped:
            code = stopped.code
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy]))
    for name in [*sys.modules]:
        if name.split(".")[0] in heavy:
            del sys.modules[name]  # so that the next program is not blamed for them
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(exit code, what was said, heavy modules loaded) of every call below, all in one process."""
    calls = [(program, [word]) for program in PROGRAMS for word in ("--help", "--version")]
    calls += [(program, argv) for program, argv, _, _ in FAULTS]
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input="".join(json.dumps(call) + "\n" for call in calls),
        cwd=tmp_path_factory.mktemp("empty"),
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(program, *argv): answer for (program, argv), answer in zip(calls, lines, strict=True)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_loads_nothing_heavy(program, answers):
    code, said, heavy = answers[program, "--help"]
    assert code == 0, said
    assert "usage: " in said
    assert "--version" in said
    assert heavy == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_knows_its_version(program, answers):
    from megatron_slm import __version__

    code, said, _ = answers[program, "--version"]
    assert code == 0, said
    assert said.strip().endswith(f" {__version__}")


@pytest.mark.parametrize(
    "program, argv, expected_code, sentence",
    FAULTS,
    ids=[f"{n}_{f[0]}" for n, f in enumerate(FAULTS)],
)
def test_a_fault_of_the_input_is_said_before_anything_heavy_is_loaded(
    program, argv, expected_code, sentence, answers
):
    code, said, heavy = answers[(program, *argv)]
    assert code == expected_code, said
    assert sentence in said
    assert heavy == []


def test_every_program_is_here():
    there = [
        f"{path.parent.name}.{path.stem}"
        for folder in ("megatron_slm", "tokenizer", "data_tools")
        for path in (ROOT / folder).glob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert sorted(there) == sorted(PROGRAMS)
