"""Run or continue an experiment, and keep its numbers.

    python -m benchmarks.claims.run main --scale cpu --folder runs/claims --jobs 2
    python -m benchmarks.claims.run main --folder runs/claims --figures runs/claims/figures
    python -m benchmarks.claims.run noise --scale smoke --folder /tmp/smoke
    python -m benchmarks.claims.run main --scale cluster --texts /data/math --folder /scratch/c
    python -m benchmarks.claims.run main --scale gpu --folder runs/gpu --prepare      corpora only
    python -m benchmarks.claims.run main --folder runs/claims --dry-run       what is left to do
    python -m benchmarks.claims.run main --folder runs/claims --collect-only  no runs, numbers only

Every run is one process of one thread, but for --scale cluster, whose runs are SLURM jobs. Runs
that are done are kept, and shared by the experiments in one folder; the same command continues. The
numbers of finished runs are written to FOLDER/NAME.jsonl.gz at the end, or with --collect-only.

For a GPU that is at hand for minutes, make the corpora with --prepare where the text is, copy the
folder to the same place below the checkout of the other machine, and continue there with --resume.
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.claims.analysis import Results
from benchmarks.claims.collect import collect, write_rows
from benchmarks.claims.experiment import (
    Experiment,
    Scale,
    experiment_names,
    read_experiment,
    read_pairs,
    read_scale,
)
from benchmarks.claims.graph import Graph, in_order
from benchmarks.claims.page import draw
from benchmarks.claims.runner import (
    CommandLauncher,
    ForkLauncher,
    Launch,
    StageFailed,
    is_done,
    make_all,
)

OWN_TEXTS = "own"
OF_DATA = ("text", "noise", "tokenizer", "corpus")


def main(argv: list[str] | None = None, launch: Launch | None = None) -> int:
    """The program; `launch` starts the stages' programs in its tests."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        experiment, scale = read_experiment(options.name), read_scale(options.scale)
        graphs = make_graphs(experiment, scale, options)
    except ValueError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    arms = options.arms or list(experiment.arms)
    if not options.collect_only:
        code = _run(graphs, arms, options, launch or _launcher(scale))
        if code or options.dry_run or options.prepare:
            return code
    rows = collect(graphs, options.folder)
    path = (options.output or options.folder) / f"{experiment.name}.jsonl.gz"
    write_rows(path, rows)
    finished = sum(row["kind"] == "arm" for row in rows)
    print(f"{path}: {finished} finished runs of arms")
    if options.figures and finished:
        draw(Results(rows), options.figures)
    return 0


def make_graphs(experiment: Experiment, scale: Scale, options: argparse.Namespace) -> list[Graph]:
    """One for every pair and seed. ValueError names an unknown pair, arm or text folder."""
    pairs = {OWN_TEXTS: {}} if options.texts else dict(read_pairs())
    wanted = list(pairs) if options.texts else options.pairs or experiment.pairs
    if unknown := set(wanted) - set(pairs):
        raise ValueError(f"--pairs: got {sorted(unknown)}; expected some of {list(pairs)}")
    if unknown := set(options.arms) - set(experiment.arms):
        raise ValueError(f"--arms: got {sorted(unknown)}; expected some of {list(experiment.arms)}")
    if not scale.characters and not options.texts:
        raise ValueError(
            f"--scale {scale.name}: needs --texts DIR with corpus.jsonl, curated.jsonl and "
            "held_out.jsonl of your own"
        )
    seeds = range(1, (options.seeds or experiment.seeds) + 1)
    return [
        Graph(experiment, scale, pair, pairs[pair], seed, str(options.texts or ""))
        for pair in wanted
        for seed in seeds
    ]


def _say(text: str) -> None:
    print(text, flush=True)


def _launcher(scale: Scale) -> Launch:
    on_cpu = scale.settings.get("device", {}).get("kind") == "cpu"
    return ForkLauncher() if on_cpu and not scale.launch else CommandLauncher(scale.launch)


def _run(graphs: list[Graph], arms: list[str], options: argparse.Namespace, launch: Launch) -> int:
    stages = []
    for graph in graphs:
        stages += [*graph.arms(arms).values(), *graph.measures(arms)]
    if options.prepare:
        stages = [stage for stage in in_order(stages) if stage.kind in OF_DATA]
    if options.dry_run:
        for stage in in_order(stages):
            print("done " if is_done(stage, options.folder) else "to do", stage.key)
        return 0

    if any(options.folder.glob("done/*.json")) and not options.resume:
        print(
            f"claims: {options.folder} holds runs already; continue there with --resume, or give "
            "another --folder",
            file=sys.stderr,
        )
        return 2

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        make_all(stages, options.folder, launch, options.jobs, _say, graphs[0].scale.workers)
    except (StageFailed, OSError, ValueError) as error:
        print(f"claims: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if isinstance(launch, (CommandLauncher, ForkLauncher)):
            launch.stop()
        print("claims: stopped; --resume continues", file=sys.stderr)
        return 85
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=f"one of {', '.join(experiment_names())}")
    parser.add_argument("--scale", default="cpu", help="smoke, cpu (default), gpu or cluster")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"), help="of the runs")
    parser.add_argument("--seeds", type=int, default=0, help="default: the experiment's")
    parser.add_argument("--pairs", nargs="+", default=[], help="default: the experiment's")
    parser.add_argument("--arms", nargs="+", default=[], help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--texts", type=Path, help="folder with text of your own")
    parser.add_argument("--output", type=Path, help="folder of NAME.jsonl.gz (default: --folder)")
    parser.add_argument("--figures", type=Path, help="draw the figures into this folder at the end")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="make the corpora only, for another machine to train on",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the stages")
    parser.add_argument("--collect-only", action="store_true", help="run nothing, keep numbers")
    parser.add_argument("--resume", action="store_true", help="continue in a folder that has runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
