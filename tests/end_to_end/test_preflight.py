"""--preflight as a user starts it: one page, an exit code, and nothing trained."""

from tests.end_to_end.small_run import command, run_to_end


def test_a_job_is_looked_at_and_not_started(corpus, tmp_path):
    run = tmp_path / "run"
    said = run_to_end([*command(corpus, run), "--preflight"])
    assert "this job can start" in said
    for check in ("disk", "versions", "devices", "clocks", "memory", "group dp"):
        assert check in said
    assert [path.name for path in run.iterdir()] == ["preflight.txt"]


def test_a_job_that_cannot_run_is_refused_before_it_starts(corpus, tmp_path):
    run = tmp_path / "run"
    large = ("--model.layers", "1000", "--model.hidden_size", "65536")
    said = run_to_end(command(corpus, run, *large, processes=1), exit_code=2)
    assert "one checkpoint takes" in said
    assert "keep fewer checkpoints" in said
    assert "Traceback" not in said
