"""FLOPs against counted matrix sizes, rates against a clock that the test turns."""

from dataclasses import replace

import pytest

from megatron_slm.config.schema import ModelConfig
from megatron_slm.monitoring import Throughput, model_flops_per_token, peak_flops_per_second

TINYLLAMA = ModelConfig(
    layers=22, hidden_size=2048, ffn_hidden_size=5632, attention_heads=32, query_groups=4
)


def test_flops_of_tinyllama_counted_from_its_matrices():
    sequence_length, vocabulary_size = 2048, 32000
    # rows x columns of every weight matrix one token is multiplied with
    matrices = 22 * [
        (2048, 2048),
        (2048, 256),
        (2048, 256),
        (2048, 2048),
        (2048, 5632),
        (2048, 5632),
        (5632, 2048),
    ] + [(2048, 32000)]
    weights = 2 * sum(rows * columns for rows, columns in matrices)
    # A token at position p attends to p + 1 positions, with one q.k and one p.v product of 64 per
    # head.
    core = (
        22
        * 32
        * sum(2 * 2 * 64 * (position + 1) for position in range(sequence_length))
        / sequence_length
    )
    flops = model_flops_per_token(TINYLLAMA, sequence_length, vocabulary_size)
    assert flops.forward == pytest.approx(weights + core, rel=1e-12)
    assert flops.training == 3 * flops.forward
    assert flops.training == pytest.approx(
        6 * 1.034e9, rel=0.1
    )  # the usual 6 x parameters, plus attention


def test_flops_of_a_mixture_count_the_experts_a_token_is_sent_to():
    dense = model_flops_per_token(TINYLLAMA, 2048, 32000)
    mixture = model_flops_per_token(replace(TINYLLAMA, experts=8, experts_per_token=2), 2048, 32000)
    assert mixture.feed_forward == 2 * dense.feed_forward + 22 * 2 * 2048 * 8
    assert (mixture.attention_projections, mixture.attention_core, mixture.head) == (
        dense.attention_projections,
        dense.attention_core,
        dense.head,
    )


def test_flops_of_a_window_count_the_positions_that_are_seen():
    window, length = 100, 2048
    model = replace(TINYLLAMA, attention_window_tokens=window, full_attention_layers=[0, 5])
    full = model_flops_per_token(TINYLLAMA, length, 32000).attention_core // 22
    seen = sum(min(position + 1, window) for position in range(length)) / length
    windowed = model_flops_per_token(model, length, 32000).attention_core
    assert windowed == pytest.approx(2 * full + 20 * 4 * 2048 * seen, rel=1e-9)
    wide = replace(TINYLLAMA, attention_window_tokens=length)
    assert model_flops_per_token(wide, length, 32000).attention_core == 22 * full


def test_peaks():
    assert peak_flops_per_second("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops_per_second("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops_per_second("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops_per_second("NVIDIA H200", "bf16") == 989e12
    assert peak_flops_per_second("Intel Xeon", "fp32") is None


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_interval_leaves_out_pauses_and_shows_the_wait_for_data():
    clock = Clock()
    throughput = Throughput(
        total_tokens=10_000,
        flops_per_token=1e6,
        peak_flops_per_second=1e9,
        world_size=2,
        clock=clock,
    )
    for _ in range(4):
        with throughput.waiting_for_data():
            clock.now += 0.5
        clock.now += 1.5
        throughput.step_done(tokens=1000)
    with throughput.paused():
        clock.now += 60
    figures = throughput.interval(tokens_processed=4000)
    assert figures == {
        "throughput/tokens_per_second": 500.0,
        "throughput/step_seconds": 2.0,
        "throughput/data_seconds": 0.5,
        "throughput/model_flops_per_second": 5e8,
        "throughput/eta_seconds": 12.0,
        "throughput/mfu_fraction": 0.25,
    }
    assert throughput.interval(tokens_processed=4000) == {}


def test_no_mfu_without_a_stated_peak():
    clock = Clock()
    throughput = Throughput(total_tokens=10, flops_per_token=1e6, clock=clock)
    clock.now += 1
    throughput.step_done(tokens=10)
    assert "throughput/mfu_fraction" not in throughput.interval(tokens_processed=10)
