"""The table at the start of a run names every part of the layout: its size, or why it is off."""

import dataclasses
from pathlib import Path

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.planning.wording import backward_rows_on_a_gpu
from megatron_slm.training.layout_rows import layout_rows
from megatron_slm.training.start_table import StartTable, _describe_rows, describe_data


def rows(
    dp_size: int = 1, recompute: str = "none", on_gpu: bool = False, **parallel
) -> dict[str, tuple[str, str]]:
    config = Config()
    config.parallel = dataclasses.replace(config.parallel, **parallel)
    config.model.recompute = recompute
    table = layout_rows(config, dp_size, on_gpu=on_gpu)
    return {feature: (state, why) for feature, state, why in table}


def test_one_process_has_everything_off_with_a_reason():
    table = rows()
    assert table.pop("gradient accumulation") == ("2 micro-batches of 4 sequences", "")
    assert {state for state, _ in table.values()} == {"off"}
    assert all(why for _, why in table.values())
    assert table["tensor parallel"][1] == "parallel.tensor is 1"
    assert table["sequence parallel"][1] == "parallel.tensor is 1"
    assert table["virtual pipeline parallel"][1] == "parallel.pipeline is 1"
    assert table["data parallel"][1] == "one copy of the model takes all processes, 1"


def test_a_full_layout_has_sizes():
    table = rows(
        2,
        "full",
        tensor=4,
        pipeline=2,
        virtual_pipeline=2,
        context=2,
        sequence=True,
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    assert [
        table[f"{name} parallel"][0]
        for name in ("tensor", "sequence", "pipeline", "virtual pipeline", "context", "data")
    ] == ["4", "on", "2", "2", "2", "2"]
    assert {
        table[name][0]
        for name in (
            "distributed optimizer",
            "gradient reduction overlapped",
            "parameter gather overlapped",
        )
    } == {"on"}
    assert table["recomputation"] == ("full", "every layer")


def test_experts_have_rows_of_their_own():
    config = Config()
    config.model.experts, config.parallel.expert, config.parallel.tensor = 8, 4, 2
    table = {feature: state for feature, state, _ in layout_rows(config, 2, on_gpu=False)}
    assert table["expert parallel"] == "4"
    assert table["experts, tensor parallel"] == "2"
    assert "expert parallel" not in rows(2)


def test_what_is_asked_for_and_has_nothing_to_do_is_said():
    assert rows(1, overlap_grad_reduce=True)["gradient reduction overlapped"][0] == "no effect"
    assert rows(2)["sequence parallel"][1] == "parallel.tensor is 1"
    assert rows(2, tensor=2)["sequence parallel"][1] == "parallel.sequence is false"


def test_communication_is_hidden_on_gpus_where_there_is_any():
    def overlapped(dp_size: int, **settings) -> list[tuple[str, str]]:
        table = rows(dp_size, **settings)
        return [table[f"{name} overlapped"] for name in ("gradient reduction", "parameter gather")]

    alone = "nothing to reduce over: data parallel x context parallel is 1"
    both = {"on_gpu": True, "distributed_optimizer": True}
    assert overlapped(2, **both) == [("on", ""), ("on", "")]
    assert overlapped(1, context=2, **both) == [("on", ""), ("on", "")]
    assert overlapped(1, **both) == [("off", alone), ("off", alone)]
    assert overlapped(2, distributed_optimizer=True) == [("off", "no CUDA"), ("off", "no CUDA")]
    assert overlapped(2, on_gpu=True) == [
        ("on", ""),
        ("off", "parallel.distributed_optimizer is false"),
    ]
    assert overlapped(2, overlap_grad_reduce=False, **both) == [
        ("off", "parallel.overlap_grad_reduce is false"),
        ("off", "parallel.overlap_grad_reduce is false"),
    ]
    # A gather that is asked for brings the reduction it needs.
    assert overlapped(2, distributed_optimizer=True, overlap_param_gather=True) == [
        ("on", ""),
        ("on", ""),
    ]


ACCELERATIONS = [("device", "cpu", "gloo collectives"), ("fp8", "off", "no CUDA")]


def table_of(on_gpu: bool) -> StartTable:
    return StartTable(
        {"run folder": "runs/a"}, layout_rows(Config(), 1, on_gpu=on_gpu), ACCELERATIONS, on_gpu
    )


def test_the_short_table_names_all_that_is_off_in_one_row():
    table = table_of(on_gpu=False)
    full, short = table.full(), table.short(Path("runs/a/start_table.txt"))
    off = [name for name, words in full.items() if words.startswith("off (")]
    assert len(off) > 8
    assert list(short) == ["run folder", "gradient accumulation", "device", "off"]
    assert [name for name in off if name.removesuffix(" parallel") not in short["off"]] == []
    assert short["off"].startswith("tensor, sequence, pipeline, virtual pipeline, context and data")
    assert short["off"].endswith("(why: runs/a/start_table.txt)")


def test_on_a_gpu_an_acceleration_that_is_off_keeps_its_reason():
    short = table_of(on_gpu=True).short(Path("runs/a/start_table.txt"))
    assert short["fp8"] == "off (no CUDA)"


def test_what_is_on_is_shown_as_in_the_full_table():
    config = Config()
    config.parallel.tensor = 2
    table = StartTable({}, layout_rows(config, 2, on_gpu=False), ACCELERATIONS, on_gpu=False)
    short = table.short(Path("table"))
    assert (short["tensor parallel"], short["data parallel"]) == ("2", "2")
    assert "tensor" not in short["off"]


def run_of(steps: int, weights=()) -> Config:
    config = Config()
    config.schedule.train_steps = steps
    config.data.global_batch_size, config.data.sequence_length = 8, 100
    config.data.weights = list(weights)
    return config


@pytest.mark.parametrize(
    ("config", "corpora", "words"),
    [
        (run_of(50), [("data/a", 10_000)], "40k tokens: 4 epochs of data/a (10k tokens)"),
        (
            run_of(50),
            [("data/a", 10_000), ("data/b", 30_000)],
            "40k tokens: 1 epochs of data/a (10k tokens), 1 epochs of data/b (30k tokens)",
        ),
        (
            run_of(50, weights=[3, 1]),
            [("data/a", 10_000), ("data/b", 30_000)],
            "40k tokens: 3 epochs of data/a (10k tokens), 0.333 epochs of data/b (30k tokens)",
        ),
        (
            run_of(50, weights=[1, 1, 1, 1, 4]),
            [(f"data/{number}", 10_000) for number in range(5)],
            "40k tokens: 5 corpora, from 0.5 epochs of data/0 (10k tokens) "
            "to 2 epochs of data/4 (10k tokens)",
        ),
    ],
)
def test_epochs_of_each_corpus(config, corpora, words):
    assert describe_data(config, corpora, run_tokens=40_000) == words


@pytest.mark.parametrize(
    ("rows", "hidden_size", "words"),
    [
        ("all", 2048, ""),
        (
            "last_layer",
            1024,
            "does not pay at hidden size 1024: at 2048 a step on an H200 took 1.006",
        ),
        ("every_layer_approximate", 2048, "does not pay at hidden size 2048"),
        ("every_layer_approximate", 4096, "not measured at hidden size 4096"),
    ],
)
def test_where_rows_do_not_pay_on_a_gpu_is_said(rows, hidden_size, words):
    config = Config()
    config.selection.backward_rows, config.model.hidden_size = rows, hidden_size
    said = backward_rows_on_a_gpu(config)
    assert said.startswith(words)
    assert bool(said) == bool(words)
    for on_gpu in (False, True):
        backward = _describe_rows(config, on_gpu)["backward"]
        assert ("H200" in backward) == (on_gpu and rows != "all")
