"""Bars stand over the name of the corpus they measure, whatever the corpora of the other runs."""

from pathlib import Path

import pytest

from megatron_slm.analysis.run_folder import Run
from megatron_slm.analysis.selection_figures import rate_by_corpus, shortest_names


def run_of(name, train, rates):
    """A selecting run whose last line holds `rates`: a list, as older runs wrote, or a mapping of
    prefixes.
    """
    metrics = (
        {"selection/rate_by_corpus": rates}
        if isinstance(rates, list)
        else {f"selection/rate_by_corpus/{prefix}": rate for prefix, rate in rates.items()}
    )
    config = {"selection": {"scorer": "excess_loss"}, "data": {"train": train}}
    return Run(name, Path(name), config, [{"step": 1, "tokens/processed": 10, **metrics}], [])


def bars(figure):
    """run -> {name under the bar: its height}."""
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    found = {}
    for container in axes.containers:
        places = [patch.get_x() + patch.get_width() / 2 for patch in container.patches]
        heights = [patch.get_height() for patch in container.patches]
        found[container.get_label()] = {
            names[round(place)]: height for place, height in zip(places, heights, strict=True)
        }
    return found


@pytest.mark.parametrize("older", [False, True])
def test_runs_of_different_corpora_have_their_bars_under_their_own_names(older):
    first = {"data/web": 0.5, "data/code": 0.7}
    second = {"data/code": 0.6, "data/books": 0.8, "data/web": 0.4}
    runs = [
        run_of(name, list(rates), list(rates.values()) if older else rates)
        for name, rates in (("one", first), ("two", second))
    ]
    assert bars(rate_by_corpus(runs)) == {
        "one": {"web": 0.5, "code": 0.7},
        "two": {"code": 0.6, "books": 0.8, "web": 0.4},
    }


def test_corpora_of_the_same_last_name_are_told_apart():
    runs = [
        run_of("one", [], {"a/web": 0.5, "a/code": 0.7}),
        run_of("two", [], {"b/web": 0.6, "./a/code": 0.1}),
    ]
    assert bars(rate_by_corpus(runs)) == {
        "one": {"a/web": 0.5, "code": 0.7},
        "two": {"b/web": 0.6, "code": 0.1},
    }
    assert shortest_names(["/x/a/web", "/y/a/web", "/y/b"]) == ["x/a/web", "y/a/web", "b"]


def test_a_corpus_without_tokens_in_the_last_interval_keeps_its_last_rate():
    run = run_of("one", ["web", "code"], {"web": 0.5, "code": 0.7})
    run.training.append({"step": 2, "tokens/processed": 20, "selection/rate_by_corpus/web": 0.6})
    assert bars(rate_by_corpus([run])) == {"one": {"web": 0.6, "code": 0.7}}


def test_an_older_list_that_fits_no_configuration_bears_no_corpus_s_name():
    run = run_of("one", ["web"], [0.5, 0.7])
    assert bars(rate_by_corpus([run])) == {"one": {"corpus 1 of one": 0.5, "corpus 2 of one": 0.7}}


def test_one_corpus_is_no_picture():
    assert rate_by_corpus([run_of("one", ["web"], {"web": 0.5})]) is None
    assert rate_by_corpus([]) is None
