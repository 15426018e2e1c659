"""Text to indexed binary, beside Megatron-LM's own tool and datatrove's Megatron writer.

    python -m benchmarks.preprocess --corpus corpus.jsonl --tokenizer vocab.model \\
        --megatron-lm ../Megatron-LM
    python -m benchmarks.preprocess --make-corpus corpus.jsonl --bytes 120000000
    python -m benchmarks.preprocess --corpus corpus.jsonl --tokenizer vocab.model --memory
    python -m benchmarks.preprocess --write --tokens 35e6

The programs run one after another, in turn, `--rounds` times, each with the same workers on the
same input. The figure is MB of text per CPU second of all processes (a shared machine changes wall
time, hardly CPU time), wall time beside it. The outputs are compared byte for byte. `--megatron-lm`
is a checkout of Megatron-LM that fits the installed megatron-core (tag core_v0.16.1);
`--datatrove-python` an interpreter with datatrove; both are optional.

`--make-corpus` takes real text from installed packages. `--memory` runs ours on the corpus and on
20 copies of it. `--write` is writing alone, beside megatron-core's builder: gate C15 of
benchmarks/RESULTS.md.
"""

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.preprocess_corpus import make_corpus
from benchmarks.preprocess_programs import Cost, programs
from megatron_slm.files.hashing import file_sha256

HEADER = (
    "\n| program | CPU s | of it start-up | MB per CPU s, all | MB per CPU s, after start-up "
    "| MB/s wall | peak RSS of a process (MB) | ours is faster, all | after start-up |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
OUTPUTS = {"ours, plain encoder": "plain", "Megatron-LM": "megatron_text_document"}
"""Programs whose output must equal ours, and its prefix."""


@dataclass
class Measured:
    """What the programs cost on the corpus."""

    text_bytes: int
    costs: dict[str, list[Cost]]
    start_up_seconds: dict[str, float]
    """CPU seconds of each program for a handful of documents: imports and process starts."""
    same: dict[str, bool]
    """Whether a program's output equals ours."""
    single_call: float
    """MB per CPU second of the tokenizer alone."""


def compare(arguments: argparse.Namespace) -> None:
    text_bytes = corpus_text_bytes(arguments.corpus)
    with tempfile.TemporaryDirectory(prefix="slm-benchmark-") as name:
        folder = Path(name)
        chosen = programs(arguments, arguments.corpus, folder)
        costs: dict[str, list[Cost]] = {program: [] for program in chosen}
        for number in range(arguments.rounds):
            for program, command in chosen.items():
                shutil.rmtree(folder / "datatrove", ignore_errors=True)
                cost = command.run()
                costs[program].append(cost)
                print(
                    f"round {number + 1} {program}: "
                    f"{text_bytes / cost.cpu_seconds / 1e6:.2f} MB per CPU second, "
                    f"{text_bytes / cost.wall_seconds / 1e6:.2f} MB/s wall, "
                    f"{cost.cpu_seconds:.1f} CPU s",
                    flush=True,
                )
        start_up_seconds = start_up_costs(arguments, folder)
        same = {
            program: same_files(folder / "ours", folder / prefix)
            for program, prefix in OUTPUTS.items()
            if program in chosen
        }
        single_call = single_call_speed(arguments.tokenizer, arguments.corpus)
    report(Measured(text_bytes, costs, start_up_seconds, same, single_call))


def start_up_costs(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """CPU seconds each program needs for a handful of documents."""
    few = folder / "few.jsonl"
    with open(arguments.corpus, encoding="utf-8") as lines:
        few.write_text("".join(itertools.islice(lines, 5)), encoding="utf-8")
    (folder / "start-up").mkdir()
    chosen = programs(arguments, str(few), folder / "start-up")
    return {program: command.run().cpu_seconds for program, command in chosen.items()}


def report(measured: Measured) -> None:
    megabytes = measured.text_bytes / 1e6
    cpu = {}
    net = {}
    for program, rounds in measured.costs.items():
        cpu[program] = statistics.median(cost.cpu_seconds for cost in rounds)
        net[program] = cpu[program] - measured.start_up_seconds[program]
    print(HEADER)
    for program, rounds in measured.costs.items():
        wall_seconds = statistics.median(cost.wall_seconds for cost in rounds)
        peak_mb = max(cost.peak_rss_mb for cost in rounds)
        print(
            f"| {program} | {cpu[program]:.1f} | {measured.start_up_seconds[program]:.1f} "
            f"| {megabytes / cpu[program]:.2f} | {megabytes / net[program]:.2f} "
            f"| {megabytes / wall_seconds:.2f} | {peak_mb:.0f} "
            f"| {cpu[program] / cpu['ours']:.2f}× | {net[program] / net['ours']:.2f}× |"
        )
    plain = megabytes / cpu["ours, plain encoder"] / measured.single_call
    print(
        "\nSentencePiece `encode`, one call per document, one thread: "
        f"{measured.single_call:.2f} MB per CPU second; "
        f"ours reaches {megabytes / cpu['ours'] / measured.single_call:.0%} of it, "
        f"the plain encoder {plain:.0%}."
    )
    for program, equal in measured.same.items():
        print(f"output equals that of {program}, byte for byte: {'yes' if equal else 'NO'}")
    summary = {
        "text_bytes": measured.text_bytes,
        "cpu_seconds": cpu,
        "start_up_cpu_seconds": measured.start_up_seconds,
        "same": measured.same,
    }
    print(json.dumps(summary))
    if not all(measured.same.values()):
        raise SystemExit(1)


def same_files(first: Path, second: Path) -> bool:
    return all(
        file_sha256(f"{first}{suffix}") == file_sha256(f"{second}{suffix}")
        for suffix in (".bin", ".idx")
    )


def corpus_text_bytes(path: str) -> int:
    with open(path, encoding="utf-8") as lines:
        return sum(len(json.loads(line)["text"].encode()) for line in lines)


def single_call_speed(tokenizer: str, corpus: str, limit: int = 20_000_000) -> float:
    """MB per CPU second of the tokenizer alone."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    seen = 0
    seconds = 0.0
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            began = time.process_time()
            processor.encode(text)
            seconds += time.process_time() - began
            seen += len(text.encode())
            if seen > limit:
                break
    return seen / seconds / 1e6


def memory(arguments: argparse.Namespace, copies: int = 20) -> None:
    """Peak memory on the corpus and on 20 copies of it in one file."""
    with tempfile.TemporaryDirectory(prefix="slm-benchmark-") as name:
        folder = Path(name)
        many = folder / "large.jsonl"
        with open(many, "wb") as joined:
            for _ in range(copies):
                with open(arguments.corpus, "rb") as stream:
                    shutil.copyfileobj(stream, joined, 16 << 20)
        small = programs(arguments, arguments.corpus, folder)["ours"].run()
        large = programs(arguments, str(many), folder)["ours"].run()
    print(
        f"peak RSS of the largest process: {small.peak_rss_mb:.0f} MB on one copy, "
        f"{large.peak_rss_mb:.0f} MB on {copies}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.make_corpus:
        make_corpus(arguments.make_corpus, arguments.bytes)
    elif arguments.write:
        from benchmarks.preprocess_writer import write  # imports megatron-core

        write(arguments.tokens, arguments.rounds)
    elif not (arguments.corpus and arguments.tokenizer):
        parser.error("--corpus and --tokenizer are needed")
    elif arguments.memory:
        memory(arguments)
    else:
        compare(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", help="jsonl with the key text")
    parser.add_argument("--tokenizer", help="SentencePiece .model")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron-lm", metavar="DIR", help="checkout of Megatron-LM")
    parser.add_argument(
        "--megatron-path", metavar="DIR", help="further packages its trainer imports (six)"
    )
    parser.add_argument("--datatrove-python", metavar="PYTHON")
    parser.add_argument(
        "--tokenizer-json", metavar="F", help="the same vocabulary as tokenizer.json, for datatrove"
    )
    parser.add_argument("--eos", default="</s>", help="for datatrove")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--write", action="store_true", help="measure the writer alone")
    parser.add_argument(
        "--tokens", type=lambda text: int(float(text)), default=35_000_000, help="of --write"
    )
    parser.add_argument(
        "--make-corpus", metavar="F.jsonl", help="write a corpus from installed packages, and stop"
    )
    parser.add_argument("--bytes", type=int, default=120_000_000, help="of --make-corpus")
    return parser


if __name__ == "__main__":
    main()
