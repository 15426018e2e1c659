"""The four examples compute what our trainer computes on the same batches: from the same weights
the same tokens, loss and gradient norm in the first step, and after one update the same loss.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from megatron_slm.testing.spawn import run_layouts_on_cpu
from megatron_slm.tokenization import load_tokenizer
from tests.end_to_end import megatron_lm_excerpt
from tests.end_to_end.examples_here import FOLDER
from tests.end_to_end.tiny_run import LENGTH, VOCABULARY, train, train_records, word_tokenizer
from tests.end_to_end.warm_programs import ROOT, run_program

STEPS = 2
MICRO_BATCH_SIZE = 4  # of our run; two data-parallel ranks have half of it each
LAYOUTS = {"dp2": dict(dp=2), "tp2": dict(tp=2), "cp2": dict(cp=2), "pp2": dict(pp=2)}
UNDER_TORCHRUN = ("fsdp2", "huggingface_trainer")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A corpus with scores, a checkpoint, its export, and a run of our trainer from it."""
    folder = tmp_path_factory.mktemp("examples")
    word_tokenizer(folder / "tokenizer.json")
    write_corpus(
        folder / "corpus",
        random_documents(60, 20, vocabulary_size=VOCABULARY),
        vocabulary_size=VOCABULARY,
        tokenizer_fingerprint=load_tokenizer(folder / "tokenizer.json").fingerprint,
    )
    random = np.random.RandomState(3)
    write_scores(
        folder / "scores", folder / "corpus", lambda offsets: random.gamma(4.0, 1.0, len(offsets))
    )
    train(folder, "start", **{"schedule.train_steps": 1})
    run_program(
        "megatron_slm.export_hf", "--checkpoint", folder / "start", "--output", folder / "model"
    )
    settings = {
        "checkpoint.initialize_from": folder / "start",
        "schedule.train_steps": STEPS,
        "schedule.style": "constant",
        "schedule.warmup_fraction": 0,
        "optimizer.weight_decay": 0,
        "selection.scorer": "excess_loss",
        "selection.reference.scores": f"[{folder}/scores]",
    }
    train(folder, "baseline", **settings)
    return folder


@pytest.fixture(scope="module")
def ours(prepared) -> list[dict]:
    return train_records(prepared, "baseline")


@pytest.fixture(scope="module")
def of_two_processes(prepared) -> list[dict]:
    """What the examples that need no megatron-core did, in two processes that cannot import it."""
    paths = ("--model", "model", "--corpus", "corpus", "--scores", "scores")
    steps = ("--steps", STEPS, "--sequence_length", LENGTH, "--global_batch_size", 8)
    arguments = {
        "fsdp2": (*paths, *steps, "--micro_batch_size", MICRO_BATCH_SIZE // 2),
        "huggingface_trainer": (*paths, "--output_dir", "hf", *hugging_face_options()),
        "plain_torch": (*paths, *steps, "--micro_batch_size", MICRO_BATCH_SIZE),
    }
    words = {name: list(map(str, of_one)) for name, of_one in arguments.items()}
    ports = json.dumps(dict(zip(UNDER_TORCHRUN, free_ports(len(UNDER_TORCHRUN)), strict=True)))
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-m", "tests.end_to_end.without_megatron_core"]
        command += [f"rank_{rank}.json", json.dumps(words), ports]
        job = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment = {**os.environ, **job, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        ranks.append(
            subprocess.Popen(
                command,
                cwd=prepared,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    for rank, output in zip(ranks, said, strict=True):
        assert rank.returncode == 0, output[-5000:]
    return [json.loads((prepared / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def megatron_lm(prepared) -> dict[str, list[dict]]:
    return run_layouts_on_cpu(megatron_lm_excerpt.run, LAYOUTS, prepared)


def hugging_face_options() -> tuple:
    """Our optimizer settings in the words of TrainingArguments."""
    numbers = {
        "--max_steps": STEPS,
        "--sequence_length": LENGTH,
        "--per_device_train_batch_size": MICRO_BATCH_SIZE // 2,
        "--gradient_accumulation_steps": 2,
        "--learning_rate": 3e-4,
        "--adam_beta2": 0.95,
        "--seed": 1234,
        "--logging_steps": 1,
    }
    words = {
        "--lr_scheduler_type": "constant",
        "--save_strategy": "no",
        "--report_to": "none",
        "--use_cpu": "true",
        "--disable_tqdm": "true",
    }
    return tuple(word for pair in {**numbers, **words}.items() for word in pair)


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def check_records(records: list[dict], ours: list[dict]) -> None:
    """Loss and gradient norm of both steps; the second differs by rounding after an update."""
    for record, expected, tolerance in zip(records[:STEPS], ours, (1e-6, 1e-4), strict=True):
        assert record["loss"] == pytest.approx(expected["loss/selected"], rel=tolerance)
        norm = expected["optimizer/grad_norm"]
        assert record["grad_norm"] == pytest.approx(norm, rel=10 * tolerance)


def selected_tokens(result: dict) -> list[int]:
    """Of every step."""
    return [record["selected"] for record in result["records"]]


def check_choices(parts: list[list[dict]], plain: list[dict], dim: int | None) -> None:
    """The ranks' masks side by side (dim=None: each rank has the whole) are the plain loop's."""
    for number, expected in enumerate(plain):
        masks = [np.array(part[number]["mask"]) for part in parts]
        whole = masks if dim is None else [np.concatenate(masks, dim)]
        for mask in whole:
            np.testing.assert_array_equal(mask, expected["mask"])
        for part in parts:
            assert part[number]["threshold"] == pytest.approx(expected["threshold"], abs=1e-4)


@pytest.fixture(scope="module")
def plain(of_two_processes) -> dict:
    return of_two_processes[0]["plain_torch"]


def test_the_plain_loop_computes_our_step(plain, ours):
    check_records(plain["records"], ours)
    so_far = np.cumsum(selected_tokens(plain)).tolist()
    assert so_far == [expected["tokens/selected"] for expected in ours]
    first = plain["choices"][: len(plain["choices"]) // STEPS]
    thresholds = [choice["threshold"] for choice in first]
    assert np.mean(thresholds) == pytest.approx(ours[0]["selection/threshold_nats"], abs=1e-5)


def test_fsdp2_computes_our_step_on_two_ranks(of_two_processes, plain, ours):
    results = [rank["fsdp2"] for rank in of_two_processes]
    for result in results:
        check_records(result["records"], ours)
    check_choices([result["choices"] for result in results], plain["choices"], 0)


def test_the_trainer_of_transformers_computes_our_step_on_two_processes(
    of_two_processes, plain, ours
):
    results = [rank["huggingface_trainer"] for rank in of_two_processes]
    check_records(results[0]["records"], ours)
    check_choices([result["choices"] for result in results], plain["choices"], 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_lm_computes_our_step(layout, megatron_lm, plain, ours):
    results = [result for result in megatron_lm[layout] if result["records"]]
    for result in results:
        check_records(result["records"], ours)
        assert selected_tokens(result) == selected_tokens(plain)
    parts = [result["choices"] for result in results]
    if layout == "cp2":
        parts = [in_order(parts)]
    check_choices(parts, plain["choices"], 0 if layout == "dp2" else None)


def in_order(parts: list[list[dict]]) -> list[dict]:
    """The choices of two context-parallel ranks: one holds chunks 0 and 3 of four, one 1 and 2."""
    whole = []
    for first, second in zip(*parts, strict=True):
        outer = np.split(np.array(first["mask"]), 2, axis=1)
        inner = np.split(np.array(second["mask"]), 2, axis=1)
        mask = np.concatenate([outer[0], *inner, outer[1]], axis=1)
        whole.append({"mask": mask, "threshold": first["threshold"]})
    return whole


def test_an_example_fits_on_a_page_and_says_how_it_is_run():
    files = sorted(FOLDER.glob("*.py"))
    assert [path.stem for path in files] == [
        "fsdp2",
        "huggingface_trainer",
        "megatron_lm",
        "plain_torch",
    ]
    for path in files:
        text = path.read_text()
        assert len(text.splitlines()) < 80, path.name
        assert text.startswith('"""Selective language modeling '), path.name
