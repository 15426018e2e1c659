"""Which tests may run beside each other when pytest-xdist hands them out to several workers."""

from xdist.scheduler import LoadFileScheduling

LANES = {
    "tests/distributed/": "layouts",
    "tests/gpu/": "layouts",
    "tests/end_to_end/": "programs",
    "tests/slurm/": "programs",
}
"""Folders of tests that start several processes -> which of them run one after the other.

The processes of a layout wait for each other most of the time, and so do a launched job and a SLURM
cluster; one of each at a time keeps two cores busy. Two clusters, or two tables of layouts, would
wait for memory and for their own time limits.
"""


def unit_of_work(nodeid: str) -> str:
    """Tests with the same answer run in one worker, one after the other."""
    for folder, lane in LANES.items():
        if nodeid.startswith(folder):
            return lane
    return nodeid.split("::", 1)[0]


class TwoLanesOfSeveralProcesses(LoadFileScheduling):
    """Files beside each other, but the tests of several processes in two lanes.

    xdist hands out the unit with the most tests first, so the lanes, which take longest, start at
    once; workers that are free do all the rest meanwhile.
    """

    def _split_scope(self, nodeid: str) -> str:
        return unit_of_work(nodeid)
