"""The shell of a report: one HTML file with its style and pictures inside.

Nothing is fetched, and nothing is executed.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from matplotlib.figure import Figure

from megatron_slm.analysis import token_viewer
from megatron_slm.analysis.style import house_style

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5b6570; --line: #d9dde3; --card: #fff;
  --page: #f5f6f8; --mark: #cfe5f7;
  --mark-line: #0072b2; --warn: #fdf3dc; --best: #e3f4ed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #a0a9b4; --line: #39424e;
  --card: #1c232b; --page: #12171d;
  --mark: #123f5f; --mark-line: #56b4e9; --warn: #3b3115; --best: #123a2c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 36px 24px 72px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 18px;
  margin: 44px 0 10px; } h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 8px 0; } .note { color: var(--muted); font-size: 13.5px; } .lead { font-size: 16px;
  margin: 14px 0 4px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; }
.wide { overflow-x: auto; } th, td { padding: 7px 11px; text-align: right;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; } tr:last-child td {
  border-bottom: 0; }
table:not(.text) td { white-space: nowrap; }
  th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
  table.text td { overflow-wrap: anywhere; vertical-align: top; }
td.best { background: var(--best); font-weight: 600; } .swatch { display: inline-block;
  width: 10px; height: 10px; border-radius: 2px; margin-right: 7px; }
figure { margin: 12px 0 22px; } figure img { display: block; width: 100%; height: auto;
  background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: 10px; }
figcaption { color: var(--ink); font-size: 14px; margin-top: 7px; }
.warnings { background: var(--warn); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 14px 10px 32px; margin: 10px 0; font-size: 13.5px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 14px; font-size: 12.5px; overflow-x: auto; margin: 6px 0; }
code { font-size: .93em; } details { margin: 10px 0; } summary { cursor: pointer;
  font-weight: 600; } nav { font-size: 13.5px; margin: 16px 0 0; } nav a { margin-right: 16px; }
a { color: var(--mark-line); } @media print { body { background: #fff; } details {
  break-inside: avoid; } }
"""


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole document. sections: (heading, HTML); empty ones are left out.

    Titles are escaped, sections are HTML already.
    """
    sections = [(heading, body) for heading, body in sections if body]
    links = "".join(
        f'<a href="#s{i}">{escape(heading)}</a>' for i, (heading, _) in enumerate(sections)
    )
    bodies = "".join(
        f'<section id="s{i}"><h2>{escape(heading)}</h2>\n{body}</section>\n'
        for i, (heading, body) in enumerate(sections)
    )
    # The policy makes "nothing is fetched, nothing is executed" something the browser enforces.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}{token_viewer.STYLE}</style></head>\n"
        f'<body><main>\n<h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p>'
        f"<nav>{links}</nav>\n{bodies}</main></body></html>\n"
    )


def picture(figure: Figure | None, caption: str) -> str:
    """A figure as an SVG inside the page, with a sentence under it; nothing for None."""
    if figure is None:
        return ""
    buffer = io.BytesIO()
    with house_style():  # the ids in an SVG depend on it: the same runs give the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    # As an image rather than inline: ids of several inline SVGs would collide.
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption, quote=True)}" '
        f'src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    """A table of ready HTML cells; a cell that starts with '*' is marked as the best of its column.

    The header is escaped.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table{" class=text" if text else ""}>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def _cell(content: str) -> str:
    if content.startswith("*"):
        return f'<td class="best">{content[1:]}</td>'
    return f"<td>{content}</td>"
