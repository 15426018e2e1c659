"""Settings of all tests, and which of them may run beside each other."""

import pytest
from hypothesis import HealthCheck, settings

# Properties have no time limit per example: a busy machine is no counter-example.
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("house")

OF_SEVERAL_PROCESSES = ("tests/distributed/", "tests/end_to_end/", "tests/slurm/", "tests/gpu/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n N --dist loadfile`: one file after the other in each worker, and all tests that
    start several processes in one worker, so that they never wait for each other's.

    The largest of these units is handed out first, which is those tests.
    """
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneDistributedTestAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(OF_SEVERAL_PROCESSES):
                return "several processes"
            return super()._split_scope(nodeid)

    return OneDistributedTestAtATime(config, log)
