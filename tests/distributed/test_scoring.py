"""Scoring with the real model: against plain torch in every layout, across policies, and through a
kill.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import ModelConfig, ParallelConfig
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.testing.corpora import TOKENIZER_FINGERPRINT, random_documents, write_corpus
from megatron_slm.testing.spawn import run_layouts_on_cpu, run_on_cpu, warm_context
from tests.distributed.bench import save_reference

VOCABULARY = 97
WINDOW = 16
MODEL = ModelConfig(
    layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    attention_heads=4,
    query_groups=2,
    vocabulary_size=VOCABULARY,
    initialization_std=0.3,
)
SETTINGS = {"packed": (16, "packed"), "overlapping": (5, "packed"), "isolated": (16, "isolated")}
TOLERANCE_NATS = 2e-4


def score_layout(groups, layout: str, folder: str) -> dict:
    """Score with every setting in this layout; returns how far rescoring a few windows is from the
    store.
    """
    from megatron_slm.config.schema import DeviceConfig
    from megatron_slm.data.score_manifest import ScoreManifest
    from megatron_slm.scoring.corpus import TokenStream, rescore, score_corpus
    from megatron_slm.scoring.model import megatron_runner
    from megatron_slm.scoring.reference import load_scoring_model, open_reference, scoring_config

    corpus = CorpusManifest.read(f"{folder}/corpus")
    reference = open_reference(f"{folder}/run", corpus)
    parallel = ParallelConfig(
        tensor=groups.tp_size,
        pipeline=groups.pp_size,
        context=groups.cp_size,
        sequence=groups.tp_size > 1,
    )
    models = load_scoring_model(
        reference, scoring_config(reference, WINDOW, parallel, DeviceConfig()), groups
    )
    stream = TokenStream(f"{folder}/corpus")
    differences = {}
    for name, (stride, policy) in SETTINGS.items():
        manifest = ScoreManifest(
            corpus.fingerprint,
            corpus.tokens,
            corpus.documents,
            TOKENIZER_FINGERPRINT,
            reference.fingerprint,
            "test",
            WINDOW,
            stride,
            policy,
            shard_tokens=100,
            dtype="fp32",
            columns=("loss", "entropy"),
        )
        store = ScoreStore.create(f"{folder}/{layout}/{name}", manifest)
        runner = megatron_runner(
            models, groups, stream, stream.plan(manifest), store.columns, micro_batch_size=4
        )
        report = score_corpus(runner, store, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        assert report.without_score == {"loss": 0, "entropy": 0}
        assert report.shards_written == manifest.shard_count
        if groups.world_rank == 0:
            assert store.finish()
        torch.distributed.barrier()
        differences[name] = rescore(runner, ScoreStore.open(store.folder), 3)
    return differences


def plain_scores(
    model, tokens: np.ndarray, starts: np.ndarray, stride: int, policy: str
) -> dict[str, np.ndarray]:
    """Every token's loss and entropy, one token at a time, from its own context: no batches, no
    windows shared.
    """
    spans = (
        [(0, len(tokens))]
        if policy == "packed"
        else list(zip(starts, [*starts[1:], len(tokens)], strict=True))
    )
    values = {name: np.full(len(tokens), np.nan, np.float32) for name in ("loss", "entropy")}
    for begin, end in spans:
        for token in range(begin + 1, end):
            # The window that scores this token ends where its block ends; see windows.py.
            block_end = (
                begin + WINDOW
                if token < begin + WINDOW
                else begin + WINDOW + stride * (1 + (token - begin - WINDOW) // stride)
            )
            first = max(begin, min(block_end, end) - 1 - WINDOW)
            with torch.no_grad():
                logits = (
                    model(torch.tensor(tokens[None, first:token].astype(np.int64)))
                    .logits[0, -1]
                    .double()
                )
            log_probability = logits.log_softmax(-1)
            values["loss"][token] = -log_probability[int(tokens[token])]
            values["entropy"][token] = -(log_probability.exp() * log_probability).sum()
    for column in values.values():
        column[starts] = np.nan
    return values


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus, a reference checkpoint, and the truth by transformers' own model."""
    from transformers import AutoModelForCausalLM

    from megatron_slm import export_hf

    folder = tmp_path_factory.mktemp("scoring")
    documents = list(random_documents(14, 14, vocabulary_size=VOCABULARY, seed=4))
    write_corpus(folder / "corpus", documents, vocabulary_size=VOCABULARY)
    run_on_cpu(save_reference, str(folder / "run"), MODEL, WINDOW)
    assert (
        export_hf.main(
            [
                "--checkpoint",
                str(folder / "run"),
                "--output",
                str(folder / "exported"),
                "--tokenizer",
                "none",
            ]
        )
        == 0
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
    truth = {
        name: plain_scores(model, np.concatenate(documents), starts, *setting)
        for name, setting in SETTINGS.items()
    }
    return folder, truth


def test_scores_equal_plain_torch_in_every_layout(data):
    folder, truth = data
    layouts = {
        "dp2": {"dp": 2},
        "tp2": {"tp": 2, "sequence_parallel": True},
        "pp2": {"pp": 2},
        "cp2": {"cp": 2},
    }
    results = run_layouts_on_cpu(score_layout, layouts, str(folder), side_by_side=True)
    for name in layouts:
        for setting, columns in truth.items():
            store = ScoreStore.open(folder / name / setting)
            for column, expected in columns.items():
                got = store.read(column, 0, len(expected))
                np.testing.assert_array_equal(
                    np.isnan(got), np.isnan(expected), err_msg=f"{name} {setting} {column}"
                )
                np.testing.assert_allclose(
                    got, expected, atol=TOLERANCE_NATS, err_msg=f"{name} {setting} {column}"
                )
        assert all(
            difference < TOLERANCE_NATS
            for rank in results[name]
            for columns in rank.values()
            for difference in columns.values()
        )


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    return [
        "--checkpoint",
        str(folder / "run"),
        "--corpus",
        str(folder / "corpus"),
        "--output",
        str(folder / output),
        "--columns",
        "loss,entropy",
        "--shard-tokens",
        "4",
        "--window-tokens",
        "16",
        "--stride-tokens",
        "8",
        "--micro-batch-size",
        "2",
        "--device.kind",
        "cpu",
        *more,
    ]


def score_in_turn(commands: list[list[str]]) -> None:
    """Run the program several times in one process: its start is most of a small run."""
    from megatron_slm import score

    torch.set_num_threads(1)
    for command in commands:
        assert score.main(command) == 0


def check_in_turn(prefix: str, scores: str, run: str) -> None:
    """check_scores scores windows again with the checkpoint, and finds scores that were changed."""
    from megatron_slm import check_scores
    from megatron_slm.data.score_store import ScoreStore

    command = ["--corpus", prefix, "--scores", scores, "--windows", "4", "--reference", run]
    assert check_scores.main(command) == 0
    opened = ScoreStore.open(scores)
    for shard in range(opened.manifest.shard_count):
        start, end = opened.manifest.shard_range(shard)
        values = {column: opened.read(column, start, end - start) for column in opened.columns}
        opened.write_shard(shard, {**values, "loss": values["loss"] + 0.5})
    assert check_scores.main(command) == 3


def start(function, *arguments):
    process = warm_context().Process(target=function, args=arguments)
    process.start()
    return process


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of a store but the command it was made with and the stamps."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "verified.json"
    }
    manifest = json.loads(files.pop("manifest.json"))
    assert "--shard " not in manifest.pop("resume_command")
    return {**files, "manifest": json.dumps(manifest).encode()}


def wait_for_shards(process, store: Path, count: int) -> None:
    while process.is_alive() and not (
        (store / "shards").is_dir() and len(list((store / "shards").glob("shard_*.json"))) >= count
    ):
        time.sleep(0.002)


def test_a_killed_run_started_again_ends_with_the_same_bytes(data):
    folder, truth = data
    process = start(score_in_turn, [arguments(folder, "whole"), arguments(folder, "killed")])
    wait_for_shards(process, folder / "killed", 2)
    process.kill()  # SIGKILL
    process.join()
    with pytest.raises(ValueError, match="incomplete"):
        ScoreStore.open(folder / "killed")
    done = len(list((folder / "killed" / "shards").glob("shard_*.json")))
    process = start(score_in_turn, [arguments(folder, "killed")])
    wait_for_shards(process, folder / "killed", done + 2)
    process.terminate()  # SIGTERM
    process.join()
    assert process.exitcode == 85
    assert ScoreStore.open(folder / "killed", allow_missing_scores=True).missing
    # Two array jobs finish what is left; the one that ends last completes the store.
    rest = start(
        score_in_turn,
        [arguments(folder, "killed", "--shard", "0/2"), arguments(folder, "killed", "--shard=1/2")],
    )
    rest.join()
    assert rest.exitcode == 0
    assert content(folder / "killed") == content(folder / "whole")
    store = ScoreStore.open(folder / "whole")
    assert store.manifest.complete
    assert store.manifest.dtype == "fp16"
    finite = ~np.isnan(truth["packed"]["loss"])
    np.testing.assert_array_equal(np.isnan(store.read("loss", 0, len(finite))), ~finite)


def test_a_second_run_of_finished_scoring_loads_no_model(data, capsys, monkeypatch):
    from megatron_slm import score

    folder, _ = data
    monkeypatch.setattr(score, "run", lambda *_: pytest.fail("scored again"))
    assert score.main(arguments(folder, "whole")) == 0
    printed = capsys.readouterr().out
    assert "done before, complete" in printed
    assert "mean loss" in printed


def test_check_scores_scores_windows_again(data):
    folder, _ = data
    process = start(
        check_in_turn, str(folder / "corpus"), str(folder / "whole"), str(folder / "run")
    )
    process.join()
    assert process.exitcode == 0


def test_bad_settings_and_data_are_sentences(data, capfd):
    from megatron_slm import score

    folder, _ = data
    plain = arguments(folder, "bad")
    assert (
        score.main(
            [
                *plain,
                "--columns",
                "loss,surprise",
                "--shard",
                "4/4",
                "--parallel.distributed_optimizer",
                "true",
            ]
        )
        == 2
    )
    printed = capfd.readouterr().err
    assert all(
        text in printed
        for text in ("3 problems", "loss,entropy", "i from 0 to n - 1", "no gradients")
    )
    assert score.main([*plain, "--checkpoint", str(folder / "nowhere")]) == 3
    assert "no such checkpoint" in capfd.readouterr().err
    write_corpus(folder / "other", random_documents(3, 9), tokenizer_fingerprint="sha256:other")
    assert score.main([*plain, "--corpus", str(folder / "other")]) == 3
    assert "trained with the tokenizer" in capfd.readouterr().err
    nowhere = ["--checkpoint", str(folder / "nowhere"), "--corpus", str(folder / "nothing")]
    assert score.main([*plain, *nowhere]) == 3
    printed = capfd.readouterr().err
    assert "2 problems" in printed
    assert "no such checkpoint" in printed
    assert "no such corpus" in printed
    assert not (folder / "bad").exists()
