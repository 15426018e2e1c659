"""A killed run continues, and ends in the files that an undisturbed run writes.

`SLM_KILLS=50` in the environment sets how often it is killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.preprocess import main
from data_tools.writing.writer import CorpusWriter
from megatron_slm.data.manifest import check_corpus

ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("SLM_KILLS", "2"))
OUTPUTS = (".bin", ".idx", ".manifest.json", ".statistics.json", ".rejects.jsonl")


@pytest.fixture
def inputs(tmp_path):
    lines = [
        json.dumps({"text": f"document {n} of many words " + "and more " * (n % 50)})
        for n in range(600)
    ]
    lines[100:100] = [
        "broken",
        "{}",
        json.dumps({"text": "document 7 of many words " + "and more " * 7}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number:03}.txt").write_text(f"text {number}\n" * 50)
    import gzip

    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:300]).encode()))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "texts"), str(tmp_path / "b.jsonl.gz")]


def command(inputs, vocabulary, prefix, *more):
    return [
        "--input",
        *inputs,
        "--tokenizer",
        str(vocabulary),
        "--output-prefix",
        str(prefix),
        "--save-every-seconds",
        "0",
        "--drop-duplicates",
        "--skip-complete",
        *map(str, more),
    ]


def outputs(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in OUTPUTS]


def small_blocks(monkeypatch, size=3000):
    monkeypatch.setattr("data_tools.reading.inputs.plan_units.__defaults__", (size,))
    monkeypatch.setattr(
        "data_tools.reading.streams.blocks_of_units.__kwdefaults__", {"block_bytes": size}
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_stopped_after_every_block(tmp_path, vocabulary, inputs, monkeypatch, workers):
    """The run dies after each single block, without closing anything properly, until it is done."""
    small_blocks(monkeypatch, 16_000)
    assert main(command(inputs, vocabulary, tmp_path / "whole", "--workers", "1")) == 0
    blocks = 0
    while True:
        with monkeypatch.context() as patch:
            saves = []

            def save_and_die(self, state, real=CorpusWriter.save, saves=saves):
                real(self, state)
                if state == self.state:
                    return  # nothing was left to do: the last save before publishing
                saves.append(state)
                if len(saves) == (1 if workers == "1" else 3):
                    for (
                        stream
                    ) in self._streams.values():  # what a kill leaves: bytes after the last save
                        stream.write(b"half a block")
                        stream.flush()
                    raise KeyboardInterrupt

            patch.setattr(CorpusWriter, "save", save_and_die)
            code = main(command(inputs, vocabulary, tmp_path / "stopped", "--workers", workers))
        if code == 0:
            break
        assert code == 130
        blocks += 1
    assert blocks > (10 if workers == "1" else 1)
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")
    assert not (tmp_path / "stopped.partial").exists()


@pytest.mark.parametrize("fail_at", range(4))
def test_killed_while_files_are_moved_out(tmp_path, vocabulary, inputs, monkeypatch, fail_at):
    assert main(command(inputs, vocabulary, tmp_path / "whole", "--workers", "1")) == 0
    calls = []
    with monkeypatch.context() as patch:

        def replace(source, target, real=os.replace):
            if "/stopped" in str(target) and ".partial" not in str(target):
                calls.append(target)
                if len(calls) > fail_at:
                    raise KeyboardInterrupt
            real(source, target)

        patch.setattr("data_tools.writing.writer.os.replace", replace)
        assert main(command(inputs, vocabulary, tmp_path / "stopped", "--workers", "1")) == 130
    assert not (tmp_path / "stopped.manifest.json").exists()
    assert main(command(inputs, vocabulary, tmp_path / "stopped", "--workers", "1")) == 0
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")


def test_random_kills(tmp_path, vocabulary, inputs):
    """SIGKILL to the parent alone, at random moments.

    The workers must end too, and the result must not change.
    """
    launch = (
        "import sys, data_tools.reading.inputs, data_tools.reading.streams\n"
        "data_tools.reading.inputs.plan_units.__defaults__ = (3000,)\n"
        "data_tools.reading.streams.blocks_of_units.__kwdefaults__ = {'block_bytes': 3000}\n"
        "from data_tools.preprocess import main\n"
        "if __name__ == '__main__': sys.exit(main(sys.argv[1:]))\n"
    )
    script = tmp_path / "launch.py"
    script.write_text(launch)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(prefix):
        arguments = command(inputs, vocabulary, prefix, "--workers", "2")
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    began = time.monotonic()
    process = start(tmp_path / "whole")
    assert process.wait() == 0, process.stderr.read()
    seconds = time.monotonic() - began
    generator = random.Random(11)
    kills = 0
    while True:
        process = start(tmp_path / "killed")
        try:
            # half the kills right after the start, the others anywhere in the run
            process.wait(
                timeout=seconds
                * generator.choice([generator.uniform(0.2, 0.6), generator.uniform(0.3, 1.0)])
            )
        except subprocess.TimeoutExpired:
            if kills < KILLS:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                continue
        code = process.wait()
        assert code == 0, process.stderr.read()
        assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
        if kills >= KILLS:
            break
        for path in tmp_path.glob(
            "killed.*"
        ):  # finished before enough kills: once more from the start
            path.unlink()
    check_corpus(tmp_path / "killed")


def test_other_options_do_not_continue(tmp_path, vocabulary, inputs, capsys):
    (tmp_path / "bad.jsonl").write_text("broken\n" * 10 + json.dumps({"text": "good"}))
    first = [
        "--input",
        str(tmp_path / "bad.jsonl"),
        "--tokenizer",
        str(vocabulary),
        "--output-prefix",
        str(tmp_path / "c"),
        "--workers",
        "1",
    ]
    assert main(first) == 3
    assert main([*first, "--no-append-eod"]) == 2
    assert "append_eod" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("changed\n" * 10 + json.dumps({"text": "good"}))
    assert main([*first, "--max-bad-fraction", "1"]) == 3
    assert main([*first, "--max-bad-fraction", "1", "--restart"]) == 0


def test_two_runs_at_once(tmp_path, vocabulary, inputs, capsys):
    import numpy as np

    with CorpusWriter(str(tmp_path / "c"), np.dtype(np.uint16), {}):
        assert main(command(inputs, vocabulary, tmp_path / "c", "--workers", "1")) == 2
    assert "another run" in capsys.readouterr().err
