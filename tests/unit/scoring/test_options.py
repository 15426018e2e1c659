"""Settings that scoring could not honour are refused before anything is opened."""

from dataclasses import replace

import pytest

from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.scoring.options import ScoreDevice, ScoreOptions, prepare

SOUND = ScoreOptions(checkpoint="none", corpus="none", output="none")


@pytest.mark.parametrize(
    "changed, sentence",
    [
        (
            dict(parallel=ParallelConfig(distributed_optimizer=True)),
            "parallel.distributed_optimizer: got true; scoring has no gradients",
        ),
        (
            dict(parallel=ParallelConfig(pipeline=2, virtual_pipeline=2)),
            "parallel.virtual_pipeline: got 2",
        ),
        (dict(device=ScoreDevice(fp8="hybrid")), "device.fp8: got hybrid"),
        (
            dict(device=ScoreDevice(head_engine="liger")),
            "device.head_engine: got liger; it computes the head's backward, and scoring has none",
        ),
        (dict(window_tokens=8, stride_tokens=9), "stride_tokens: got 9, above window_tokens (8)"),
    ],
)
def test_what_scoring_cannot_honour_is_a_sentence(changed, sentence):
    with pytest.raises(ConfigError) as caught:
        prepare(replace(SOUND, **changed), 1, [])
    assert sentence in str(caught.value)
