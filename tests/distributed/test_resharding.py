"""One table: save under layout A, load under layout B, for every pair of six layouts, with and
without the distributed optimizer.

After loading, two more steps are taken. Their losses and gradient norms must be those of plain
single-process torch that never stopped: the first step would show a wrong weight, the second a
wrong moment, a wrong update count or a wrong main weight. Under bf16, where layouts round
differently, what B loaded is saved again and must be A's checkpoint bit for bit.

By default each of the twelve loads from two of the twelve; SLM_RESHARDING=all runs all 144 pairs
(about four minutes).
"""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.plain_trainer import PlainTrainer
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu
from tests.distributed.bench import (
    LENGTH,
    VOCABULARY,
    StepRecord,
    SyntheticSamples,
    local_steps,
    make_trainer,
    train,
    weights_of,
    whole_batch,
)

BEFORE = 3
AFTER = 2
SEQUENCES = 4
SAMPLES = SyntheticSamples((BEFORE + AFTER) * SEQUENCES)
LAYOUTS = {
    "tp2": dict(tp=2),
    "pp2": dict(pp=2),
    "pp2_virtual2": dict(pp=2, vpp=2),
    "dp2": dict(dp=2),
    "cp2": dict(cp=2),
    "tp2_pp2": dict(tp=2, pp=2),
}
OPTIMIZERS = {"plain": False, "distributed": True}
KINDS = {
    f"{layout}, {optimizer}": (layout, distributed)
    for layout in LAYOUTS
    for optimizer, distributed in OPTIMIZERS.items()
}
NAMES = list(KINDS)
# Offset 4 changes the layout, 7 the layout and the optimizer.
OFFSETS = range(len(NAMES)) if os.environ.get("SLM_RESHARDING") == "all" else (4, 7)
PAIRS = [
    (NAMES[(index + offset) % len(NAMES)], target)
    for index, target in enumerate(NAMES)
    for offset in OFFSETS
]
"""(saved under, loaded under)"""
HALF_PRECISION = [
    ("dp2, distributed", "tp2, plain"),
    ("tp2, plain", "dp2, distributed"),
    ("dp2, distributed", "cp2, distributed"),
    ("pp2_virtual2, plain", "dp2, distributed"),
    ("tp2_pp2, distributed", "pp2_virtual2, distributed"),
]


def make_config(layout: dict, distributed: bool, precision: str) -> Config:
    config = Config()
    config.model = dataclasses.replace(
        config.model,
        layers=4,
        hidden_size=16,
        ffn_hidden_size=24,
        attention_heads=4,
        query_groups=2,
        pad_vocabulary_to_multiple_of=64,
        initialization_std=0.1,
    )
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=SEQUENCES,
        micro_batch_size=2 // layout.get("dp", 1),
    )
    config.parallel = dataclasses.replace(
        parallel_config(layout),
        distributed_optimizer=distributed,
    )
    config.device.precision = precision
    config.schedule.train_steps = BEFORE + AFTER
    config.optimizer.learning_rate = 3e-3
    return config


class Bench:
    """A model and its optimizer in one layout, and the store of one checkpoint folder."""

    def __init__(self, groups, layout: dict, distributed: bool, precision: str = "fp32"):
        from megatron_slm.parallel import seed_everything

        self.config = self.config_of(layout, distributed, precision)
        self.groups = groups
        seed_everything(self.config.run.seed, groups)
        self.trainer = make_trainer(groups, self.config)

    def config_of(self, layout: dict, distributed: bool, precision: str) -> Config:
        return make_config(layout, distributed, precision)

    def steps(self, first: int, count: int) -> list[StepRecord]:
        batches = local_steps(self.groups, self.config, SAMPLES, count, first)
        rate = self.config.optimizer.learning_rate
        return list(train(self.trainer, self.config, batches, first=first, rate=rate))

    def save(self, folder: Path, step: int = BEFORE) -> None:
        from megatron_slm.checkpoint.folder import CheckpointInfo
        from megatron_slm.checkpoint.store import CheckpointStore, trainer_state

        info = CheckpointInfo(dataclasses.asdict(self.config.model), LENGTH, {}, step, 0)
        said: list[str] = []
        store = CheckpointStore(folder, self.groups, report=lambda text, level: said.append(text))
        store.save(
            self.trainer.models,
            self.trainer.optimizer,
            info,
            trainer_state(self.trainer.optimizer, self.groups),
        )
        assert store.saved_step == step, said

    def load(self, folder: Path) -> None:
        from megatron_slm.checkpoint.store import CheckpointStore

        store = CheckpointStore(folder, self.groups)
        assert store.load_latest(self.trainer.models, self.trainer.optimizer) is not None


def save_and_load(groups, name: str, folder: Path) -> dict:
    """First call in a layout: train and save. Second call, when every layout has saved: load what
    each of them saved.
    """
    phase, name = name.split(" ", 1)
    return {"save": _save, "load": _load}[phase](groups, folder, name, LAYOUTS[name])


def _save(groups, folder, name, layout) -> dict:
    before = None
    for optimizer, distributed in OPTIMIZERS.items():
        bench = Bench(groups, layout, distributed)
        before = weights_of(bench.trainer)
        bench.steps(0, BEFORE)
        bench.save(folder / f"{name}, {optimizer}")
    for source in {source for source, _ in HALF_PRECISION if KINDS[source][0] == name}:
        bench = Bench(groups, layout, KINDS[source][1], "bf16")
        bench.steps(0, BEFORE)
        bench.save(folder / "bf16" / source)
    return {"before": before}


def _load(groups, folder, name, layout) -> dict:
    steps = {}
    for optimizer, distributed in OPTIMIZERS.items():
        bench = Bench(groups, layout, distributed)
        target = f"{name}, {optimizer}"
        for source in (source for source, to in PAIRS if to == target):
            bench.load(folder / source)
            steps[source, target] = bench.steps(BEFORE, AFTER)
    for source, target in HALF_PRECISION:
        if KINDS[target][0] == name:
            bench = Bench(groups, layout, KINDS[target][1], "bf16")
            bench.steps(0, 1)  # moments and update count of its own, for the loaded ones to replace
            bench.load(folder / "bf16" / source)
            bench.save(folder / "bf16_again" / f"{source} to {target}")
    return {"steps": steps, "last_stage": groups.is_last_stage}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resharding")


@pytest.fixture(scope="module")
def results(folder):
    found = {}
    for phase in ("save", "load"):
        layouts = {f"{phase} {name}": layout for name, layout in LAYOUTS.items()}
        # Loads of one folder take turns: each puts the folder in order, as a run does that owns it.
        found |= run_layouts_on_cpu(save_and_load, layouts, folder, side_by_side=phase == "save")
    return found


@pytest.fixture(scope="module")
def uninterrupted(results):
    """The last steps of a run in plain torch that was never saved nor loaded."""
    config = make_config({}, False, "fp32")
    trainer = PlainTrainer(
        PlainDecoder(config.model, VOCABULARY, results["save dp2"][0]["before"]), config.optimizer
    )
    everything = list(range(SEQUENCES))
    rows = []
    for step in range(BEFORE + AFTER):
        batch = whole_batch(SAMPLES, range(step * SEQUENCES, (step + 1) * SEQUENCES))
        rows.append(trainer.step(batch, [everything], None, config.optimizer.learning_rate))
    return [(loss, norm) for _, loss, _, norm in rows[BEFORE:]]


@pytest.mark.parametrize("source, target", PAIRS)
def test_any_layout_continues_what_any_layout_saved(source, target, results, uninterrupted):
    for rank in results[f"load {KINDS[target][0]}"]:
        steps = rank["steps"][source, target]
        for step, (loss, norm) in zip(steps, uninterrupted, strict=True):
            assert step.grad_norm == pytest.approx(norm, rel=5e-5)
            if rank["last_stage"]:
                assert step.summary["loss/all"] == pytest.approx(loss, rel=5e-6)


@pytest.mark.parametrize("source, target", HALF_PRECISION)
def test_bf16_state_passes_through_another_layout_bit_for_bit(source, target, results, folder):
    saved = stored_tensors(folder / "bf16" / source)
    again = stored_tensors(folder / "bf16_again" / f"{source} to {target}")
    assert saved.keys() == again.keys()
    assert any("exp_avg_sq" in name for name in saved)
    assert any("optimizer.param" in name for name in saved)
    for name, tensor in saved.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name
        if "optimizer" not in name:
            assert tensor.dtype == torch.bfloat16, name


def stored_tensors(run_folder: Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a run folder's newest checkpoint, read by torch alone."""
    from torch.distributed.checkpoint import FileSystemReader, load

    from megatron_slm.checkpoint.folder import resolve_checkpoint

    reader = FileSystemReader(resolve_checkpoint(run_folder))
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if hasattr(item, "size")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
