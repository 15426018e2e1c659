"""Write docs/evidence.md and its figures from the stored numbers, and from nothing else.

python -m benchmarks.claims.page            the page and the figures
python -m benchmarks.claims.page --check    1 when the page is not what the numbers say
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.claims import figures
from benchmarks.claims.analysis import RESULTS, Results
from benchmarks.claims.experiment import FOLDER, experiment_names, read_experiment
from benchmarks.claims.page_parts import (
    arms_table,
    compared,
    comparisons_table,
    costs_table,
    declared_only,
    interval,
    model_lines,
    noise_table,
    sources_table,
    state,
    token_noise_lines,
)
from megatron_slm.files.atomic import write_text_atomically

ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "evidence.md"
FIGURES = ROOT / "docs" / "figures"
HEADLINE_ARMS = ("slm", "random", "mix", "slm_mix", "curated_only")
FOUND = (
    "Differences of the loss on held-out target text, in nats per token, with their 95 % "
    "intervals, after as many processed tokens as the arm compared with."
)
ORDER = (
    "main",
    "keep_fraction",
    "scope",
    "reference",
    "batch",
    "noise",
    "start",
    "lead",
    "exactness",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    text = page(RESULTS)
    if options.check:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/evidence.md is not what the stored numbers say: run it without --check")
        return 1
    write_text_atomically(PAGE, text)
    for name in experiment_names():
        results = Results.read(name)
        if results is not None:
            draw(results, FIGURES)
    return 0


def draw(results: Results, folder: Path) -> None:
    """Write the figures of one experiment."""
    name = results.header["name"]
    figures.save(figures.differences(results), folder / f"claims_{name}.svg")
    if name == "main":
        headline = figures.differences(results, HEADLINE_ARMS)
        figures.save(headline, folder / "claims_headline.svg")
    for pair in results.pairs:
        if name == "main":
            figures.save(figures.curves(results, pair), folder / f"claims_main_{pair}.svg")
        if name == "keep_fraction":
            figure = figures.keep_fractions(results, pair)
            figures.save(figure, folder / f"claims_keep_fraction_{pair}.svg")
        if name == "lead":
            figures.save(figures.lead(results, pair), folder / f"claims_lead_{pair}.svg")


def page(folder: Path) -> str:
    """docs/evidence.md, from the results in `folder`."""
    names = [*ORDER, *(name for name in experiment_names() if name not in ORDER)]
    found = {name: Results.read(name, folder) for name in names}
    parts = [(FOLDER / "evidence_head.txt").read_text(encoding="utf-8").rstrip()]
    parts.append(summary(found))
    for name, results in found.items():
        parts.append(section(results) if results else declared_only(read_experiment(name)))
    parts.append(texts([results for results in found.values() if results]))
    return "\n\n".join(parts) + "\n"


def summary(found: dict[str, Results | None]) -> str:
    """What was found, the comparisons of every experiment and pair, and what was not run."""
    lines = ["## What was found", "", FOUND]
    for results in found.values():
        if results:
            for pair in results.pairs:
                lines += ["", *state(results, pair)]
    waiting = [name for name, results in found.items() if results is None]
    if waiting:
        lines += ["", f"Declared and not yet run: {', '.join(waiting)}."]
    return "\n".join(lines)


def texts(found: list[Results]) -> str:
    """Which text each pair's corpora were made of."""
    corpora: dict[str, dict[str, Any]] = {}
    sources: dict[str, dict[str, Any]] = {}
    for results in found:
        for pair in results.pairs:
            corpora.setdefault(pair, {}).update(results.header["corpora"].get(pair, {}))
            sources.setdefault(pair, {}).update(results.header["sources"].get(pair, {}))
    lines = ["## The text that was read"]
    for pair in corpora:
        lines += ["", f"### Text: {pair}", "", *sources_table(corpora[pair], sources[pair])]
    return "\n".join(lines)


def caption(results: Results) -> str:
    """What README.md says under claims_headline.svg; a test compares the two."""
    seeds = set()
    found = []
    for pair in results.pairs:
        arms = {
            each.arm.name: each for each in compared(results, pair) if each.baseline.name == "plain"
        }
        wanted = [arms[name] for name in HEADLINE_ARMS if name in arms]
        seeds |= {each.difference.count for each in wanted}
        values = [f"{each.arm.label} {interval(each.difference, signed=True)}" for each in wanted]
        found.append(f"{pair.capitalize()}: {'; '.join(values)}.")
    return (
        "Loss on held-out text of the target kind, less that of plain training after as many "
        f"tokens, in nats per token: means of {min(seeds)} seeds with 95 % intervals, on small "
        f"models. {' '.join(found)}"
    )


def section(results: Results) -> str:
    """One experiment with its tables and figures."""
    declared, name = results.declared, results.header["name"]
    lines = [f"## {declared['title']}", "", declared["question"], ""]
    lines += [f"`python -m benchmarks.claims.run {name} --scale {results.header['scale']['name']}`"]
    lines += ["", f"![Differences of the final loss.](figures/claims_{name}.svg)", ""]
    for pair in results.pairs:
        lines += [f"### {declared['title']}: {pair}", ""]
        if name == "main":
            lines += [f"![Loss over tokens and FLOPs.](figures/claims_main_{pair}.svg)", ""]
        if name == "keep_fraction":
            path = f"figures/claims_keep_fraction_{pair}.svg"
            lines += [f"![Difference from plain over the keep fraction.]({path})", ""]
        if name == "lead":
            lines += [f"![Difference from plain over the run.](figures/claims_lead_{pair}.svg)", ""]
        lines += [*arms_table(results, pair), "", *comparisons_table(results, pair), ""]
        lines += [*model_lines(results, pair), ""]
        if declared["planted"]:
            lines += [*noise_table(results, pair), "", *token_noise_lines(results, pair), ""]
        lines += [*costs_table(results, pair), ""]
        if waiting := results.not_run(pair):
            lines += [f"Declared for this pair and not yet run: {', '.join(waiting)}.", ""]
    others = [pair for pair in declared["pairs"] if pair not in results.pairs]
    if others:
        lines += [f"Pairs that are declared and not yet run: {', '.join(others)}.", ""]
    for what, why in declared["missing"].items():
        lines += [f"Not part of it, {what}: {why}.", ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
