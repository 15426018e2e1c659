"""Property-based: every scope, over ranks, against the brute-force choice of the population that
the scope names.

hypothesis runs inside every rank. Derandomised and without a database all ranks draw the same
examples; after each they tell each other whether it held, so that a failure is met, and shrunk, by
all of them in step.
"""

import tempfile
from itertools import chain, starmap

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_slm.selection import Population, RunningThreshold, select_top
from megatron_slm.testing.selection_oracle import awkward_scores, expected_mask
from megatron_slm.testing.spawn import run_processes

WORLD = 4
# layout -> sizes of the data and context parallel groups; ranks are dp_rank * cp + cp_rank
LAYOUTS = {"dp4": (4, 1), "dp2_cp2": (2, 2), "cp4": (1, 4)}
FRACTIONS = st.one_of(st.sampled_from([1.0, 0.7, 0.6, 0.5, 1e-6]), st.floats(1e-6, 1.0))


@st.composite
def steps(draw):
    """An optimizer step: (layout, rows of every data-parallel rank's micro-batches, scores,
    eligibility, ids) with ties and broken values.
    """
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    dp, cp = LAYOUTS[layout]
    micro_batches = draw(st.integers(1, 2))
    sequences = draw(st.integers(1, 3))
    length = 2 * cp * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = dp * micro_batches * sequences
    score = awkward_scores(generator, rows * length).view(rows, length)
    eligible = torch.rand(rows, length, generator=generator) < draw(
        st.sampled_from([0.0, 0.3, 0.9, 1.0])
    )
    for row in range(rows):
        if draw(st.integers(0, 4)) == 0:  # a padded sequence: with few rows, an empty rank
            eligible[row] = False
    token_id = (
        torch.arange(rows * length).view(rows, length)
        if draw(st.booleans())
        else torch.randperm(rows * length, generator=generator).view(rows, length)
    )
    # micro-batch i of data-parallel rank r, as the loader deals them: consecutive rows of the
    # global batch
    rows_in_order = torch.arange(micro_batches * dp * sequences)
    dealt = rows_in_order.view(micro_batches, dp, sequences).tolist()
    return layout, dealt, score, eligible, token_id


def zigzag(length, cp_rank, cp):
    chunks = torch.arange(length).chunk(2 * cp)
    return torch.cat([chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]])


def brute_force(populations, score, eligible, keep_fraction, token_id):
    mask = torch.zeros_like(eligible)
    for rows in populations:
        mask[rows] = expected_mask(score[rows], eligible[rows], keep_fraction, token_id[rows])[0]
    return mask


def check_step(rank, groups, step, keep_fraction):
    layout, dealt, score, eligible, token_id = step
    _, cp = LAYOUTS[layout]
    dp_rank, cp_rank = divmod(rank, cp)
    places = zigzag(score.shape[1], cp_rank, cp)
    group = groups["all"]
    cp_group = groups[layout]
    mine = [ranks[dp_rank] for ranks in dealt]
    micro_batches = list(chain(*dealt))
    everything = sorted(chain(*micro_batches))
    scopes = {
        "sequence": [[row] for row in everything],
        "micro_batch": micro_batches,
        "data_parallel": list(map(list, starmap(chain, dealt))),
        "global_batch": [everything],
    }
    wrong = []

    def cut(rows):
        return score[rows][:, places], eligible[rows][:, places], token_id[rows][:, places]

    for scope, populations in scopes.items():
        expected = brute_force(populations, score, eligible, keep_fraction, token_id)
        for rows in [list(chain(*mine))] if scope == "global_batch" else mine:
            piece, able, ids = cut(rows)
            population = Population(scope, ids, group, cp_group, capacity=piece.numel())
            chosen = population.top(piece, able, keep_fraction)
            if not torch.equal(chosen.mask, expected[rows][:, places]):
                wrong.append(f"{scope} under {layout}: wrong choice on rank {rank}")
    piece, able, ids = cut(list(chain(*mine)))
    for backend in ("gather", "radix"):
        whole = select_top(piece, able, keep_fraction, token_id=ids, group=group, backend=backend)
        if not torch.equal(whole.mask, expected[list(chain(*mine))][:, places]):
            wrong.append(f"{backend} under {layout}: wrong choice on rank {rank}")
    return wrong + check_running(
        piece,
        able,
        ids,
        keep_fraction,
        group,
        expected_mask(score, eligible, keep_fraction, token_id),
        expected[list(chain(*mine))][:, places],
    )


def check_running(piece, able, ids, keep_fraction, group, truth, exact):
    """Its threshold after the step is the exact one, and the deviation it reports is what counting
    gives.
    """
    running = RunningThreshold(smoothing=0.0)
    running.threshold = 0.0
    chosen = running.choose(piece, able, keep_fraction, ids).mask
    measured = running.finish_step(keep_fraction, group)
    counted = [int((exact & ~chosen).sum()), int((chosen & ~exact).sum())]
    reported = [int(measured[f"selection/{name}_fraction"][0]) for name in ("missed", "extra")]
    threshold = truth[1] if truth[3] else 0.0
    known = able & piece.isfinite()
    right = (
        running.threshold == threshold
        and counted == reported
        and torch.equal(chosen, known & (piece >= 0.0))
    )
    if right:
        return []
    return [
        f"running_threshold: {running.threshold} for {threshold}, "
        f"deviation {reported} for {counted}"
    ]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD
    )
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    groups = {
        "all": dist.new_group(range(WORLD)),
        "dp4": None,
        "dp2_cp2": pairs[rank // 2],
        "cp4": dist.new_group(range(WORLD)),
    }
    seen = set()

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(steps(), FRACTIONS)
    def holds_on_every_rank(step, keep_fraction):
        wrong = [None] * WORLD
        dist.all_gather_object(wrong, check_step(rank, groups, step, keep_fraction))
        seen.add(step[0])
        assert not any(wrong), list(chain(*wrong))

    holds_on_every_rank()
    assert seen == set(LAYOUTS), "or the examples no longer cover every layout"
    dist.barrier()
    dist.destroy_process_group()


def test_point_05_every_scope_is_the_brute_force_choice_in_every_layout():
    with tempfile.TemporaryDirectory() as folder:
        run_processes(worker, (folder,), WORLD)
