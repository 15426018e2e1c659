"""Text comes out as it went in: escaped, whitespace kept, marked where selected."""

import html
import json
import re

import pytest

from megatron_slm.analysis.token_viewer import (
    TokenView,
    read_token_views,
    render,
    select_example,
    write_token_views,
)

VIEW = TokenView(
    "web",
    7,
    tokens=["if", " a<b", " &&", ' "q"', "\n", "\t", "</div><script>x</script>"],
    loss=[1.0, 2.5, None, 0.25, 3.0, 1.0, 2.0],
    reference_loss=[None, 1.0, 1.0, 0.5, float("nan"), 1.0, 1.0],
    selected=[False, True, False, False, True, False, True],
)


def text_of(fragment):
    body = re.search(r'<div class="tokens">(.*)</div>', fragment, re.DOTALL).group(1)
    return html.unescape(re.sub(r"<[^>]*>", "", body))


def test_the_text_is_kept_and_nothing_in_it_is_markup():
    fragment = render(VIEW)
    assert text_of(fragment) == "".join(VIEW.tokens)
    assert "<script" not in fragment and fragment.count("<span") == len(VIEW.tokens)


def test_selected_tokens_are_marked_and_values_shown():
    spans = re.findall(r'<span(?: class="([^"]*)")? data-v="([^"]*)"', render(VIEW))
    assert ["s" in classes.split() for classes, _ in spans] == VIEW.selected
    assert spans[1][1] == "loss 2.50  reference 1.00  excess +1.50  selected"
    assert spans[0] == ("n", "loss 1.00  reference –  excess –  not selected")
    assert "reference –" in spans[4][1] and "loss –" in spans[2][1]


def test_names_are_escaped():
    assert "<b><i>" not in render(TokenView("<i>", 0, ["a"], [1.0], [1.0], [True]))


def test_written_and_read(tmp_path):
    path = tmp_path / "token_view.jsonl"
    write_token_views(path, [VIEW, VIEW])
    first = json.loads(path.read_text().splitlines()[0])
    assert set(first) == {"corpus", "document", "tokens", "loss", "reference_loss", "selected"}
    assert first["reference_loss"][4] is None
    with open(path, "a") as file:
        file.write('{"corpus": "x"}\n{"torn')
    views = read_token_views(path)
    assert len(views) == 2 and views[0].tokens == VIEW.tokens and views[0].selected == VIEW.selected
    assert read_token_views(tmp_path / "absent") == []


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="'loss': 1"):
        TokenView("web", 7, ["a", "b"], [1.0], [1.0, 1.0], [True, False])


def example(document, excess, selected):
    return TokenView(
        "web",
        document,
        ["t"] * len(excess),
        [1.0 + value for value in excess],
        [1.0] * len(excess),
        selected,
    )


def test_examples_show_a_contrast_and_are_cut():
    views = [
        example(0, [0.0] * 100, [True] * 100),  # nothing rejected
        example(1, [0.2, 0.1] * 50, [True, False] * 50),
        example(2, [3.0, -3.0] * 50, [True, False] * 50),  # the strongest contrast
        example(3, [4.0, -4.0], [True, False]),
    ]  # too short to read
    chosen = select_example(views, count=2, maximum_tokens=80)
    assert [view.document for view in chosen] == [2, 3] or [view.document for view in chosen] == [
        2,
        1,
    ]
    assert len(chosen[0].tokens) == 80
