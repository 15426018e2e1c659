"""The numbers of benchmarks/claims: intervals and tests against known values, comparisons of seeds,
and docs/evidence.md against the stored results.
"""

import math

import pytest

from benchmarks.claims.analysis import Results, found_noise, tokens_to_reach
from benchmarks.claims.collect import read_rows, write_rows
from benchmarks.claims.intervals import (
    estimate,
    holm,
    incomplete_beta,
    t_quantile,
    two_sided_p,
)
from benchmarks.claims.page import PAGE, caption, draw, page, section
from benchmarks.claims.page_parts import interval, state

# Student's t, two-sided 95 %: the table of any textbook (Abramowitz and Stegun, 26.10).
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 1000: 1.962}


@pytest.mark.parametrize(("degrees", "expected"), QUANTILES.items())
def test_t_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=6e-4)


def test_t_quantile_of_one_degree_is_the_cauchy_distribution():
    assert t_quantile(0.95, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-10)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 40.0])
def test_p_of_two_degrees_has_a_closed_form(t):
    assert two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


@pytest.mark.parametrize("x", [0.0, 0.01, 0.3, 0.5, 0.77, 1.0])
def test_incomplete_beta_of_whole_numbers_is_a_binomial_sum(x):
    terms = [math.comb(6, j) * x**j * (1 - x) ** (6 - j) for j in range(3, 7)]
    assert incomplete_beta(x, 3, 4) == pytest.approx(sum(terms), abs=1e-12)


def test_an_estimate_of_known_numbers():
    """scipy.stats.ttest_1samp([-0.10, -0.07, -0.05, -0.08, -0.09], 0) gives t -9.07, p 0.00082."""
    found = estimate([-0.10, -0.07, -0.05, -0.08, -0.09])
    assert found.mean == pytest.approx(-0.078)
    assert found.half_width == pytest.approx(2.7764451 * 0.0192353841 / math.sqrt(5), rel=1e-6)
    assert found.p == pytest.approx(0.000819, abs=2e-5)


def test_one_value_has_no_interval():
    found = estimate([1.5])
    assert found.half_width == math.inf
    assert math.isnan(found.p)
    assert interval(found) == "1.500 (one seed)"


def test_equal_values_have_an_interval_of_no_width():
    assert estimate([0.0, 0.0, 0.0]).p == 1.0
    assert estimate([0.1, 0.1]).p == 0.0


def test_holm_adjusts_step_by_step():
    adjusted = holm([0.01, math.nan, 0.04, 0.03])
    assert adjusted[0] == pytest.approx(0.03)
    assert math.isnan(adjusted[1])
    assert adjusted[2:] == pytest.approx([0.06, 0.06])


def test_tokens_to_reach_a_loss_are_read_between_validations():
    points = [[0, 0, 0, 5.0], [10, 100, 60, 4.0], [20, 200, 120, 3.0]]
    assert tokens_to_reach(points, 3.5) == 150
    assert tokens_to_reach(points, 6.0) == 0
    assert tokens_to_reach(points, 2.9) is None


def rows_of(losses: dict[str, list[float]]) -> list[dict]:
    """An experiment of plain training, and of arms compared with it."""
    arms = {name: {"label": "", "against": "", "train": ["corpus", "shuffled"]} for name in losses}
    declared = {
        "title": "A test",
        "question": "Is it?",
        "seeds": 3,
        "pairs": ["code"],
        "baseline": "plain",
        "contrasts": {"slm": ["random"]},
        "planted": {"shuffled": 0.25},
        "models": {},
        "missing": {"all of it": "it is a test"},
        "arms": arms,
    }
    corpora = {"corpus": {"tokens": 800}, "shuffled": {"tokens": 200}}
    header = {
        "kind": "experiment",
        "name": "test",
        "declared": declared,
        "scale": {"name": "smoke"},
        "corpora": {"code": corpora},
        "sources": {},
    }
    return [header] + [
        run_row(name, seed, loss)
        for name, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]


def run_row(name: str, seed: int, loss: float) -> dict:
    rates = {
        "selection/rate_by_corpus/corpus": 0.7,
        "selection/rate_by_corpus/shuffled": 0.2,
    }
    return {
        "kind": "arm",
        "pair": "code",
        "seed": seed,
        "name": name,
        "validation": [[0, 0, 0, 5.0], [10, 100, 60, loss]],
        "training": [{"tokens/processed": 100, **rates}],
        "flops": {"run": 1e9, "reference": 0.0, "scoring": 0.0},
        "cpu_seconds": 2.0,
        "token_noise": {},
    }


def test_arms_are_compared_seed_by_seed():
    rows = rows_of({"plain": [4.0, 4.5, 5.0], "slm": [3.9, 4.38, 4.89], "random": [4.1, 4.6, 5.0]})
    own, other, random, contrast = Results(rows).comparisons("code")
    assert own.difference is None
    assert other.difference.mean == pytest.approx(-0.11)
    assert other.p_holm == pytest.approx(3 * other.difference.p)
    assert random.reached == 1
    assert random.tokens_ratio is None
    assert contrast.baseline.name == "random"
    assert other.tokens_ratio.mean < 1


def test_a_missing_seed_is_left_out_of_the_differences():
    rows = rows_of({"plain": [4.0, 4.5, 5.0], "slm": [3.9, 4.4]})
    [_, found] = Results(rows).comparisons("code")
    assert found.difference.count == 2
    assert found.difference.mean == pytest.approx(-0.1)


def test_precision_and_recall_count_the_tokens_of_each_corpus():
    results = Results(rows_of({"plain": [4.0], "slm": [3.9]}))
    found = found_noise(results, "code", results.arms("code")["slm"])
    rejected_noise, rejected = 200 * 0.8, 200 * 0.8 + 800 * 0.3
    assert found.precision.mean == pytest.approx(rejected_noise / rejected)
    assert found.recall.mean == pytest.approx(0.8)
    assert found.noise_fraction == pytest.approx(0.2)


def test_a_section_says_what_was_not_found_and_not_run(tmp_path):
    rows = rows_of({"plain": [4.0, 4.5, 5.0], "slm": [4.01, 4.49, 5.0]})
    rows[0]["declared"]["arms"]["later"] = {"label": "an arm for later", "against": ""}
    write_rows(tmp_path / "test.jsonl.gz", rows)
    text = section(Results(read_rows(tmp_path / "test.jsonl.gz")))
    assert "| slm | plain | 3 | +0.000 [−0.025, +0.025] | not shown to differ | 1.000 |" in text
    assert "Declared for this pair and not yet run: an arm for later." in text
    assert "Not part of it, all of it: it is a test." in text


def test_the_summary_groups_what_was_found():
    rows = rows_of({"plain": [4.0, 4.5, 5.0], "slm": [3.9, 4.38, 4.89], "random": [4.1, 4.6, 5.0]})
    lines = state(Results(rows), "code")
    assert "3 seeds make a claim; against plain" in lines[0]
    assert lines[2] == "- *Lower*: slm −0.110 [−0.135, −0.085]."
    assert lines[3].startswith("- *Not shown to differ*: random +0.067 [")
    assert "; slm (against random) −0.177 [" in lines[3]


def test_fewer_seeds_than_declared_make_no_claim():
    text = section(Results(rows_of({"plain": [4.0, 4.5], "slm": [3.5, 4.0]})))
    assert "| −0.500 [−0.500, −0.500] | too few seeds | < 0.001 |" in text


def test_the_same_rows_are_the_same_file(tmp_path):
    rows = rows_of({"plain": [4.0]})
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl.gz", rows)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert read_rows(tmp_path / "a.jsonl.gz") == rows


def test_the_same_numbers_are_the_same_figure(tmp_path):
    results = Results(rows_of({"plain": [4.0, 4.5], "slm": [3.9, 4.38]}))
    for name in ("a", "b"):
        draw(results, tmp_path / name)
    figures = [(tmp_path / name / "claims_test.svg").read_bytes() for name in ("a", "b")]
    assert figures[0] == figures[1]


def test_the_page_is_what_the_stored_numbers_say():
    from benchmarks.claims.analysis import RESULTS

    assert PAGE.read_text(encoding="utf-8") == page(RESULTS), (
        "write it anew: python -m benchmarks.claims.page"
    )


def test_the_caption_in_the_readme_is_what_the_stored_numbers_say():
    readme = PAGE.parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert caption(Results.read("main")) in " ".join(readme.split())


def test_the_stored_numbers_are_small():
    from benchmarks.claims.analysis import RESULTS

    assert sum(path.stat().st_size for path in RESULTS.glob("*.gz")) < 5_000_000
