"""A checkpoint that was written under one megatron-core is continued under the other, both ways.

The environment variable SLM_OTHER_CORE_PYTHON names the Python of an environment with the other
version; `bash tests/run.sh --core 0.19.2` makes such an environment and sets it. What the other one
loads and saves again must be the same bit for bit, and its next steps those that the writer took:
to the bit in the writer's layout, within rounding in another.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.test_resharding import AFTER, BEFORE, Bench, make_config, stored_tensors
from tests.megatron_core import INSTALLED

ROOT = Path(__file__).resolve().parents[2]
OTHER = os.environ.get("SLM_OTHER_CORE_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not OTHER,
    reason="SLM_OTHER_CORE_PYTHON names no Python with the other megatron-core; "
    "bash tests/run.sh --core 0.19.2 makes one",
)
LAYOUTS = {"dp2": dict(dp=2), "pp2": dict(pp=2), "ep2": dict(dp=2, ep=2)}
# (written in, read in, with the distributed optimizer, precision, experts); what is read in the
# layout it was written in includes the random states.
CASES = {
    "same layout": ("dp2", "dp2", True, "fp32", 0),
    "bf16": ("dp2", "pp2", False, "bf16", 0),
    "bf16 distributed": ("pp2", "dp2", True, "bf16", 0),
    "experts": ("ep2", "ep2", True, "fp32", 4),
    "experts gathered": ("ep2", "dp2", False, "fp32", 4),
}
DIRECTIONS = ("to the other", "from the other")


class ExpertsBench(Bench):
    """Bench with a mixture of experts where the case has them."""

    experts = 0

    def config_of(self, layout: dict, distributed: bool, precision: str):
        config = make_config(layout, distributed, precision)
        config.model.experts = self.experts
        config.parallel.expert = layout.get("ep", 1)
        return config


def bench_of(groups, case: str, layout: str) -> Bench:
    _, _, distributed, precision, experts = CASES[case]
    kind = type("OfThisCase", (ExpertsBench,), {"experts": experts})
    return kind(groups, LAYOUTS[layout], distributed, precision)


def write(groups, layout: str, folder: Path) -> dict:
    """Train and save every case of this layout, and record the steps that follow."""
    return {
        case: save_and_go_on(bench_of(groups, case, layout), folder / case)
        for case, (written_in, *_) in CASES.items()
        if written_in == layout
    }


def save_and_go_on(bench: Bench, folder: Path) -> list:
    bench.steps(0, BEFORE)
    bench.save(folder)
    return seen_in(bench.steps(BEFORE, AFTER))


def read(groups, layout: str, folder: Path) -> dict:
    """Load every case that is read in this layout, save it again, and record the next steps."""
    records = {}
    for case, (_, read_in, *_) in CASES.items():
        if read_in == layout:
            bench = bench_of(groups, case, layout)
            bench.load(folder / case)
            bench.save(folder / "again" / case)
            records[case] = seen_in(bench.steps(BEFORE, AFTER))
    return records


def seen_in(steps) -> list:
    return [[step.grad_norm, step.summary.get("loss/all")] for step in steps]


def run_here(action: str, folder: Path) -> dict:
    """The records of the last rank, which has the losses, of every case."""
    results = run_layouts_on_cpu({"write": write, "read": read}[action], LAYOUTS, folder)
    return {case: steps for ranks in results.values() for case, steps in ranks[-1].items()}


def run_there(action: str, folder: Path) -> dict:
    code = (
        "import json, sys; from pathlib import Path; "
        "from tests.distributed.test_other_core import INSTALLED, run_here; "
        "records = run_here(sys.argv[1], Path(sys.argv[2])); "
        "print(json.dumps({'version': INSTALLED, 'records': records}))"
    )
    done = subprocess.run(
        [OTHER, "-c", code, action, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLM_OTHER_CORE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"] != INSTALLED, f"{OTHER} has the same megatron-core as {sys.executable}"
    return answer["records"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("other_core")


@pytest.fixture(scope="module")
def records(folder):
    """direction -> (records of the writer, records of the reader)"""
    there, back = (folder / direction for direction in DIRECTIONS)
    return {
        "to the other": (run_here("write", there), run_there("read", there)),
        "from the other": (run_there("write", back), run_here("read", back)),
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_saved_again_is_the_same_bit_for_bit(direction, case, records, folder):
    saved = stored_tensors(folder / direction / case)
    again = stored_tensors(folder / direction / "again" / case)
    assert saved.keys() == again.keys()
    assert any("exp_avg_sq" in name for name in saved)
    for name, tensor in saved.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_next_steps_are_those_of_the_writer(direction, case, records):
    written, read_again = (records[direction][place][case] for place in (0, 1))
    assert len(written) == len(read_again) == AFTER
    written_in, read_in, _, precision, _ = CASES[case]
    if written_in == read_in:
        assert read_again == written
        return
    tolerance = 2e-2 if precision == "bf16" else 5e-5
    for (norm, loss), (norm_there, loss_there) in zip(written, read_again, strict=True):
        assert norm_there == pytest.approx(norm, rel=tolerance)
        assert loss_there == pytest.approx(loss, rel=tolerance / 5)
