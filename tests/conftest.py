"""Settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings

# Properties have no time limit per example: a busy machine is no counter-example.
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("house")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n N --dist loadfile`, as tests/run.sh asks for."""
    if config.option.dist != "loadfile":
        return None
    from tests.scheduling import TwoLanesOfSeveralProcesses

    return TwoLanesOfSeveralProcesses(config, log)
