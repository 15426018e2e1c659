import math
import re
from pathlib import Path

import pytest
import torch

from megatron_slm.selection import (
    SCORERS,
    Population,
    Scorer,
    TrainingProgress,
    build_scorer,
    register_scorer,
    scorers,
)

START = TrainingProgress(step=3, tokens=0)


@pytest.fixture
def columns():
    generator = torch.Generator().manual_seed(0)
    names = [
        "loss",
        "entropy",
        "reference_loss",
        "reference_entropy",
        "base_loss",
        "prior_loss",
        "conditional_loss",
        "history_loss",
    ]
    values = {
        name: torch.rand(4, 32, generator=generator) * 5
        for name in [*names, "short_context_loss", "mine"]
    }
    return values | {"token_id": torch.arange(128).view(4, 32)}


@pytest.fixture
def everyone():
    return torch.ones(4, 32, dtype=torch.bool)


def micro_batch(columns):
    return Population("micro_batch", columns["token_id"])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("excess_loss", {}, lambda c: c["loss"] - c["reference_loss"]),
        ("own_loss", {}, lambda c: c["loss"]),
        ("own_entropy", {}, lambda c: c["entropy"]),
        ("history", {}, lambda c: c["history_loss"] - c["loss"]),
        ("reference_loss", {}, lambda c: -c["reference_loss"]),
        ("reference_entropy", {}, lambda c: -c["reference_entropy"]),
        ("color_filter", {}, lambda c: c["prior_loss"] - c["conditional_loss"]),
        ("token_cleaning", {}, lambda c: c["base_loss"] - c["reference_loss"]),
        ("stored_score", {"column": "mine"}, lambda c: c["mine"]),
        ("reverse", {"of": {"name": "stored_score", "column": "mine"}}, lambda c: -c["mine"]),
        (
            "long_context_weight",
            {"cap": 2.0},
            lambda c: torch.exp(c["short_context_loss"] - c["loss"]).clamp(max=2.0),
        ),
        ("entropy_weight", {"gamma": 2.0}, lambda c: c["entropy"] ** 2),
    ],
)
def test_scores_are_the_equations(columns, name, options, expected):
    scorer = build_scorer(name, **options)
    assert torch.equal(scorer(columns, START), expected(columns))
    only_needed = {
        need: columns[need] for need in scorer.needs
    }  # a column that is not declared would be missing in training
    assert torch.equal(scorer(only_needed, START), expected(columns))


def test_none_is_plain_clm_and_needs_no_score(columns, everyone):
    columns["loss"][0, 0] = math.nan  # plain training shows a diverged loss, it does not hide it
    chosen = build_scorer("none").choose(columns, everyone, 0.6, micro_batch(columns), START)
    assert torch.equal(chosen.mask, everyone)
    assert (chosen.kept, chosen.eligible) == (128, 128)


def test_point_10_random_depends_on_step_and_token_id_only(columns):
    scorer = build_scorer("random", seed=1)
    score = scorer(columns, START)
    order = torch.randperm(128)
    shuffled = scorer({"token_id": columns["token_id"].view(-1)[order]}, START)
    assert torch.equal(shuffled, score.view(-1)[order])
    assert not torch.equal(score, scorer(columns, TrainingProgress(step=4)))
    assert not torch.equal(score, build_scorer("random", seed=2)(columns, START))


def test_random_is_uniform_and_uncorrelated_between_steps_and_neighbours():
    ids = {"token_id": torch.arange(1 << 18) + (1 << 40)}
    draws = torch.stack(
        [build_scorer("random")(ids, TrainingProgress(step)) for step in range(4)]
    ).double()
    counts = torch.histc(draws.float(), bins=64, min=0, max=1)
    expected = draws.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 6 * math.sqrt(2 * 63)
    limit = 6 / math.sqrt(draws.shape[1])
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < limit
    assert torch.corrcoef(torch.stack([draws[0, 1:], draws[0, :-1]]))[0, 1].abs() < limit


def test_intersection_and_union_combine_the_children_s_choices(columns, everyone):
    population = micro_batch(columns)
    a = build_scorer("reference_loss").choose(columns, everyone, 0.6, population, START).mask
    b = build_scorer("reference_entropy").choose(columns, everyone, 0.4, population, START).mask
    of = ["reference_loss", {"name": "reference_entropy", "keep_fraction": 0.4}]
    both = build_scorer("intersection", of=of).choose(columns, everyone, 0.6, population, START)
    either = build_scorer("union", of=of).choose(columns, everyone, 0.6, population, START)
    assert torch.equal(both.mask, a & b)
    assert torch.equal(either.mask, a | b)
    assert both.kept == int((a & b).sum())
    assert both.eligible == 128
    assert math.isnan(both.threshold)
    with pytest.raises(ValueError, match="makes 2 choices"):
        build_scorer("union").choose(
            columns, everyone, 0.6, Population("running_threshold", running=object()), START
        )


def test_band_skips_the_top_and_keeps_the_next(columns, everyone):
    chosen = build_scorer("band", of="own_loss", skip_fraction=0.25).choose(
        columns, everyone, 0.5, micro_batch(columns), START
    )
    descending = columns["loss"].view(-1).argsort(descending=True)
    expected = torch.zeros(128, dtype=torch.bool)
    expected[descending[32:96]] = True
    assert torch.equal(chosen.mask.view(-1), expected)
    assert chosen.kept == 64
    with pytest.raises(ValueError, match="add to more than 1"):
        build_scorer("band", skip_fraction=0.5).choose(
            columns, everyone, 0.6, micro_batch(columns), START
        )


def test_weighted_sum_adds_z_scores_of_the_tokens_that_have_one(columns, everyone):
    columns["reference_loss"][1] = math.nan
    scorer = build_scorer("weighted_sum", of={"excess_loss": 2.0, "own_entropy": -1.0})
    score = scorer.rank(columns, everyone, micro_batch(columns), START)

    def z(x):
        known = x[x.isfinite()].double()
        return (x - known.mean()) / known.std(correction=0)

    expected = 2.0 * z(columns["loss"] - columns["reference_loss"]) - z(columns["entropy"])
    assert torch.allclose(score.double(), expected.double(), atol=1e-5, equal_nan=True)
    assert not scorer.choose(columns, everyone, 0.6, micro_batch(columns), START).mask[1].any()
    with_options = build_scorer(
        "weighted_sum", of=[{"name": "stored_score", "column": "mine", "weight": 1.0}]
    )
    assert with_options.needs == {"mine"}


def test_rho_loss_keeps_whole_sequences_by_their_mean(columns, everyone):
    columns["loss"] = columns["reference_loss"] + torch.tensor([[1.0], [3.0], [-1.0], [2.0]])
    eligible = everyone.clone()
    eligible[1, :10] = False
    chosen = build_scorer("rho_loss").choose(columns, eligible, 0.4, micro_batch(columns), START)
    assert torch.equal(
        chosen.mask.any(1), torch.tensor([False, True, False, True])
    )  # 0.4 of 118 reaches into the second best
    assert torch.equal(chosen.mask, eligible & chosen.mask.any(1, keepdim=True))
    assert chosen.kept == 22 + 32
    with pytest.raises(ValueError, match="cannot compete with themselves"):
        build_scorer("rho_loss").choose(columns, everyone, 0.4, Population("sequence"), START)


def test_rho_loss_completes_a_sequence_of_which_one_token_was_chosen(columns, everyone):
    columns["loss"] = columns["reference_loss"] + torch.tensor([[1.0], [3.0], [-1.0], [2.0]])
    one_more_than_a_sequence = 33 / 128
    chosen = build_scorer("rho_loss").choose(
        columns, everyone, one_more_than_a_sequence, micro_batch(columns), START
    )
    assert chosen.mask.sum(1).tolist() == [0, 32, 0, 32]


def test_stored_mask_and_weights_decide_alone(columns, everyone):
    columns["mine"] = torch.tensor([0.0, 1.0, math.nan, -2.0] * 8).expand(4, 32).clone()
    mask = build_scorer("stored_mask", column="mine").choose(
        columns, everyone, 0.1, micro_batch(columns), START
    )
    assert torch.equal(mask.mask, columns["mine"] == 1.0)
    assert mask.weight is None
    assert mask.kept == 32
    columns["mine"] = torch.tensor([0.5, 2.0, math.inf, -2.0] * 8).expand(4, 32).clone()
    soft = build_scorer("stored_weight", column="mine").choose(
        columns, everyone, 0.1, micro_batch(columns), START
    )
    assert soft.weights.unique().tolist() == [0.0, 0.5, 2.0]
    assert int(soft.mask.sum()) == 64


def test_point_02_soft_weights_have_their_own_float_divisor(columns, everyone):
    soft = build_scorer("entropy_weight", gamma=0.5).choose(
        columns, everyone, 0.6, micro_batch(columns), START
    )
    assert soft.weight_sum.is_floating_point()
    assert float(soft.weight_sum) == pytest.approx(float(columns["entropy"].sqrt().sum()))
    assert int(soft.mask.sum()) == 128


@pytest.mark.parametrize("clm_weight", [0.0, 0.3, 1.0])
def test_mixture_is_lambda_clm_plus_one_minus_lambda_slm(columns, everyone, clm_weight):
    everyone[0, :9] = False
    columns["reference_loss"][2, :5] = (
        math.nan
    )  # no score: never selected, but plain CLM trains on it
    loss, population = columns["loss"], micro_batch(columns)
    chosen = build_scorer("mixed_with_clm", clm_weight=clm_weight).choose(
        columns, everyone, 0.6, population, START
    )
    selected = build_scorer("excess_loss").choose(columns, everyone, 0.6, population, START).mask
    mixed = float((loss * chosen.weights).sum() / chosen.weight_sum)
    assert mixed == pytest.approx(
        float(clm_weight * loss[everyone].mean() + (1 - clm_weight) * loss[selected].mean()),
        rel=1e-5,
    )
    assert torch.equal(chosen.choice, selected)
    assert not chosen.weights[~chosen.mask].any()
    assert torch.equal(chosen.split([1, 3])[1].choice, selected[1:])


def test_mixture_follows_a_schedule_in_tokens(columns, everyone):
    scorer = build_scorer(
        "mixed_with_clm", clm_weight={"style": "linear", "start": 1.0, "end": 0.0, "tokens": 100}
    )
    early = scorer.choose(columns, everyone, 0.5, micro_batch(columns), TrainingProgress(0, 0))
    late = scorer.choose(columns, everyone, 0.5, micro_batch(columns), TrainingProgress(9, 100))
    assert bool((early.weights == 1.0).all())
    assert late.weight is None
    assert int(late.mask.sum()) == 64


def test_static_scorers_know_the_choice_before_the_model_runs():
    static = {
        name
        for name in (
            "none",
            "random",
            "reference_loss",
            "intersection",
            "token_cleaning",
            "color_filter",
        )
        if build_scorer(name).is_static
    }
    assert static == {
        "none",
        "random",
        "reference_loss",
        "intersection",
        "token_cleaning",
        "color_filter",
    }
    assert not build_scorer("excess_loss").is_static
    assert not build_scorer("own_entropy").is_static


@pytest.fixture
def guide_scorer(monkeypatch) -> str:
    """The scorer that docs/selection.md writes in ten lines, for one test; its source."""
    monkeypatch.setattr(scorers, "SCORERS", dict(SCORERS))
    guide = (Path(__file__).parents[3] / "docs" / "selection.md").read_text()
    section = guide[guide.index("## A scorer of your own") :]
    source = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    exec(compile(source, "docs/selection.md", "exec"), {})
    return source


def test_the_guide_s_scorer_changes_the_selection(guide_scorer, columns, everyone):
    def chosen(name, **options):
        scorer = build_scorer(name, **options)
        return scorer.choose(columns, everyone, 0.5, micro_batch(columns), START).mask > 0

    own = chosen("relative_excess")
    assert own.sum() == 64
    assert (own != chosen("excess_loss")).any()
    assert (own != chosen("relative_excess", floor_nats=5.0)).any(), "the option does nothing"
    assert (own != chosen("relative_excess", column="mine")).any()


def test_the_guide_s_scorer_does_what_its_sentence_says(guide_scorer):
    columns = {"loss": torch.tensor([[0.4, 4.2]]), "reference_loss": torch.tensor([[0.2, 4.0]])}
    sure, unsure = build_scorer("relative_excess")(columns, START)[0].tolist()
    assert sure > unsure
    without_score = {**columns, "reference_loss": torch.full((1, 2), torch.nan)}
    assert build_scorer("relative_excess")(without_score, START).isnan().all()


def test_the_module_shows_the_same_scorer_as_the_guide(guide_scorer):
    lines = [line.strip() for line in guide_scorer.splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", '"""', "from "))]
    shown = [line.strip() for line in scorers.__doc__.splitlines()]
    assert [line for line in code if line not in shown] == []


def test_options_of_a_function_name_the_column_it_needs(guide_scorer, columns, everyone):
    scorer = build_scorer("relative_excess", column="mine", floor_nats=1.0)
    assert scorer.needs == {"loss", "mine"}
    assert scorer.uses_keep_fraction
    assert scorer.choose(columns, everyone, 0.5, micro_batch(columns), START).kept == 64


def test_a_name_is_registered_once(guide_scorer):
    with pytest.raises(ValueError, match="registered already"):
        register_scorer("relative_excess")(lambda columns, progress: columns["loss"])


def install(site: Path, name: str, module: str, source: str) -> None:
    """A distribution as pip leaves one: a module, and its entry point in the .dist-info folder."""
    (site / f"{module}.py").write_text(source)
    information = site / f"{module}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[megatron_slm.scorers]\n{name} = {module}\n")


def test_an_installed_package_adds_a_scorer_through_its_entry_point(
    columns, everyone, monkeypatch, tmp_path
):
    monkeypatch.setattr(scorers, "SCORERS", dict(SCORERS))
    monkeypatch.syspath_prepend(tmp_path)
    install(
        tmp_path,
        "theirs",
        "their_scorers",
        """
from megatron_slm.selection import register_scorer

@register_scorer("theirs", needs=("loss", "{column}"))
def theirs(columns, progress, *, column="reference_loss", margin=0.0):
    return columns["loss"] - columns[column] - margin
""",
    )
    install(tmp_path, "empty", "empty_scorers", "")
    install(tmp_path, "broken", "broken_scorers", "import a_package_that_is_not_there")
    scorer = build_scorer("theirs", column="mine", margin=0.5)
    torch.testing.assert_close(scorer(columns, START), columns["loss"] - columns["mine"] - 0.5)
    assert (
        build_scorer("reverse", of={"name": "theirs", "column": "mine"})
        .choose(columns, everyone, 0.5, micro_batch(columns), START)
        .kept
        == 64
    )
    with pytest.raises(ValueError, match="registers no scorer named 'empty'"):
        build_scorer("empty")
    with pytest.raises(
        ValueError,
        match="broken_scorers of an installed package cannot be loaded.*"
        "a_package_that_is_not_there",
    ):
        build_scorer("broken")
    with pytest.raises(ValueError, match="did you mean 'theirs'"):
        build_scorer("their")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exces_loss", {}, "did you mean 'excess_loss'"),
        ("random", {"sed": 1}, "unknown option sed, did you mean 'seed'.; its options are: seed"),
        ("stored_mask", {}, "option column must be given"),
        ("reverse", {"of": "none"}, "'none' does not rank tokens"),
        ("union", {"of": ["excess_loss"]}, "at least two scorers"),
        ("weighted_sum", {"of": {}}, "must map scorers to weights"),
        ("band", {"skip_fraction": 0.0}, "skip_fraction must be above 0"),
        ("mixed_with_clm", {"clm_weight": 1.5}, "clm_weight must be at least 0 and at most 1"),
        ("mixed_with_clm", {"of": "stored_weight"}, "option column must be given"),
        ("reverse", {"off": "none"}, "unknown option off, did you mean 'of'.; its options are: of"),
    ],
)
def test_mistakes_are_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_scorer(name, **options)


def test_every_registered_scorer_says_what_it_is():
    for name, factory in SCORERS.items():
        function = factory.args[1] if hasattr(factory, "args") else factory
        assert function.__doc__, f"scorer {name} has no docstring"
    with pytest.raises(NotImplementedError, match="use scorer.choose"):
        Scorer()({}, START)
