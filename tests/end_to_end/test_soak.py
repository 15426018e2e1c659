"""The soak of tests/soak.py in short: a few faults instead of hours of them."""

import pytest

from tests.soak import Soak, soak


@pytest.mark.slow
def test_a_short_soak_ends_as_the_run_left_alone(tmp_path, capsys):
    faults = ["SIGKILL to one rank", "a slow rank", "a stop signal to the launcher"]
    it = Soak(tmp_path / "soak", seconds=0, faults=faults, rounds=1)
    assert soak(it) == 0, capsys.readouterr().err
    assert sorted(row.fault for row in it.rows) == sorted(faults)
