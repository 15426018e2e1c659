"""What the run says of an interval, to whom and how often."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_slm.config.load import from_mapping
from megatron_slm.selection import build_scorer
from megatron_slm.training.reporter import Reporter

OVERTAKEN = {"loss/all": 3.2, "loss/reference": 3.95, "selection/kept_fraction": 0.6}


class Heard:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.messages, self.records = [], []

    def log(self, record, step):
        self.records.append(record)

    def message(self, text, level):
        self.messages.append((text, level))


def reporter_of(scorer, tmp_path, corpora=()):
    config, _ = from_mapping(
        {"run": {"folder": str(tmp_path)}, "selection": {"scorer": scorer, "keep_fraction": 0.6}}
    )
    groups = SimpleNamespace(is_logger=False, world_rank=1, device=torch.device("cpu"))
    run_inputs = SimpleNamespace(corpora=[SimpleNamespace(prefix=prefix) for prefix in corpora])
    reporter = Reporter(config, groups, run_inputs, resume_step=None, wandb_id="")
    reporter.sink = Heard()
    return reporter


@pytest.mark.parametrize(("scorer", "warned"), [("none", 0), ("random", 0), ("excess_loss", 1)])
def test_a_run_that_ranks_tokens_is_told_once_that_its_reference_is_overtaken(
    scorer, warned, tmp_path
):
    reporter = reporter_of(scorer, tmp_path)
    for _ in range(2):
        reporter.emit_warnings(OVERTAKEN, 0.6, build_scorer(scorer))
    told = [text for text, level in reporter.sink.messages if "overtaken the reference" in text]
    assert len(told) == warned


def test_a_selection_that_has_ended_raises_the_alarm_no_more(tmp_path):
    reporter = reporter_of("excess_loss", tmp_path)
    assert "reference_overtaken" in reporter.emit_warnings(
        OVERTAKEN, 0.6, build_scorer("excess_loss")
    )
    assert reporter.emit_warnings(OVERTAKEN, 0.6, build_scorer("none")) == {}


def test_rates_by_corpus_bear_the_names_of_their_corpora(tmp_path):
    reporter = reporter_of("random", tmp_path, ["data/web", "data/code", "data/books", "data/web"])
    record = {"kind": "train", "selection/rate_by_corpus": [0.5, 0.7, math.nan, 0.6]}
    reporter.log(record, 10)
    assert reporter.sink.records == [
        {
            "kind": "train",
            "selection/rate_by_corpus/data/web": 0.5,
            "selection/rate_by_corpus/data/code": 0.7,
            "selection/rate_by_corpus/data/web (2)": 0.6,
        }
    ]
