"""What the run says of an interval, to whom and how often."""

from types import SimpleNamespace

import pytest
import torch

from megatron_slm.config.load import from_mapping
from megatron_slm.selection import build_scorer
from megatron_slm.training.report import Reporter

OVERTAKEN = {"loss/all": 3.2, "loss/reference": 3.95, "selection/kept_fraction": 0.6}


class Heard:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.messages = []

    def message(self, text, level):
        self.messages.append((text, level))


def reporter_of(scorer, tmp_path):
    config, _ = from_mapping(
        {"run": {"folder": str(tmp_path)}, "selection": {"scorer": scorer, "keep_fraction": 0.6}}
    )
    groups = SimpleNamespace(is_logger=False, device=torch.device("cpu"))
    reporter = Reporter(config, groups, None, resume_step=None, wandb_id="")
    reporter.sink = Heard()
    return reporter


@pytest.mark.parametrize(("scorer", "warned"), [("none", 0), ("random", 0), ("excess_loss", 1)])
def test_a_run_that_ranks_tokens_is_told_once_that_its_reference_is_overtaken(
    scorer, warned, tmp_path
):
    reporter = reporter_of(scorer, tmp_path)
    for _ in range(2):
        reporter.think(OVERTAKEN, 0.6, build_scorer(scorer))
    told = [text for text, level in reporter.sink.messages if "overtaken the reference" in text]
    assert len(told) == warned
