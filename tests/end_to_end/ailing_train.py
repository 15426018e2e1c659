"""megatron_slm.train with gradients that are NaN on rank 1 in some steps, as a bad kernel or a bad
number would make them.

SLM_TEST_NAN_EVERY=N    in every N-th step, in every start alike
SLM_TEST_NAN_FROM=STEP  in every step from STEP on, in this start alone
"""

import os
import sys

from megatron_slm import train


class AilingSteps:
    """The steps whose gradients are NaN, as a set is asked: `step in steps`."""

    def __init__(self, every: int, begin: int | None):
        self.every = every
        self.begin = begin

    def __contains__(self, step: int) -> bool:
        return step % self.every == 0 or (self.begin is not None and step >= self.begin)


def main() -> int:
    from megatron_slm.device import choose_device

    choose_device("cpu")  # before megatron-core is imported
    from megatron_slm.training import loop
    from tests.distributed.test_training_faults import poison

    begin = os.environ.get("SLM_TEST_NAN_FROM")
    steps = AilingSteps(int(os.environ["SLM_TEST_NAN_EVERY"]), int(begin) if begin else None)
    start = loop.TrainingRun.start

    def start_ailing(run):
        started = start(run)
        poison(run, steps, rank=1)
        return started

    loop.TrainingRun.start = start_ailing
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
