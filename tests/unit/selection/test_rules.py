"""What is decided before any token is seen, for every scorer in every scope, and without torch."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.selection.populations import SCOPES
from megatron_slm.selection.rules import ChoiceRules, configured_scorer
from megatron_slm.selection.scorers import SCORERS

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = {
    "stored_score": {"column": "quality"},
    "stored_mask": {"column": "quality"},
    "stored_weight": {"column": "quality"},
    "weighted_sum": {"of": {"own_loss": 1.0, "own_entropy": 0.5}},
}
"""Options of the scorers that have some without a default."""
NO_TORCH = f"""
import sys
from megatron_slm.selection.populations import SCOPES
from megatron_slm.selection.rules import ChoiceRules, configured_scorer
from megatron_slm.selection.scorers import SCORERS
for name in SCORERS:
    for scope in SCOPES:
        rules = ChoiceRules(configured_scorer(name, {OPTIONS!r}.get(name), 0.0), scope)
        rules.runs_forward_first(weight_needed_ahead=True)
        rules.stored_columns, rules.knows_weight_ahead
heavy = {{"torch", "numpy", "megatron"}} & set(sys.modules)
assert not heavy, heavy
print(len(SCORERS))
"""


def rules_of(name: str, scope: str, head_rows: str = "auto") -> ChoiceRules:
    return ChoiceRules(configured_scorer(name, OPTIONS.get(name)), scope, head_rows)


def test_every_scorer_is_built_and_asked_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.parametrize("name", SCORERS)
def test_a_static_choice_never_runs_the_model_first(name):
    for scope, head_rows, ahead in itertools.product(SCOPES, ("auto", "all", "selected"), (0, 1)):
        rules = rules_of(name, scope, head_rows)
        if rules.scorer.is_static:
            assert not rules.runs_forward_first(weight_needed_ahead=bool(ahead))


@pytest.mark.parametrize(
    "name, scope, ahead, first",
    [
        ("excess_loss", "data_parallel", False, False),
        ("excess_loss", "data_parallel", True, False),
        ("excess_loss", "global_batch", False, True),
        ("excess_loss", "running_threshold", True, True),
        ("entropy_weight", "data_parallel", False, False),
        ("entropy_weight", "data_parallel", True, True),
        ("entropy_weight", "global_batch", False, True),
        ("rho_loss", "micro_batch", True, True),
        ("reference_loss", "global_batch", True, False),
        ("none", "global_batch", True, False),
        ("stored_mask", "global_batch", True, False),
    ],
)
def test_a_forward_pass_of_its_own(name, scope, ahead, first):
    assert rules_of(name, scope).runs_forward_first(weight_needed_ahead=ahead) is first


@pytest.mark.parametrize(
    "name, stored",
    [
        ("none", set()),
        ("random", set()),
        ("own_entropy", set()),
        ("excess_loss", {"reference_loss"}),
        ("intersection", {"reference_loss", "reference_entropy"}),
        ("color_filter", {"prior_loss", "conditional_loss"}),
        ("stored_mask", {"quality"}),
    ],
)
def test_stored_columns(name, stored):
    assert rules_of(name, "data_parallel").stored_columns == stored
    assert rules_of(name, "data_parallel").scorer.is_static == (
        name not in ("own_entropy", "excess_loss")
    )


def test_a_mixture_with_plain_loss_asks_its_child():
    scorer = configured_scorer("excess_loss", {}, 0.1)
    rules = ChoiceRules(scorer, "data_parallel")
    assert rules.stored_columns == {"reference_loss"}
    assert rules.scorer.uses_keep_fraction
    assert rules.knows_weight_ahead


@pytest.mark.parametrize("clm_weight", [float("nan"), 1.5, "much"])
def test_a_weight_of_plain_loss_that_is_none(clm_weight):
    with pytest.raises(ValueError, match="clm_weight"):
        configured_scorer("excess_loss", {}, clm_weight)
