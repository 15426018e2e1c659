"""The one command for a GPU: what it keeps when a program dies or the time ends, what it continues,
and that its machinery runs on a CPU.
"""

import json
import time

import pytest

from benchmarks import gpu, head, selected_set, step, topk
from benchmarks.gpu_parts import Part, gpu_parts, read_junit, rows_of
from benchmarks.gpu_report import Report, markdown

# Stands in for a measuring program: one JSON line per case; `dies` ends it, `hangs` never ends.
PROGRAM = """
import json, sys, time
print("a library says something")
for case in sys.argv[1].split(","):
    if case == "dies":
        raise SystemExit("out of memory on purpose")
    if case == "hangs":
        time.sleep(600)
    print(json.dumps({"case": case, "value": 1}), flush=True)
"""


def part(*cases: str) -> Part:
    return Part("fake", cases, lambda chosen: ["-c", PROGRAM, ",".join(chosen)], 1.0)


def in_a_minute() -> float:
    return time.monotonic() + 60


def test_a_program_that_dies_takes_one_case_with_it():
    found = part("first", "dies", "last")
    rows = list(rows_of(found, list(found.cases), in_a_minute()))
    assert [row["case"] for row in rows] == ["first", "dies", "last"]
    assert rows[1]["failed"] == "exit code 1: out of memory on purpose"


def test_what_was_measured_before_the_budget_ended_is_on_disk(tmp_path, capsys):
    report = Report.start(tmp_path / "gpu.json", smoke=True)
    code = gpu._measure([part("first", "hangs", "never")], report, time.monotonic() + 3)
    assert code == 3
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["rows"] == {"fake": {"first": {"case": "first", "value": 1}}}
    assert "the budget ended before: fake hangs, fake never" in capsys.readouterr().err


def test_a_resumed_run_measures_what_is_left_and_what_failed(tmp_path):
    first = Report.start(tmp_path / "gpu.json", smoke=True)
    assert gpu._measure([part("first", "dies")], first, in_a_minute()) == 1
    again = Report.start(tmp_path / "gpu.json", smoke=True)
    assert again.continues(json.loads((tmp_path / "gpu.json").read_text())) == ""
    assert again.done("fake") == {"first"}


@pytest.mark.parametrize(
    "name, other", [("revision", "another"), ("gpu", "NVIDIA H100"), ("packages", {})]
)
def test_figures_of_another_setting_are_not_continued(tmp_path, name, other):
    report = Report.start(tmp_path / "gpu.json", smoke=True)
    earlier = json.loads(json.dumps(report.content))
    earlier["setting"][name] = other
    assert report.continues(earlier).startswith(f"{name} was {other!r} there")


def test_an_existing_file_is_only_continued(tmp_path, capsys):
    output = tmp_path / "gpu.json"
    output.write_text("{}")
    assert gpu.main(["--smoke", "--output", str(output)]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert output.read_text() == "{}"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--parts", "steps"], "--parts: got 'steps'"),
        ([], "--output: missing"),
        (["--output", "x.json", "--budget-minutes", "0"], "--budget-minutes: got 0.0"),
    ],
)
def test_wrong_usage_is_named(options, said, capsys):
    assert gpu.main(options) == 2
    assert said in capsys.readouterr().err


def test_a_dry_run_shows_every_gpu_case_and_test_file(capsys):
    assert gpu.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    programs = (head, step, topk, selected_set)
    cases = [name for program in programs for name in program.CASES if name[0] == "G"]
    assert all(name in printed for name in cases)
    assert "test_step_gpu.py" in printed
    names = ["step", "head", "topk", "selected_set", "layer_passes", "train_loop", "tests"]
    assert [found.name for found in gpu_parts()] == names


def test_a_file_of_tests_is_one_row(tmp_path):
    (tmp_path / "report.xml").write_text(
        """<testsuites><testsuite><testcase name="good"/>
        <testcase name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>
        <testcase name="absent"><skipped message="no Transformer Engine"/></testcase>
        </testsuite></testsuites>"""
    )
    row = read_junit("test_x.py", tmp_path / "report.xml")
    assert row["passed"] == 1
    assert row["failed_tests"] == {"bad": ["assert 1 == 2"]}
    assert row["skip_reasons"] == ["no Transformer Engine"]
    assert row["missed"]


def test_the_table_names_machine_versions_and_every_case(tmp_path):
    report = Report.start(tmp_path / "gpu.json", smoke=False)
    report.add("step", {"ceilings": "H200", "product_tflops": 706.0, "copy_tb_s": 4.12})
    timed = {"ours_median_seconds": 0.2857, "peer_median_seconds": 0.2899, "measure": "time"}
    report.add("step", {"case": "G6", **timed, "ratio": 0.9855, "gate": 0.97, "missed": False})
    share = {"share": 0.392, "tokens_per_second": 57347, "floor": 0.48, "gate": None}
    report.add("step", {"case": "G8", **timed, "ratio": 0.9855, **share, "missed": True})
    report.add("head", {"case": "G1-liger", "skipped": "peer liger needs a package"})
    shares = {"ours_differs_fraction": 0.00012, "peer_differs_fraction": 0.0123, "gate": 0.001}
    pair = {"models": "two models", "tokens": 65536, "measure": "accuracy", "missed": False}
    report.add("selected_set", {"case": "G11", **shares, **pair})
    text = markdown(report.content)
    assert "706.0 TFLOP/s" in text
    assert report.content["setting"]["packages"]["torch"] in text
    assert "| G6 | 285.7 ms | 289.9 ms | 0.986 | 0.97 | met |" in text
    assert "0.392 of the ceiling (57,347 tokens/s) | at least 0.48 | missed |" in text
    said = "0.012% of the set | 1.230% of the set | – | 0.1% | met; 65,536 tokens, two models |"
    assert f"| G11 | {said}" in text
    assert "| G1-liger | – | – | – | – | skipped: peer liger needs a package |" in text
    assert (tmp_path / "gpu.md").read_text() == text


def test_the_machinery_runs_on_a_cpu(tmp_path):
    output = tmp_path / "smoke.json"
    assert gpu.main(["--smoke", "--parts", "head,layer_passes", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows["head"]["C1"]["correct"]
    assert rows["head"]["C4"]["correct"]
    assert {name: row["correct"] for name, row in rows["layer_passes"].items()} == {
        "norm": True,
        "swiglu": True,
        "rotary": True,
    }
    assert "no figures" in output.with_suffix(".md").read_text()
