"""On a terminal of any width the progress line shows how far a run is and how long it will take."""

import io
import re

import pytest

from megatron_slm.monitoring import ConsoleSink
from megatron_slm.monitoring.progress_line import BAR, Part, fitting
from megatron_slm.scoring.progress import ProgressBar

RECORD = {
    "kind": "train",
    "loss/selected": 4.2310,
    "loss/all": 3.702,
    "loss/reference": 3.105,
    "selection/kept_fraction": 0.6,
    "optimizer/learning_rate": 2.71e-4,
    "optimizer/grad_norm": 0.812,
    "throughput/tokens_per_second": 11200.0,
    "throughput/eta_seconds": 2 * 86400 + 10800.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def last_line(width, monkeypatch, title="a-run-with-a-long-name-of-its-own"):
    """What stands on a terminal of this width after the log line of step 1200 of 5000."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = ConsoleSink(total_steps=5000, title=title, stream=stream)
    console.log(RECORD, 1200)
    console.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return re.split(r"[\r\n]+", plain.rstrip())[-1]


def test_the_start_table_of_a_narrow_terminal_cuts_no_path(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    path = "runs/" + "a-long-name/" * 8 + "[bold]/offline-run-5c002f02"
    console = ConsoleSink(total_steps=5, stream=stream)
    console.table("run", {"W&B": path})
    console.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert path in re.sub(r"\s+", "", plain)


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_step_total_time_left_and_bar_are_there_at_every_width(width, monkeypatch):
    line = last_line(width, monkeypatch)
    assert len(line) <= width
    assert "1200/5000" in line
    assert "2d 3:00:00 left" in line
    assert line.count("━") + line.count("╸") + line.count("╺") >= 5


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (200, ["a-run-with", "(all 3.702, reference 3.105)", "lr 2.71e-04", "|grad| 0.812"], []),
        (80, ["loss 4.2310", "kept 60%"], ["a-run-with", "reference", "lr", "|grad|"]),
        (60, ["loss 4.2310"], ["kept", "tokens/s"]),
        (40, [], ["loss"]),
    ],
)
def test_what_matters_less_goes_first(width, there, gone, monkeypatch):
    line = last_line(width, monkeypatch)
    assert [words for words in there if words not in line] == []
    assert [words for words in gone if words in line] == []


def test_scoring_keeps_its_place_and_time_left_on_a_narrow_terminal():
    progress = ProgressBar(123_456_789_000, 1, shown=False)
    line = progress._line(12_345_678_000.0, 120_000.0)
    assert [part.text for part in fitting(line, 40)] == ["12.3G/123G tokens", "10d 17:12:05 left"]
    assert BAR in fitting(line, 60)


def test_a_terminal_that_is_too_narrow_for_a_bar_still_has_the_step():
    parts = [Part(3, "loss 1.0"), BAR, Part(0, "12/500"), Part(1, "0:01:00 left")]
    assert [part.text for part in fitting(parts, 20)] == ["12/500", "0:01:00 left"]
    assert [part.text for part in fitting(parts, 12)] == ["12/500"]
    assert [part.text for part in fitting(parts, 3)] == ["12/500"]
