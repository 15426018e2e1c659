"""Which populations there are, and how large they are; no torch.

The scopes are described and carried out in scope.py.
"""

SCOPES = ("sequence", "micro_batch", "data_parallel", "global_batch", "running_threshold")
"""The sets of tokens that can compete in one choice."""
GATHER_MAX_TOKENS_ACCELERATOR = 4_194_304
"""Up to this population an accelerator gathers all scores; above, three all-reduces of counts.

By the cost model of benchmarks/selection.py: the links of accelerators are faster than a CPU's, and
the latency of a collective weighs more.
"""


def population_sequences(
    scope: str, *, micro_batch_size: int, data_parallel_size: int, global_batch_size: int
) -> int:
    """Whole sequences whose tokens compete in one choice.

    A running threshold is compared with the past, but is meant to keep the share of a global batch.
    """
    return {
        "sequence": 1,
        "micro_batch": micro_batch_size,
        "data_parallel": micro_batch_size * data_parallel_size,
        "global_batch": global_batch_size,
        "running_threshold": global_batch_size,
    }[scope]
