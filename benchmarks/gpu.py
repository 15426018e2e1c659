"""Everything that is measured and tested on one GPU, with one command.

    python -m benchmarks.gpu --output gpu.json              # all G cases, then tests/gpu
    python -m benchmarks.gpu --output gpu.json --resume     # what an earlier start did not reach
    python -m benchmarks.gpu --output gpu.json --parts head --budget-minutes 5
    python -m benchmarks.gpu --dry-run                      # what would run, and about how long
    python -m benchmarks.gpu --output smoke.json --smoke    # the machinery alone, on a CPU

Writes gpu.json after every case (the machine, the card, versions, command, git state, and every row
as its program printed it) and gpu.md beside it, a table for benchmarks/RESULTS.md. A run that is
cut off keeps what it had; --resume continues it on the same card, versions and revision, and is
refused on others. All G cases should take less than 5 minutes on an H200, tests/gpu as much again:
estimated from the times of single calls, not yet run on GPU.

Exit codes: 0 everything ran, was correct and met its gate; 1 something missed its gate, failed or
is wrong; 2 wrong usage, or no GPU; 3 the budget ended before the work (start again with --resume).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_parts import Part, gpu_parts, rows_of, smoke_parts
from benchmarks.gpu_report import Report


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    parts = smoke_parts() if options.smoke else gpu_parts()
    names = [part.name for part in parts]
    wanted = options.parts.split(",") if options.parts else names
    if unknown := [name for name in wanted if name not in names]:
        return _refuse(f"--parts: got {unknown[0]!r}; expected some of {','.join(names)}")
    parts = [part for part in parts if part.name in wanted]
    if options.dry_run:
        return _print_plan(parts)
    if options.output is None:
        return _refuse("--output: missing; expected the JSON file to write")
    if options.budget_minutes <= 0:
        return _refuse(f"--budget-minutes: got {options.budget_minutes}; expected more than 0")
    if not options.smoke and not torch.cuda.is_available():
        return _refuse("torch sees no CUDA device here; --smoke tries the machinery on a CPU")
    report = Report.start(options.output, options.smoke)
    if options.output.exists():
        if not options.resume:
            return _refuse(f"--output: {options.output} exists; continue it with --resume")
        if why := report.continues(json.loads(options.output.read_text())):
            return _refuse(f"--resume: {options.output} is of another setting: {why}")
    return _measure(parts, report, time.monotonic() + 60 * options.budget_minutes)


def _measure(parts: list[Part], report: Report, deadline: float) -> int:
    """Run what the report has not; the exit code."""
    report.write()
    for part in parts:
        left = [case for case in part.cases if case not in report.done(part.name)]
        for row in rows_of(part, left, deadline):
            report.add(part.name, row)
            print(json.dumps(row), flush=True)
    missing = [
        f"{part.name} {case}"
        for part in parts
        for case in part.cases
        if case not in report.content["rows"].get(part.name, {})
    ]
    print(f"{report.path} and {report.path.with_suffix('.md')} are written", file=sys.stderr)
    if report.bad:
        print(f"gpu: missed, failed or wrong: {', '.join(report.bad)}", file=sys.stderr)
    if missing:
        print(f"gpu: the budget ended before: {', '.join(missing)}", file=sys.stderr)
        return 3
    return 1 if report.bad else 0


def _print_plan(parts: list[Part]) -> int:
    """The commands, and about how long they take."""
    total = 0.0
    for part in parts:
        seconds = part.seconds_per_case * len(part.cases)
        total += seconds
        print(f"{part.name}: {len(part.cases)} cases, about {seconds:.0f} s on an H200")
        groups = [[case] for case in part.cases] if part.name == "tests" else [list(part.cases)]
        for cases in groups:
            print(f"    python {' '.join(part.command(cases))}")
    print(f"about {total / 60:.0f} minutes (estimated, not measured)")
    return 0


def _refuse(sentence: str) -> int:
    print(f"gpu: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; the table gets its name")
    parser.add_argument("--parts", help="some of the parts; default all")
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=60.0,
        help="end what runs then, and start nothing more (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the file of --output")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--smoke", action="store_true", help="tiny cases on a CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
