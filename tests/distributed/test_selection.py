"""Selection over ranks: random layouts against the brute-force choice, every scope and scorer under
every layout.
"""

import math
import tempfile
from itertools import chain

import pytest
import torch
import torch.distributed as dist

from megatron_slm.selection import (
    Population,
    RunningThreshold,
    TrainingProgress,
    build_scorer,
    select_top,
)
from megatron_slm.testing.selection_oracle import awkward_scores, expected_mask
from megatron_slm.testing.spawn import run_processes

WORLD = 4


def _worker(rank, folder, checks):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD
    )
    groups = {
        "all": dist.new_group(range(WORLD)),
        "three": dist.new_group([0, 1, 2]),
        "first_two": dist.new_group([0, 1]),
        "pairs": [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2],
    }
    try:
        for check in checks:
            check(rank, groups)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _spawn(*checks):
    with tempfile.TemporaryDirectory() as folder:
        run_processes(_worker, (folder, checks), WORLD)


def _check_random_populations(rank, groups):
    """Ragged ranks, empty ranks, ties, NaN, infinities, interleaved ids: both backends equal the
    brute-force choice to the bit.
    """
    if rank == 3:
        return
    ties_met = partial_ties = 0
    for case in range(72):
        generator = torch.Generator().manual_seed(case)
        sizes = torch.randint(0, 40, (3,), generator=generator) * (
            torch.rand(3, generator=generator) > 0.2
        )
        total = int(sizes.sum())
        score = awkward_scores(generator, total)
        eligible = torch.rand(total, generator=generator) < torch.rand(1, generator=generator)
        token_id = None
        if case % 3:
            apart = {1: 1, 2: 10**12}[case % 3]
            token_id = torch.randperm(total, generator=generator) * apart - 5
        keep_fraction = [
            1.0,
            0.7,
            0.6,
            1e-6,
            0.5,
            torch.rand(1, generator=generator).item() or 1.0,
        ][case % 6]
        mask, threshold, kept, count = expected_mask(score, eligible, keep_fraction, token_id)
        mine = slice(int(sizes[:rank].sum()), int(sizes[: rank + 1].sum()))
        for backend in ("gather", "radix", "auto") if case % 4 == 0 else ("gather", "radix"):
            chosen = select_top(
                score[mine],
                eligible[mine],
                keep_fraction,
                token_id=None if token_id is None else token_id[mine],
                group=groups["three"],
                backend=backend,
                capacity=int(sizes.max()) + case % 2 if case % 3 == 0 else None,
            )
            facts = (chosen.threshold, chosen.kept, chosen.eligible)
            assert facts == (threshold, kept, count), (
                f"case {case}, {backend}: {facts} instead of {(threshold, kept, count)}"
            )
            assert torch.equal(chosen.mask, mask[mine]), (
                f"case {case}, {backend}: wrong mask on rank {rank}"
            )
            ties_kept = int((mask & (score == threshold)).sum())
            tokens_here = int(mask[mine].sum()) if ties_kept == chosen.ties else None
            assert chosen.tokens_here == tokens_here, f"case {case}, {backend}"
        ties_met += chosen.ties > 1
        partial_ties += chosen.ties > 1 and int((mask & (score == threshold)).sum()) < chosen.ties
    assert ties_met > 20
    assert partial_ties > 12


def _check_backends_agree_when_large(rank, groups):
    generator = torch.Generator().manual_seed(7 + rank)
    score = (
        torch.randn(30_000 + 10_000 * rank, generator=generator).half().float()
    )  # half precision makes thousands of ties
    eligible = torch.rand(score.shape, generator=generator) > 0.1
    token_id = torch.arange(score.numel()) * WORLD + rank  # ids of different ranks interleave
    gather, radix = (
        select_top(score, eligible, 0.6, token_id=token_id, group=groups["all"], backend=backend)
        for backend in ("gather", "radix")
    )
    assert torch.equal(gather.mask, radix.mask)
    assert (gather.threshold, gather.kept, gather.eligible, gather.ties) == (
        radix.threshold,
        radix.kept,
        radix.eligible,
        radix.ties,
    )
    kept = gather.mask.sum()
    dist.all_reduce(kept, group=groups["all"])
    assert int(kept) == gather.kept == math.ceil(0.6 * gather.eligible - 1e-9)
    assert gather.ties > 10


def _check_auto_when_only_some_ranks_fit_the_first_message(rank, groups):
    for sizes in (
        [100, 9000, 30_000, 0],
        [5, 6, 7, 300_000],
        [8192, 8192, 8192, 8192],
        [8193, 0, 0, 0],
    ):
        score = torch.randn(sizes[rank], generator=torch.Generator().manual_seed(rank))
        facts = [
            select_top(score, torch.ones_like(score), 0.6, group=groups["all"], backend=backend)
            for backend in ("auto", "radix")
        ]
        assert torch.equal(facts[0].mask, facts[1].mask), f"sizes {sizes}"
        assert facts[0].threshold == facts[1].threshold
        assert facts[0].eligible == facts[1].eligible == sum(sizes)


def _check_repeated_ids_fail_everywhere(rank, groups):
    with pytest.raises(ValueError, match="tensor parallel group"):
        select_top(
            torch.zeros(4), torch.ones(4), 0.5, token_id=torch.arange(4), group=groups["all"]
        )


SEQUENCES = 8
LENGTH = 12


def _global_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, LENGTH)
    loss = (torch.rand(shape, generator=generator) * 6).mul(4).round() / 4  # quarters: many ties
    noise = torch.randn(shape, generator=generator).mul(2).round() / 2
    reference = torch.where(
        torch.rand(shape, generator=generator) < 0.05, math.nan, (loss - noise).clamp(min=0.0)
    )
    columns = {
        "loss": loss,
        "entropy": torch.rand(shape, generator=generator) * 3,
        "reference_loss": reference,
        "reference_entropy": torch.rand(shape, generator=generator).mul(8).round() / 8,
        "mask": (torch.rand(shape, generator=generator) > 0.5).float(),
        "token_id": torch.arange(SEQUENCES * LENGTH).view(shape),
    }
    return columns, torch.rand(shape, generator=generator) > 0.15


def _zigzag(cp_rank, cp_size):
    """Columns of a row on one context parallel rank: one chunk from the front, one from the back,
    as megatron-core deals them.
    """
    chunks = torch.arange(LENGTH).chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def _layouts(rank, groups):
    """(name, rows of each micro-batch on this rank, columns of a row, group, cp_group) of ranks
    that take part.
    """
    everything = torch.arange(LENGTH)
    if rank == 0:
        yield "dp1_mbs4", [[0, 1, 2, 3], [4, 5, 6, 7]], everything, None, None
    if rank < 2:
        yield (
            "dp2_mbs2",
            [[2 * rank, 2 * rank + 1], [4 + 2 * rank, 5 + 2 * rank]],
            everything,
            groups["first_two"],
            None,
        )
    yield "dp4_mbs1", [[rank], [4 + rank]], everything, groups["all"], None
    dp_rank = rank // 2
    cp_rank = rank % 2
    rows = [[2 * dp_rank, 2 * dp_rank + 1], [4 + 2 * dp_rank, 5 + 2 * dp_rank]]
    yield "dp2_cp2", rows, _zigzag(cp_rank, 2), groups["all"], groups["pairs"]


def _piece(columns, eligible, rows, places):
    cut = lambda tensor: tensor[rows][:, places].contiguous()  # noqa: E731
    return {name: cut(tensor) for name, tensor in columns.items()}, cut(eligible)


def _assert_piece(selection, expected, rows, places, where):
    assert torch.equal(selection.mask, expected[rows][:, places]), (
        f"{where}: the choice differs from one process"
    )
    if selection.tokens_here is not None:
        assert selection.tokens_here == int(selection.mask.sum()), f"{where}: wrong count"


def _check_scopes_under_layouts(rank, groups):
    """Every scope equals the brute-force choice over the population it names, in every layout."""
    columns, eligible = _global_batch()
    score = columns["loss"] - columns["reference_loss"]
    ids = columns["token_id"]
    whole, *_ = expected_mask(score, eligible, 0.6, ids)
    by_row = torch.cat(
        [expected_mask(score[[b]], eligible[[b]], 0.6, ids[[b]])[0] for b in range(SEQUENCES)]
    )
    for name, micro_batches, places, group, cp_group in _layouts(rank, groups):
        common = {"group": group, "cp_group": cp_group}
        step = list(chain(*micro_batches))
        piece, mine = _piece(columns, eligible, step, places)
        population = Population("global_batch", piece["token_id"], **common)
        chosen = population.top(piece["loss"] - piece["reference_loss"], mine, 0.6)
        _assert_piece(chosen, whole, step, places, f"global_batch {name}")
        for i, rows in enumerate(micro_batches):
            piece, mine = _piece(columns, eligible, rows, places)
            piece_score = piece["loss"] - piece["reference_loss"]
            population = Population("sequence", piece["token_id"], **common)
            chosen = population.top(piece_score, mine, 0.6)
            _assert_piece(chosen, by_row, rows, places, f"sequence {name}")
            current = slice(
                4 * i, 4 * i + 4
            )  # in every layout here micro-batch i is made of these sequences
            expected = torch.zeros_like(whole)
            expected[current] = expected_mask(score[current], eligible[current], 0.6, ids[current])[
                0
            ]
            population = Population("data_parallel", piece["token_id"], **common)
            chosen = population.top(piece_score, mine, 0.6)
            _assert_piece(chosen, expected, rows, places, f"data_parallel {name}")
            expected = torch.zeros_like(whole)
            expected[rows] = expected_mask(score[rows], eligible[rows], 0.6, ids[rows])[0]
            population = Population("micro_batch", piece["token_id"], **common)
            chosen = population.top(piece_score, mine, 0.6)
            _assert_piece(chosen, expected, rows, places, f"micro_batch {name}")


SCORERS_UNDER_TEST = [
    ("none", {}),
    ("excess_loss", {}),
    ("random", {"seed": 3}),
    ("own_entropy", {}),
    ("reference_loss", {}),
    ("reverse", {"of": "own_loss"}),
    ("stored_mask", {"column": "mask"}),
    ("entropy_weight", {"gamma": 0.5}),
    ("intersection", {}),
    ("union", {}),
    ("band", {"skip_fraction": 0.2}),
    ("weighted_sum", {"of": {"excess_loss": 1.0, "own_entropy": -0.5}}),
    ("rho_loss", {}),
    ("mixed_with_clm", {"clm_weight": 0.25}),
]


def _check_scorers_under_layouts(rank, groups):
    """Every scorer chooses, and weighs, the same tokens of the global batch in every layout;
    `sequence` too where it may.
    """
    columns, eligible = _global_batch(seed=1)
    progress = TrainingProgress(step=5, tokens=1000)
    for name, options in SCORERS_UNDER_TEST:
        scorer = build_scorer(name, **options)
        for scope in ("global_batch", "sequence"):
            if name == "rho_loss" and scope == "sequence":
                continue
            alone = scorer.choose(
                columns, eligible, 0.6, Population(scope, columns["token_id"]), progress
            )
            for layout, micro_batches, places, group, cp_group in _layouts(rank, groups):
                step = list(chain(*micro_batches))
                piece, mine = _piece(columns, eligible, step, places)
                chosen = scorer.choose(
                    piece,
                    mine,
                    0.6,
                    Population(scope, piece["token_id"], group, cp_group),
                    progress,
                )
                _assert_piece(chosen, alone.mask, step, places, f"{name}, {scope}, {layout}")
                if scope == "global_batch":
                    assert (chosen.kept, chosen.eligible) == (alone.kept, alone.eligible)
                    expected_weights = alone.weights[step][:, places]
                    assert torch.equal(chosen.weights, expected_weights), (
                        f"{name}, {layout}: other weights"
                    )


def _check_running_threshold(rank, groups):
    """No rank waits for another while choosing; at the end of a step all ranks have the same exact
    threshold.
    """
    running = RunningThreshold(smoothing=0.0)
    deviations = []
    for step in range(3):
        columns, eligible = _global_batch(seed=10 + step)
        score = columns["loss"] - columns["reference_loss"]
        for rows in ([rank], [4 + rank]):
            population = Population(
                "running_threshold", columns["token_id"][rows], group=groups["all"], running=running
            )
            before = running.threshold
            chosen = population.top(score[rows], eligible[rows], 0.6)
            if step:
                assert torch.equal(chosen.mask, eligible[rows] & (score[rows] >= before))
        measured = running.finish_step(0.6, groups["all"])
        assert running.threshold == expected_mask(score, eligible, 0.6)[1]
        deviations.append(measured["selection/missed_fraction"])
    restored = RunningThreshold()
    restored.load_state_dict(running.state_dict())
    assert restored.threshold == running.threshold
    assert all(int(total) > 0 for _, total in deviations)


def test_point_05_exact_k_over_ranks_ragged_and_empty():
    _spawn(
        _check_random_populations,
        _check_backends_agree_when_large,
        _check_auto_when_only_some_ranks_fit_the_first_message,
        _check_repeated_ids_fail_everywhere,
    )


def test_point_08_and_09_scopes_and_scorers_do_not_depend_on_the_layout():
    _spawn(_check_scopes_under_layouts, _check_scorers_under_layouts, _check_running_threshold)
