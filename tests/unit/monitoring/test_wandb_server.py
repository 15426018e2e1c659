"""A W&B server that refuses, hangs or goes away, on 127.0.0.1; what a kill leaves."""

import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from megatron_slm.config.monitoring_settings import WandbConfig
from megatron_slm.monitoring import WandbSink, wandb_sink

LINES = 30


@pytest.fixture(autouse=True)
def own_wandb(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))


def open_sink(folder: Path, warn, mode: str = "online") -> WandbSink:
    return WandbSink(
        WandbConfig(mode=mode), run_folder=folder, name="arm", config={}, run_id="abc", warn=warn
    )


def logged_tokens(folder: Path) -> list[int]:
    """tokens/processed of every record in the run's local file, which is a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/*run-*/*.wandb")
    content, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, part = struct.unpack("<IHB", content[at : at + 7])
        continued = part in (3, 4)
        whole = (whole if continued else b"") + content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found += [
                int(item.value_json)
                for item in record.history.item
                if "tokens/processed" in (item.key, *item.nested_key)
            ]
    return found


def log_lines(sink: WandbSink) -> list[int]:
    for step in range(LINES):
        sink.log({"tokens/processed": step, "loss/all": 2.0}, step)
    return list(range(LINES))


@pytest.mark.parametrize("accepts", [False, True], ids=["refuses", "never answers"])
def test_a_run_without_a_server_is_written_offline_and_whole(accepts, tmp_path, monkeypatch, capfd):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if accepts:
            server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(sys, "argv", ["train", "--x", "http://me:pa55word@proxy"])
        warnings = []
        sink = open_sink(tmp_path, warnings.append)
        logged = log_lines(sink)
        sink.close()
    assert logged_tokens(tmp_path) == logged
    (warning,) = warnings
    assert ("no answer within 3 s" if accepts else "refused") in warning
    assert "written offline" in warning
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"http://***@proxy" in written
    assert b"pa55word" not in written
    assert b"k" * 40 not in written
    output = capfd.readouterr()
    assert "wandb" not in output.out + output.err


class Answers(http.server.BaseHTTPRequestHandler):
    """As much of a W&B server as a run needs, until `server.hangs`."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        question = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.hangs.is_set():
            self.server.end.wait()
            return
        run = {"id": "x", "name": "abc", "displayName": "arm", "config": "{}"}
        run["project"] = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        asked = json.loads(question).get("operationName")
        data = (
            {"upsertBucket": {"bucket": run, "inserted": True}} if asked == "UpsertBucket" else {}
        )
        self.answer({"data": data})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_server_that_goes_away_delays_no_step_and_loses_nothing(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    server.hangs, server.end = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(wandb_sink, "_FINISH_SECONDS", 1)
    warnings = []
    sink = open_sink(tmp_path, warnings.append)
    assert sink.mode == "online", warnings
    server.hangs.set()
    logged = log_lines(sink)
    sink.close()
    server.end.set()
    server.shutdown()
    server.server_close()
    assert logged_tokens(tmp_path) == logged
    (warning,) = warnings
    assert "not taken everything" in warning
    assert "wandb sync" in warning


ROOT = Path(__file__).parents[3]
KILLED = """
import os, sys, time
from pathlib import Path
from tests.unit.monitoring.test_wandb_server import log_lines, open_sink
sink = open_sink(Path(sys.argv[1]), print, "offline")
log_lines(sink)
time.sleep(2.5)
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_leaves_no_temporary_files_and_its_data(tmp_path):
    with tempfile.TemporaryDirectory(prefix="slm-") as temporary:  # tmp_path: too long for sockets
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, tmp_path],
            env={**os.environ, "TMPDIR": temporary},
            cwd=ROOT,
        )
        assert killed.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while os.listdir(temporary) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert os.listdir(temporary) == []
    assert logged_tokens(tmp_path) == list(range(LINES))
