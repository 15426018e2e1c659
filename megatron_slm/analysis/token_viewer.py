"""Real text with the selected tokens marked, as HTML: what Selective Language Modeling chooses, seen with one's own eyes.

token_view.jsonl in a run folder holds one document per line:
{"corpus": str, "document": int, "tokens": [str], "loss": [nats], "reference_loss": [nats or null], "selected": [bool]}
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

MINIMUM_TOKENS = 64

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; font: 13px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  color: var(--muted, #6b7280); background: var(--card, #fff); border: 1px solid var(--line, #d9dde3); border-radius: 6px; padding: 12px 14px; margin: 0; }
.tokens span { position: relative; }
.tokens .s { color: var(--ink, #111827); background: var(--mark, #cfe5f7); border-bottom: 2px solid var(--mark-line, #0072b2);
  box-shadow: inset -1px 0 var(--card, #fff); }
.tokens .n { border-bottom: 1px dotted currentColor; }
.tokens .b::before { content: "\\21B5"; opacity: .55; }
.tokens span[data-v]:hover::after { content: attr(data-v); position: absolute; left: 0; top: 100%; z-index: 9; white-space: pre;
  background: #111827; color: #f9fafb; padding: 4px 8px; border-radius: 4px; font-size: 12px; line-height: 1.4; pointer-events: none; }
.tokens span[data-v]:hover { outline: 1px solid var(--mark-line, #0072b2); }
.legend .s { color: var(--ink, #111827); background: var(--mark, #cfe5f7); border-bottom: 2px solid var(--mark-line, #0072b2); padding: 0 3px; }
.legend .n { border-bottom: 1px dotted currentColor; }
"""


@dataclass(frozen=True)
class TokenView:
    """One document with what was measured for each token; lists of equal length. reference_loss None = no score."""

    corpus: str
    document: int
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
                f"token view of {self.corpus} document {self.document}: the lists differ in length: {lengths}"
            )

    @property
    def excess(self) -> list[float | None]:
        return [
            loss - reference if loss is not None and reference is not None else None
            for loss, reference in zip(self.loss, self.reference_loss)
        ]

    @property
    def kept_fraction(self) -> float:
        return sum(self.selected) / max(len(self.selected), 1)

    def cut(self, maximum_tokens: int) -> "TokenView":
        """Its first tokens."""
        return TokenView(
            self.corpus,
            self.document,
            *(
                getattr(self, name)[:maximum_tokens]
                for name in ("tokens", "loss", "reference_loss", "selected")
            ),
        )


def write_token_views(path: str | Path, views: Iterable[TokenView]) -> None:
    """Write token_view.jsonl, aside and renamed; numbers are rounded to 4 digits, NaN becomes null."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        for view in views:
            record = asdict(view) | {
                name: [
                    None if value is None or not math.isfinite(value) else round(float(value), 4)
                    for value in getattr(view, name)
                ]
                for name in ("loss", "reference_loss")
            }
            record["selected"] = [bool(value) for value in view.selected]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    aside.replace(path)


def read_token_views(path: str | Path) -> list[TokenView]:
    """The documents of a token_view.jsonl; none when the file is absent; lines that are no token view are left out."""
    path = Path(path)
    views = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            views.append(
                TokenView(**{name: record[name] for name in TokenView.__dataclass_fields__})
            )
        except (ValueError, KeyError, TypeError):
            continue
    return views


def select_example(
    views: Sequence[TokenView], count: int = 3, maximum_tokens: int = 400
) -> list[TokenView]:
    """The documents that show a choice best, cut to `maximum_tokens`: long enough, with both fates, and most different in
    excess loss between selected and rejected tokens. Deterministic; ties go to the earlier document.
    """
    candidates = [view.cut(maximum_tokens) for view in views]
    order = sorted(range(len(candidates)), key=lambda index: (-_shows(candidates[index]), index))
    return [candidates[index] for index in order[:count]]


def _shows(view: TokenView) -> float:
    excess = view.excess
    chosen = [
        value for value, selected in zip(excess, view.selected) if selected and value is not None
    ]
    rejected = [
        value
        for value, selected in zip(excess, view.selected)
        if not selected and value is not None
    ]
    if not chosen or not rejected:
        return -1.0
    contrast = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
    return max(contrast, 0.0) * min(len(view.tokens) / MINIMUM_TOKENS, 1.0)


def render(view: TokenView) -> str:
    """One document as an HTML fragment (needs STYLE on the page): a heading line and its text, whitespace kept."""
    spans = "".join(map(_span, view.tokens, view.loss, view.reference_loss, view.selected))
    return (
        f'<p class="note"><b>{escape(view.corpus)}</b>, document {view.document}: {sum(view.selected)} of {len(view.tokens)} tokens '
        f'selected ({view.kept_fraction:.0%})</p>\n<div class="tokens">{spans}</div>\n'
    )


def legend() -> str:
    """A sentence that explains the marks."""
    return (
        '<p class="note legend"><span class="s">marked</span> = selected, trained on; plain = read as context, not trained on; '
        '<span class="n">dotted</span> = no reference score. Hover a token for its losses in nats.</p>'
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
    return f"<span{_attribute('class', ' '.join(classes))}{_attribute('data-v', values)}>{escape(token)}</span>"


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value, quote=True)}"' if value else ""


def _nats(value: float | None, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.2f}" if sign else f"{value:.2f}"
