"""Which communication of data parallelism runs while a rank computes."""

from typing import NamedTuple

from megatron_slm.config.schema import Config


class Overlap(NamedTuple):
    """The two settings with auto decided."""

    grad_reduce: bool
    """Gradients are reduced while backward still runs."""
    param_gather: bool
    """Updated weights are gathered while the next forward runs."""


def decide_overlap(config: Config, *, on_gpu: bool, ranks: int) -> Overlap:
    """What parallel.overlap_grad_reduce and parallel.overlap_param_gather mean in this job.

    ranks: data parallel x context parallel, the ranks that add up their gradients. auto is on where
    it saves time: on GPUs, whose collectives run beside their products, with several such ranks.
    Neither changes what is computed: the same numbers are added (more than two of them in an order
    that depends on the size of the buckets) and the same weights arrive before they are used.
    """
    parallel = config.parallel
    hidden = on_gpu and ranks > 1
    gather = parallel.overlap_param_gather
    reduce = parallel.overlap_grad_reduce
    if reduce == "auto":
        reduce = hidden or gather is True
    if gather == "auto":
        gather = hidden and reduce and parallel.distributed_optimizer
    return Overlap(reduce, gather)
