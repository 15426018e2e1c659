"""Text comes out as it went in: escaped, whitespace kept, marked where selected."""

import html
import json
import re
from dataclasses import asdict, replace

import pytest

from megatron_slm.analysis.token_viewer import (
    TokenView,
    read_token_views,
    render,
    select_example,
)

VIEW = TokenView(
    "web",
    5120,
    [(1010, 0), (37, 4)],
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
    assert "<script" not in fragment
    assert fragment.count("<span") == len(VIEW.tokens)


def test_selected_tokens_are_marked_and_values_shown():
    spans = re.findall(r'<span(?: class="([^"]*)")? data-v="([^"]*)"', render(VIEW))
    assert ["s" in classes.split() for classes, _ in spans] == VIEW.selected
    assert spans[1][1] == "loss 2.50  reference 1.00  excess +1.50  selected"
    assert spans[0] == ("n", "loss 1.00  reference –  excess –  not selected")
    assert "reference –" in spans[4][1]
    assert "loss –" in spans[2][1]


def test_names_are_escaped():
    assert "<b><i>" not in render(TokenView("<i>", 0, [(0, 0)], ["a"], [1.0], [1.0], [True]))


def heading(view):
    return re.sub(r"<[^>]*>", "", render(view).split("\n")[0])


def test_a_heading_names_corpus_documents_and_first_token():
    assert heading(VIEW) == (
        "web, documents 1010 and 37, from token 5,120 of the corpus: 3 of 7 tokens selected (43%)"
    )
    assert heading(VIEW.cut(4)).startswith("web, document 1010, from token 5,120 of the corpus: 1")
    many = replace(VIEW, documents=[(number, 0) for number in (9, 8, 7, 6, 5, 4)])
    assert heading(many).startswith("web, documents 9, 8, 7, 6 and 2 more, from token")


def test_lines_of_a_file_are_read_and_others_left_out(tmp_path):
    path = tmp_path / "token_view.jsonl"
    record = asdict(VIEW)
    path.write_text(json.dumps(record) + '\n{"corpus": "x"}\n{"torn')
    (view,) = read_token_views(path)
    assert view.tokens == VIEW.tokens
    assert view.selected == VIEW.selected
    assert view.documents == VIEW.documents
    assert read_token_views(tmp_path / "absent") == []


def test_a_choice_without_a_reference_is_shown_too(tmp_path):
    path = tmp_path / "token_view.jsonl"
    path.write_text(json.dumps(asdict(VIEW) | {"reference_loss": None}))
    (view,) = read_token_views(path)
    assert view.reference_loss == [None] * 7


def test_the_line_numbers_that_older_runs_called_documents_are_not_shown(tmp_path):
    path = tmp_path / "token_view.jsonl"
    older = {
        name: value
        for name, value in asdict(VIEW).items()
        if name not in ("documents", "first_token")
    }
    path.write_text(json.dumps(older | {"document": 0}))
    (view,) = read_token_views(path)
    assert heading(view).startswith("web, documents not recorded: 3 of 7 tokens")


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="'loss': 1"):
        TokenView("web", 0, [(7, 0)], ["a", "b"], [1.0], [1.0, 1.0], [True, False])


def example(document, excess, selected, corpus="web"):
    return TokenView(
        corpus,
        0,
        [(document, 0)],
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
    documents = [view.documents[0][0] for view in chosen]
    assert documents in ([2, 3], [2, 1])
    assert len(chosen[0].tokens) == 80


def test_examples_come_from_every_corpus():
    strong, weak = [3.0, -3.0] * 50, [0.2, 0.1] * 50
    views = [example(number, strong, [True, False] * 50) for number in range(3)]
    views.append(example(3, weak, [True, False] * 50, corpus="code"))
    chosen = select_example(views, count=2)
    assert [view.corpus for view in chosen] == ["web", "code"]
