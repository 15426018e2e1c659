"""The table at the start of a run names every part of the layout: its size, or why it is off."""

import dataclasses

from megatron_slm.config.schema import Config
from megatron_slm.training.start_table import layout_rows


def rows(dp_size: int = 1, recompute: str = "none", **parallel) -> dict[str, tuple[str, str]]:
    config = Config()
    config.parallel = dataclasses.replace(config.parallel, **parallel)
    config.model.recompute = recompute
    return {feature: (state, why) for feature, state, why in layout_rows(config, dp_size)}


def test_one_process_has_everything_off_with_a_reason():
    table = rows()
    assert table.pop("gradient accumulation") == ("2 micro-batches of 4 sequences", "")
    assert {state for state, _ in table.values()} == {"off"} and all(
        why for _, why in table.values()
    )
    assert (
        table["tensor parallel"][1] == "parallel.tensor is 1"
        and table["sequence parallel"][1] == "parallel.tensor is 1"
    )
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
    table = {feature: state for feature, state, _ in layout_rows(config, 2)}
    assert (
        table["expert parallel"] == "4"
        and table["experts, tensor parallel"] == "2"
        and "expert parallel" not in rows(2)
    )


def test_what_is_asked_for_and_has_nothing_to_do_is_said():
    assert rows(1, overlap_grad_reduce=True)["gradient reduction overlapped"][0] == "no effect"
    assert (
        rows(2)["sequence parallel"][1] == "parallel.tensor is 1"
        and rows(2, tensor=2)["sequence parallel"][1] == "parallel.sequence is false"
    )
