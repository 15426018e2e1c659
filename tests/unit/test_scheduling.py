"""Tests of several processes run in two lanes, all others file by file."""

from xdist.scheduler import LoadFileScheduling

from tests.scheduling import TwoLanesOfSeveralProcesses, unit_of_work


def test_tests_of_several_processes_are_two_units():
    layouts = unit_of_work("tests/distributed/test_layouts.py::test_layout[dp2]")
    assert layouts == unit_of_work("tests/distributed/test_experts.py::test_layout[ep2]")
    programs = unit_of_work("tests/end_to_end/test_kills.py::test_kill")
    assert programs == unit_of_work("tests/slurm/test_train_job.py::test_stop")
    assert layouts != programs


def test_other_files_are_units_of_their_own():
    one = "tests/unit/data/test_indexed.py"
    other = "tests/test_architecture.py"
    assert unit_of_work(f"{one}::test_a") == unit_of_work(f"{one}::test_b[x::y]") == one
    assert unit_of_work(f"{other}::test_a") == other


def test_the_scheduler_of_the_run_asks_for_these_units():
    """It overrides what xdist calls for each test; under another name nothing would call it."""
    assert LoadFileScheduling._split_scope(None, "a.py::b") == "a.py"
    assert "_split_scope" in vars(TwoLanesOfSeveralProcesses)
