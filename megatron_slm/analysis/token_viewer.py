"""Real text with the selected tokens marked, as HTML: what Selective Language Modeling chooses,
seen with one's own eyes.

token_view.jsonl in a run folder holds one sequence per line:
{"corpus": str, "first_token": offset of its first token in the corpus,
 "documents": [[document, place of its first token in the lists]],
 "tokens": [str], "loss": [nats], "reference_loss": [nats or null] or null, "selected": [bool]}
Documents are numbered as data_tools.inspect_corpus numbers them. Files of older runs have one
number, "document", that numbers the lines of the file; it is not shown.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

MINIMUM_TOKENS = 64
NAMED_DOCUMENTS = 4

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 13px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  color: var(--muted, #6b7280); background: var(--card, #fff);
  border: 1px solid var(--line, #d9dde3); border-radius: 6px; padding: 12px 14px; margin: 0; }
.tokens span { position: relative; }
.tokens .s { color: var(--ink, #111827); background: var(--mark, #cfe5f7);
  border-bottom: 2px solid var(--mark-line, #0072b2);
  box-shadow: inset -1px 0 var(--card, #fff); }
.tokens .n { border-bottom: 1px dotted currentColor; }
.tokens .b::before { content: "\\21B5"; opacity: .55; }
.tokens span[data-v]:hover::after { content: attr(data-v); position: absolute; left: 0; top: 100%;
  z-index: 9; white-space: pre;
  background: #111827; color: #f9fafb; padding: 4px 8px; border-radius: 4px; font-size: 12px;
  line-height: 1.4; pointer-events: none; }
.tokens span[data-v]:hover { outline: 1px solid var(--mark-line, #0072b2); }
.legend .s { color: var(--ink, #111827); background: var(--mark, #cfe5f7);
  border-bottom: 2px solid var(--mark-line, #0072b2); padding: 0 3px; }
.legend .n { border-bottom: 1px dotted currentColor; }
"""


@dataclass(frozen=True)
class TokenView:
    """One sequence with what was measured for each token; lists of equal length. reference_loss
    None = no score.
    """

    corpus: str
    first_token: int | None
    """Offset of its first token in the corpus; None where it was not recorded."""
    documents: list[tuple[int, int]]
    """(number of a document, place of its first token in the lists), in order; empty where they
    were not recorded."""
    tokens: list[str]
    loss: list[float | None]
    reference_loss: list[float | None]
    selected: list[bool]

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name))
            for name in ("tokens", "loss", "reference_loss", "selected")
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"token view of {self.corpus}{self.origin}: the lists differ in length: {lengths}"
            )

    @property
    def origin(self) -> str:
        """Where in its corpus the text stands: its documents and its first token, to follow the
        name of the corpus.
        """
        if not self.documents:
            return ", documents not recorded"
        numbers = list(dict.fromkeys(number for number, _ in self.documents))
        shown = [str(number) for number in numbers[:NAMED_DOCUMENTS]]
        if len(numbers) > len(shown):
            shown.append(f"{len(numbers) - len(shown)} more")
        if len(shown) > 1:
            shown[-2:] = [" and ".join(shown[-2:])]
        start = (
            "" if self.first_token is None else f", from token {self.first_token:,} of the corpus"
        )
        return f", document{'s' * (len(numbers) > 1)} {', '.join(shown)}{start}"

    @property
    def excess(self) -> list[float | None]:
        return [
            loss - reference if loss is not None and reference is not None else None
            for loss, reference in zip(self.loss, self.reference_loss, strict=True)
        ]

    @property
    def kept_fraction(self) -> float:
        return sum(self.selected) / max(len(self.selected), 1)

    def cut(self, maximum_tokens: int) -> "TokenView":
        """Its first tokens."""
        documents = [(number, place) for number, place in self.documents if place < maximum_tokens]
        return TokenView(
            self.corpus,
            self.first_token,
            documents,
            self.tokens[:maximum_tokens],
            self.loss[:maximum_tokens],
            self.reference_loss[:maximum_tokens],
            self.selected[:maximum_tokens],
        )


def read_token_views(path: str | Path) -> list[TokenView]:
    """The sequences of a token_view.jsonl; none when the file is absent; lines that are no token
    view are left out.
    """
    path = Path(path)
    views = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            views.append(_token_view(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            continue
    return views


def _token_view(record: dict) -> TokenView:
    tokens = record["tokens"]
    return TokenView(
        corpus=record["corpus"],
        first_token=record.get("first_token"),
        documents=[(int(number), int(place)) for number, place in record.get("documents", [])],
        tokens=tokens,
        loss=record["loss"],
        reference_loss=record["reference_loss"] or [None] * len(tokens),
        selected=record["selected"],
    )


def select_example(
    views: Sequence[TokenView], count: int = 3, maximum_tokens: int = 400
) -> list[TokenView]:
    """The sequences that show a choice best, cut to `maximum_tokens`.

    They are long enough, have selected and rejected tokens, and differ most in excess loss between
    the two; the best of each corpus comes before the second of any. Ties go to the earlier
    sequence.
    """
    candidates = [view.cut(maximum_tokens) for view in views]
    best_first = sorted(candidates, key=lambda view: -_shows(view))
    of_corpus: dict[str, int] = {}
    order = []
    for place, view in enumerate(best_first):
        of_corpus[view.corpus] = of_corpus.get(view.corpus, 0) + 1
        order.append((of_corpus[view.corpus], place))
    return [best_first[place] for _, place in sorted(order)[:count]]


def _shows(view: TokenView) -> float:
    excess = view.excess
    chosen = [
        value
        for value, selected in zip(excess, view.selected, strict=True)
        if selected and value is not None
    ]
    rejected = [
        value
        for value, selected in zip(excess, view.selected, strict=True)
        if not selected and value is not None
    ]
    if not chosen or not rejected:
        return -1.0
    contrast = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
    return max(contrast, 0.0) * min(len(view.tokens) / MINIMUM_TOKENS, 1.0)


def render(view: TokenView) -> str:
    """One sequence as an HTML fragment (needs STYLE on the page): a heading line and its text,
    whitespace kept.
    """
    spans = "".join(map(_span, view.tokens, view.loss, view.reference_loss, view.selected))
    return (
        f'<p class="note"><b>{escape(view.corpus)}</b>{escape(view.origin)}: {sum(view.selected)} '
        f"of {len(view.tokens)} tokens selected ({view.kept_fraction:.0%})</p>\n<div "
        f'class="tokens">{spans}</div>\n'
    )


def legend() -> str:
    """A sentence that explains the marks."""
    return (
        '<p class="note legend"><span class="s">marked</span> = selected, trained on; plain = '
        'read as context, not trained on; <span class="n">dotted</span> = no reference score. '
        "Hover a token for its losses in nats.</p>"
    )


def _span(token: str, loss: float | None, reference: float | None, selected: bool) -> str:
    classes = [
        name
        for name, holds in (
            ("s", selected),
            ("n", reference is None),
            ("b", "\n" in token and not token.strip()),
        )
        if holds
    ]
    excess = loss - reference if loss is not None and reference is not None else None
    values = (
        f"loss {_nats(loss)}  reference {_nats(reference)}  excess {_nats(excess, sign=True)}  "
        f"{'selected' if selected else 'not selected'}"
    )
    attributes = _attribute("class", " ".join(classes)) + _attribute("data-v", values)
    return f"<span{attributes}>{escape(token)}</span>"


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value, quote=True)}"' if value else ""


def _nats(value: float | None, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.2f}" if sign else f"{value:.2f}"
