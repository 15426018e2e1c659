"""Settings that scoring could not honour are refused before anything is opened."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.score import begin_token_warnings
from megatron_slm.scoring.options import ScoreDevice, ScoreOptions, parse, prepare

SOUND = ScoreOptions(checkpoint="none", corpus="none", output="none")


@pytest.mark.parametrize(
    "changed, sentence",
    [
        (
            dict(parallel=ParallelConfig(distributed_optimizer=True)),
            "parallel.distributed_optimizer: got true; scoring has no gradients",
        ),
        (
            dict(parallel=ParallelConfig(pipeline=2, virtual_pipeline=2)),
            "parallel.virtual_pipeline: got 2",
        ),
        (dict(device=ScoreDevice(fp8="hybrid")), "device.fp8: got hybrid"),
        (
            dict(device=ScoreDevice(garbage_collection_steps=7)),
            "device.garbage_collection_steps: got 7; it is about training steps",
        ),
        (
            dict(device=ScoreDevice(step_timeout_minutes=0)),
            "device.step_timeout_minutes: got 0; it is about training steps",
        ),
        (
            dict(device=ScoreDevice(flight_recorder_entries=0)),
            "device.flight_recorder_entries: got 0; it is about training steps",
        ),
        (
            dict(device=ScoreDevice(head_engine="liger")),
            "device.head_engine: got liger; it computes the head's backward, and scoring has none",
        ),
        (dict(window_tokens=8, stride_tokens=9), "stride_tokens: got 9, above window_tokens (8)"),
        (dict(shard_tokens=-1), "shard_tokens: got -1; expected at least 0"),
        (dict(parallel=ParallelConfig(tensor=0)), "parallel.tensor: got 0; expected at least 1"),
    ],
)
def test_what_scoring_cannot_honour_is_a_sentence(changed, sentence):
    with pytest.raises(ConfigError) as caught:
        prepare(replace(SOUND, **changed), 1, [])
    assert sentence in str(caught.value)


def test_every_problem_of_the_command_line_is_said(capsys):
    words = ["--corpuss", "c", "--window-tokens=many", "--checkpoint", "r", "--output", "o"]
    with pytest.raises(SystemExit) as stopped:
        parse(words, "about")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "did you mean corpus?" in said
    assert "window_tokens: got 'many'" in said
    assert "corpus: missing; it must be given" in said


def test_settings_come_from_the_command_line_and_a_file(tmp_path):
    path = tmp_path / "score.yaml"
    path.write_text("checkpoint: runs/reference\noutput: a\nparallel: {tensor: 2}\n")
    words = [
        "--config",
        str(path),
        "--corpus",
        "data/corpus",
        "--output=b",
        "--window-tokens",
        "64",
    ]
    options = parse(words, "about")
    assert (options.checkpoint, options.output, options.corpus) == (
        "runs/reference",
        "b",
        "data/corpus",
    )
    assert (options.window_tokens, options.parallel.tensor) == (64, 2)
    assert options.device == ScoreDevice()


@pytest.mark.parametrize("rank, speaks", [("0", True), ("1", False)])
def test_every_bad_option_is_said_once_by_the_first_process(monkeypatch, capsys, rank, speaks):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as left:
        parse(["--checkpont", "run", "--corpus", "c"], "")
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert ("did you mean checkpoint?" in printed and "output: missing" in printed) is speaks


@pytest.mark.parametrize(("trained", "warnings"), [(False, 1), (True, 0), (None, 0)])
def test_a_reference_of_documents_that_begin_otherwise_is_named(trained, warnings):
    job = SimpleNamespace(
        options=SimpleNamespace(corpus="data/corpus"),
        corpus=SimpleNamespace(prepend_bos=True),
        reference=SimpleNamespace(
            folder="runs/reference", info=SimpleNamespace(tokenizer={"prepend_bos": trained})
        ),
    )
    sentences = begin_token_warnings(job)
    assert len(sentences) == warnings
    for sentence in sentences:
        assert "runs/reference was trained on documents that do not begin" in sentence
        assert "those of data/corpus begin with the begin token" in sentence
