"""Which tests may run beside each other when pytest-xdist hands them out to several workers."""

from xdist.scheduler import LoadFileScheduling

OF_SEVERAL_PROCESSES = ("tests/distributed/", "tests/end_to_end/", "tests/slurm/", "tests/gpu/")
"""A test of these folders needs all cores for itself, and may wait for processes with a limit."""


def unit_of_work(nodeid: str) -> str:
    """Tests with the same answer run in one worker, one after the other."""
    if nodeid.startswith(OF_SEVERAL_PROCESSES):
        return "tests of several processes"
    return nodeid.split("::", 1)[0]


class OneDistributedTestAtATime(LoadFileScheduling):
    """Files beside each other, but all tests of several processes in one worker.

    xdist hands out the unit with the most tests first, which is theirs and takes longest; the other
    workers do all the rest meanwhile.
    """

    def _split_scope(self, nodeid: str) -> str:
        return unit_of_work(nodeid)
