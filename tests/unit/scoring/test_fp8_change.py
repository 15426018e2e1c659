"""What fp8 changes of the selection: by hand, and with emulated fp8 products on a real model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fp8_reference import measure_emulated
from megatron_slm.checkpoint.folder import CheckpointInfo
from megatron_slm.config.schema import Config, DataConfig, ModelConfig
from megatron_slm.scoring.fp8_change import choice_change, sampled_ranges
from megatron_slm.scoring.fp8_options import fp8_size_problems
from megatron_slm.scoring.options import (
    ScoreDevice,
    ScoreOptions,
    ScoringJob,
    option_problems,
    prepare,
)
from megatron_slm.testing.corpora import TOKENIZER_FINGERPRINT, random_documents, write_corpus
from megatron_slm.testing.emulated_fp8 import rounded_to_e4m3
from megatron_slm.testing.spawn import run_on_cpu

VOCABULARY, WINDOW = 97, 16
MODEL = ModelConfig(
    layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    attention_heads=4,
    query_groups=2,
    vocabulary_size=VOCABULARY,
    initialization_std=0.3,
)
SOUND = ScoreOptions(checkpoint="none", corpus="none", output="none")


def test_the_change_by_hand():
    """Ten tokens of equal loss, one of them without a score; keep 4 of the 9 others, the lowest of
    the reference.
    """
    model = np.full(10, 5.0, np.float32)
    fp32 = np.array([np.nan, 0, 1, 2, 3, 4, 4, 4, 4, 4], np.float32)
    fp8 = np.array([np.nan, 0, 1, 2, 4, 4, 4, 3, 4, 4], np.float32)
    change = choice_change(model, {"fp32": fp32, "bf16": fp32, "fp8": fp8}, 4 / 9)
    assert change.tokens == 9
    assert change.changed_fraction == {"fp32 -> bf16": 0, "fp32 -> fp8": 0.25, "bf16 -> fp8": 0.25}
    assert change.loss_rms_nats["fp32 -> fp8"] == pytest.approx((2 / 9) ** 0.5)
    assert "bf16 -> fp8 25.00%" in str(change)


def test_windows_are_different_ones_of_the_corpus():
    ranges = sampled_ranges(1000, 64, 5)
    assert len(set(ranges)) == 5
    assert ranges == sorted(ranges)
    assert sampled_ranges(100, 64, 5) == [(0, 64), (64, 100)]


def test_rounding_is_that_of_e4m3_with_one_scale():
    """Three bits behind the leading one: the largest value exactly, others within 1/16."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rounded = rounded_to_e4m3(values)
    assert rounded.abs().max() == pytest.approx(values.abs().max().item(), rel=1e-6)
    large = values.abs() > values.abs().max() * 2**-14  # below, e4m3 has fewer bits
    error = ((rounded - values) / values)[large].abs().max().item()
    assert 0.03 < error <= 1 / 16 + 1e-6
    assert torch.equal(rounded_to_e4m3(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize(
    "changed, sentence",
    [
        (dict(device=ScoreDevice(fp8="hybrid")), "device.fp8: got hybrid without fp8_model"),
        (dict(fp8_model="run"), "fp8_model: got 'run' with device.fp8 none"),
        (dict(fp8_keep_fraction=0.0), "fp8_keep_fraction: got 0.0; expected above 0"),
        (dict(fp8_keep_fraction=1.5), "fp8_keep_fraction: got 1.5"),
        (dict(fp8_windows=0), "fp8_windows: got 0; expected at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changed, sentence):
    assert any(sentence in problem for problem in option_problems(replace(SOUND, **changed)))


def test_sizes_that_fp8_products_cannot_take_are_refused():
    assert fp8_size_problems(replace(SOUND, micro_batch_size=4), 64) == []
    (problem,) = fp8_size_problems(replace(SOUND, micro_batch_size=3), 100)
    assert "micro_batch_size: got 3 windows of 100 tokens" in problem


def save_models(groups, folder: str) -> None:
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.model.build import build_model

    for number, name in enumerate(("reference", "model")):
        config = Config(model=MODEL, data=DataConfig(sequence_length=WINDOW))
        config.run.seed += number
        info = CheckpointInfo(
            model=asdict(MODEL),
            sequence_length=WINDOW,
            tokenizer={"path": "none", "fingerprint": TOKENIZER_FINGERPRINT},
            step=3,
            tokens_processed=300,
        )
        store = CheckpointStore(f"{folder}/{name}", groups)
        models = build_model(config, VOCABULARY, groups)
        store.save(models, None, info, trainer_state(None, groups))


def measure_twice(groups, job: ScoringJob) -> list[float]:
    """When the file was written after each of two starts."""
    written = []
    for _ in range(2):
        measure_emulated(groups, job)
        written.append(Path(job.options.output, "fp8_change.json").stat().st_mtime_ns)
    return written


def test_a_scoring_run_in_fp8_states_what_that_changes(tmp_path):
    """Of the selection, against bf16 and fp32; rounding to e4m3 moves more than bf16 does."""
    documents = list(random_documents(20, 14, vocabulary_size=VOCABULARY, seed=4))
    write_corpus(tmp_path / "corpus", documents, vocabulary_size=VOCABULARY)
    run_on_cpu(save_models, str(tmp_path))
    options = ScoreOptions(
        checkpoint=str(tmp_path / "reference"),
        corpus=str(tmp_path / "corpus"),
        output=str(tmp_path / "scores"),
        device=ScoreDevice(fp8="hybrid", precision="bf16"),
        fp8_model=str(tmp_path / "model"),
        fp8_windows=12,
    )
    job = prepare(options, 1, [])
    described = job.manifest.reference_description
    assert described.endswith(", hybrid fp8 products with tensorwise scaling"), "another store"
    ((first, again),) = run_on_cpu(measure_twice, job)
    assert first == again, "a run that continues a store finds what was measured"
    found = json.loads(Path(tmp_path / "scores" / "fp8_change.json").read_text())
    assert found["keep_fraction"] == 0.6
    assert found["tokens"] > 100
    rms = found["loss_rms_nats"]
    assert 0 < rms["fp32 -> bf16"] < rms["fp32 -> fp8"]
    assert rms["bf16 -> fp8"] > 0
    assert set(found["changed_fraction"]) == {"fp32 -> bf16", "fp32 -> fp8", "bf16 -> fp8"}
    assert 0 < found["changed_fraction"]["fp32 -> fp8"] < 0.5
