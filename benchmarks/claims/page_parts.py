"""The sentences and tables of docs/evidence.md."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims.analysis import LOSS, Arm, Comparison, Results, found_noise
from benchmarks.claims.experiment import Experiment
from benchmarks.claims.intervals import Estimate, estimate
from benchmarks.claims.noise import WORDS

SIGNIFICANT = 0.05
LOWER, HIGHER, SAME, TOO_FEW = "lower", "higher", "not shown to differ", "too few seeds"
FINDINGS = (LOWER, HIGHER, SAME, TOO_FEW)
"""What a comparison finds of the loss of its arm."""
MEASURED = ("precision", "recall", "planted_fraction")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in lines]


def number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−")


def interval(value: Estimate, digits: int = 3, *, signed: bool = False) -> str:
    """Mean and 95 % interval: −0.052 [−0.070, −0.034]."""
    mean = number(value.mean, digits, signed=signed)
    if not math.isfinite(value.half_width):
        return f"{mean} (one seed)"
    ends = [number(end, digits, signed=signed) for end in (value.low, value.high)]
    return f"{mean} [{ends[0]}, {ends[1]}]"


def probability(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def scientific(value: float) -> str:
    return f"{value:.2e}" if value else "–"


def finding(comparison: Comparison, needed: int) -> str:
    """One of FINDINGS; `needed` seeds make a claim."""
    difference = comparison.difference
    assert difference is not None
    if difference.count < needed:
        return TOO_FEW
    if comparison.p_holm < SIGNIFICANT:
        return LOWER if difference.mean < 0 else HIGHER
    return SAME


def compared(results: Results, pair: str) -> list[Comparison]:
    return [each for each in results.comparisons(pair) if each.difference is not None]


def state(results: Results, pair: str) -> list[str]:
    """What the comparisons of one pair say: a line for each of FINDINGS that there is."""
    declared = results.declared
    baseline = declared["arms"][declared["baseline"]]["label"] or declared["baseline"]
    lines = [
        f"**{declared['title']}: {pair}.** {declared['seeds']} seeds make a claim; against "
        f"{baseline}, unless something else is said.",
        "",
    ]
    grouped: dict[str, list[str]] = {}
    for each in compared(results, pair):
        assert each.difference is not None
        against = ""
        if each.baseline.name != declared["baseline"]:
            against = f" (against {each.baseline.label})"
        text = f"{each.arm.label}{against} {interval(each.difference, signed=True)}"
        grouped.setdefault(finding(each, declared["seeds"]), []).append(text)
    for name in FINDINGS:
        if name in grouped:
            lines.append(f"- *{name.capitalize()}*: {'; '.join(grouped[name])}.")
    return lines


def model_lines(results: Results, pair: str) -> list[str]:
    """Where the base and the references end on the target."""
    lines = []
    arms = results.arms(pair).values()
    lowest = min(estimate(list(arm.final_losses().values())).mean for arm in arms)
    for name, model in results.models(pair).items():
        loss = estimate(list(model.final_losses().values()))
        below = ", below every arm" if loss.mean < lowest else ""
        lines.append(f"- The model `{name}` ends at {interval(loss)} nats{below}.")
    return lines


def arms_table(results: Results, pair: str) -> list[str]:
    rows = []
    for arm in results.arms(pair).values():
        losses = [run["validation"][-1][LOSS] for run in arm.runs.values()]
        per_seed = ", ".join(number(arm.final_losses()[seed]) for seed in arm.seeds)
        kept = number(arm.kept_fraction, 2)
        rows.append([arm.label, str(len(losses)), interval(estimate(losses)), per_seed, kept])
    return table(
        ["arm", "seeds", "final loss on the target, nats per token", "by seed", "kept"], rows
    )


def comparisons_table(results: Results, pair: str) -> list[str]:
    rows = []
    for each in compared(results, pair):
        assert each.difference is not None
        found = finding(each, results.declared["seeds"])
        ratio = f"not in {each.difference.count - each.reached} of {each.difference.count} seeds"
        if each.tokens_ratio is not None:
            ratio = interval(each.tokens_ratio, 2)
        rows.append(
            [
                each.arm.label,
                each.baseline.label,
                str(each.difference.count),
                interval(each.difference, signed=True),
                found,
                probability(each.difference.p),
                probability(each.p_holm),
                ratio,
            ]
        )
    header = ["arm", "less", "seeds", "difference, nats", "loss", "p, paired", "Holm"]
    return table([*header, "tokens to its loss"], rows)


def costs_table(results: Results, pair: str) -> list[str]:
    """FLOPs and CPU seconds of each arm, with what the reference and its scores cost."""
    arms = results.arms(pair)
    rows = [[arm.label, *_costs(arm)] for arm in arms.values()]
    models = results.models(pair).items()
    rows += [[f"model `{name}`", *_costs(model)] for name, model in models]
    header = ["", "FLOPs of the run", "of its reference", "of scoring", "sum", "CPU seconds"]
    return table(header, rows)


def _costs(arm: Arm) -> list[str]:
    flops = arm.flops
    parts = [scientific(flops[name]) for name in ("run", "reference", "scoring")]
    return [*parts, scientific(sum(flops.values())), f"{arm.cpu_seconds:.0f}"]


def noise_table(results: Results, pair: str) -> list[str]:
    """What was selected of each corpus, and how well rejecting finds the noise."""
    corpora = ["corpus", *results.declared["planted"]]
    rows = []
    for arm in results.arms(pair).values():
        found = found_noise(results, pair, arm)
        if found is None or arm.name == results.declared["baseline"]:
            continue
        rates = [interval(found.kept[name], 2) for name in corpora]
        scores = [interval(found.precision, 2), interval(found.recall, 2)]
        rows.append([arm.label, *rates, *scores, number(found.noise_fraction, 2)])
    kept = [f"kept of {name}" for name in corpora]
    header = ["arm", *kept, "precision", "recall", "precision by chance"]
    documents = ", ".join(name for name in results.declared["planted"] if name != WORDS)
    explanation = (
        f"Rejected tokens as finds of planted documents ({documents}), over the whole run. "
        "Precision: planted among the rejected tokens; recall: rejected among the planted ones."
    )
    return [explanation, "", *table(header, rows)]


def token_noise_lines(results: Results, pair: str) -> list[str]:
    """How well rejecting finds planted words, of the arms that were measured so."""
    lines = []
    for arm in results.arms(pair).values():
        found = [run["token_noise"] for run in arm.runs.values() if run["token_noise"]]
        if not found:
            continue
        precision, recall, share = (_of_seeds(found, name) for name in MEASURED)
        lines.append(
            f"- Planted words, {arm.label}: of the 40 % of tokens with the lowest excess loss at "
            f"the end, {precision} are planted ({share} of all are), and {recall} of the planted "
            f"ones are among them ({len(found)} seeds)."
        )
    return lines


def _of_seeds(found: Sequence[Mapping[str, float]], name: str) -> str:
    return interval(estimate([entry[name] for entry in found]), 2)


def sources_table(corpora: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """Which text was read: what the first row of stored numbers says of one pair."""
    rows = []
    for corpus, entry in sources.items():
        for source, size in entry["sources"].items():
            count = f"{size['characters']:,}"
            rows.append([corpus, source, f"{size['documents']:,}", count])
        if corpus in corpora:
            documents = f"{entry['documents']:,}"
            count = f"{entry['characters']:,} = {corpora[corpus]['tokens']:,} tokens"
            rows.append([corpus, "all of it", documents, count])
    return table(["corpus", "source", "documents", "characters"], rows)


def declared_only(experiment: Experiment) -> str:
    """The section of an experiment that has no numbers."""
    lines = [f"## {experiment.title}", "", experiment.question, ""]
    lines += [f"**Not yet run.** `python -m benchmarks.claims.run {experiment.name}`. Arms:"]
    lines[-1] += f" {'; '.join(experiment.label(name) for name in experiment.arms)}."
    for what, why in experiment.missing.items():
        lines += ["", f"Not part of it, {what}: {why}."]
    return "\n".join(lines)
