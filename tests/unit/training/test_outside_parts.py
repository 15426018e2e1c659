"""The examples of docs/extending.md can be used as they stand; wrong parts are refused."""

import math
import re
from pathlib import Path

import pytest
import torch

from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config
from megatron_slm.model.outside_optimizer import check_outside_optimizer
from megatron_slm.training.data_fault import DataFault
from megatron_slm.training.learning_rate import learning_rate
from megatron_slm.training.outside_parts import OutsideParts, load_outside_parts
from megatron_slm.training.outside_validation import ValidationRun, measure_outside

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "extending.md"


def write_examples(folder: Path) -> dict[str, str]:
    """Every example of the guide as a file; the name of each by its file's."""
    blocks = re.findall(r"```python\n# my_parts/(\w+)\.py\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    for stem, source in blocks:
        (folder / f"{stem}.py").write_text(source)
    functions = {"csv_sink": "CsvSink"}
    return {stem: f"{folder}/{stem}.py:{functions.get(stem, stem)}" for stem, _ in blocks}


def config_with_examples(folder: Path) -> Config:
    names = write_examples(folder)
    config = Config()
    config.optimizer.kind = names["lion"]
    config.schedule.style = names["inverse_sqrt"]
    config.monitoring.sinks = [names["csv_sink"]]
    config.monitoring.validations = [names["late_loss"]]
    config.monitoring.after_step = names["note_norms"]
    return config


def test_no_part_is_asked_for_by_default():
    assert load_outside_parts(Config()) == OutsideParts()


def test_the_examples_of_the_guide_can_be_used(tmp_path, capsys):
    config = config_with_examples(tmp_path)
    parts = load_outside_parts(config)
    check_outside_optimizer("lion", parts.make_optimizer, config.optimizer)
    assert list(parts.validations) == config.monitoring.validations
    sink = parts.sinks[config.monitoring.sinks[0]](str(tmp_path), {})
    sink.log({"kind": "train", "loss/all": 2.5}, 3)
    assert (tmp_path / "losses.csv").read_text() == "3,train,2.5\n"
    parts.after_step(7, {"optimizer/grad_norm": 12.0})
    assert capsys.readouterr().out == "step 7: gradient norm 12\n"


def test_a_shape_from_outside_follows_warm_up(tmp_path):
    config = config_with_examples(tmp_path)
    config.schedule.warmup_fraction = 0.1
    config.optimizer.learning_rate, config.optimizer.min_learning_rate = 1e-3, 1e-4
    shape = load_outside_parts(config).schedule_shape
    assert learning_rate(config, 5, 100, shape) == pytest.approx(5e-4)
    assert learning_rate(config, 10, 100, shape) == 1e-3
    assert learning_rate(config, 40, 100, shape) == pytest.approx(1e-4 + 9e-4 / 2)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return None", "gives None, not a number from 0 up, the part of the peak learning rate,"),
        ("return -1.0", "gives -1.0"),
        ("return float('nan')", "gives nan"),
        ("return 1 / abs(position - 500)", "fails at step 500 of 1000: ZeroDivisionError"),
    ],
)
def test_a_shape_without_a_value_is_refused(body, problem, tmp_path):
    (tmp_path / "shape.py").write_text(f"def shape(position, warmup_steps, end):\n    {body}\n")
    config = Config()
    config.schedule.style = f"{tmp_path}/shape.py:shape"
    with pytest.raises(ConfigError) as refused:
        load_outside_parts(config)
    assert problem in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, -0.5, None])
def test_a_shape_that_loses_its_value_later_is_refused_before_the_step(value):
    config = Config()
    config.schedule.style = "mine.py:shape"

    def shape(position, warmup_steps, end):
        return 0.5 if position < 70 else value

    assert learning_rate(config, 69, 100, shape) > 0
    with pytest.raises(ValueError, match=r"schedule.style: mine.py:shape gives .* at step 70"):
        learning_rate(config, 70, 100, shape)


def test_every_wrong_part_is_named_at_once(tmp_path):
    config = Config()
    config.optimizer.kind = f"{tmp_path}/gone.py:a"
    config.monitoring.after_step = f"{tmp_path}/gone.py:b"
    with pytest.raises(ConfigError) as refused:
        load_outside_parts(config)
    first, second = refused.value.problems
    assert first.startswith("optimizer.kind: ")
    assert second.startswith("monitoring.after_step: ")


class KeepsItsStepElsewhere(torch.optim.Adam):
    """torch's Adam counts steps beside the moments, which a checkpoint would lose."""


class ForgetsItsMoment(torch.optim.SGD):
    """Its momentum is an attribute of the object."""

    momentum = None

    def step(self, closure=None):
        [parameter] = self.param_groups[0]["params"]
        self.momentum = parameter.grad + (0.0 if self.momentum is None else 0.9 * self.momentum)
        parameter.data.sub_(self.momentum, alpha=0.1)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda groups, settings: KeepsItsStepElsewhere(groups), "keeps step beside exp_avg"),
        (lambda groups, settings: ForgetsItsMoment(groups, lr=0.1), "does not go on from exp_avg"),
        (lambda groups, settings: None, "fails on a parameter of 8 numbers"),
        (lambda groups, settings: torch.optim.SGD([{**groups[0], "lr": math.inf}]), "not finite"),
    ],
)
def test_an_optimizer_that_cannot_be_resumed_is_refused(make, problem):
    with pytest.raises(ValueError, match=f"optimizer.kind: mine .*{problem}"):
        check_outside_optimizer("mine", make, Config().optimizer)


def test_an_optimizer_without_state_is_taken():
    check_outside_optimizer(
        "sgd", lambda groups, settings: torch.optim.SGD(groups, lr=0.1), Config().optimizer
    )


def test_a_corpus_that_cannot_be_read_in_a_measurement_is_a_fault_of_data():
    """All ranks raise it together: the loop saves the steps before, and the run ends with 3."""

    def measure(validation):
        raise DataFault("a validation corpus was cut short")

    run = ValidationRun(step=3, models=[], loaders={}, groups=None)
    with pytest.raises(DataFault, match="cut short"):
        measure_outside({"mine.py:measure": measure}, run)


@pytest.mark.parametrize("metric", ["target/loss", "target/late_loss"])
def test_a_measurement_never_replaces_another(metric):
    run = ValidationRun(step=3, models=[], loaders={"target": []}, groups=None)
    first = {"mine.py:late": lambda validation: {"target/late_loss": 2.0}}
    assert measure_outside(first, run) == {"validation/target/late_loss": 2.0}
    both = first | {"mine.py:other": lambda validation: {metric: 1.0}}
    with pytest.raises(RuntimeError, match=f"mine.py:other gives validation/{metric}, which is"):
        measure_outside(both, run)
