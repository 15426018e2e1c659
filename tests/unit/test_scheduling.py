"""Tests of several processes wait for each other, all others run file by file."""

from xdist.scheduler import LoadFileScheduling

from tests.scheduling import OneDistributedTestAtATime, unit_of_work


def test_all_tests_of_several_processes_are_one_unit():
    layouts = unit_of_work("tests/distributed/test_layouts.py::test_layout[dp2]")
    assert layouts == unit_of_work("tests/end_to_end/test_kills.py::test_kill")
    assert layouts == unit_of_work("tests/slurm/test_train_job.py::test_stop")


def test_other_files_are_units_of_their_own():
    one = "tests/unit/data/test_indexed.py"
    other = "tests/test_architecture.py"
    assert unit_of_work(f"{one}::test_a") == unit_of_work(f"{one}::test_b[x::y]") == one
    assert unit_of_work(f"{other}::test_a") == other


def test_the_scheduler_of_the_run_asks_for_these_units():
    """It overrides what xdist calls for each test; under another name nothing would call it."""
    assert LoadFileScheduling._split_scope(None, "a.py::b") == "a.py"
    assert "_split_scope" in vars(OneDistributedTestAtATime)
