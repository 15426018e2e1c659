"""Text to indexed binary, beside Megatron-LM's own tool and datatrove's Megatron writer.

    python benchmarks/preprocess.py --corpus corpus.jsonl --tokenizer vocab.model --megatron-lm ../Megatron-LM
    python benchmarks/preprocess.py --make-corpus corpus.jsonl --bytes 120000000      real text from installed packages
    python benchmarks/preprocess.py --corpus corpus.jsonl --tokenizer vocab.model --memory
    python benchmarks/preprocess.py --write --tokens 35e6                              writing alone, beside megatron-core's builder (gate C15 of benchmarks/RESULTS.md)

The programs run one after another, in turn, `--rounds` times, each with the same workers on the same input. The figure is MB of
text per CPU second of all processes (a shared machine changes wall time, hardly CPU time), wall time beside it. The outputs are
compared byte for byte. `--megatron-lm` is a checkout of Megatron-LM that fits the installed megatron-core (tag core_v0.16.1);
`--datatrove-python` an interpreter with datatrove; both are optional. `--memory` runs ours on the corpus and on 20 copies of it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.files.hashing import file_sha256

ROOT = Path(__file__).resolve().parents[1]

# Importing Megatron-LM's trainer needs Triton for a kernel that preprocessing never calls; without Triton a stand-in is put there.
_MEGATRON_LAUNCHER = """
import importlib.util, runpy, sys, types
if importlib.util.find_spec("triton") is None:
    name = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__getattr__ = lambda attribute: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_DATATROVE_LAUNCHER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
if __name__ == "__main__":
    corpus, tokenizer, folder, workers, eos = sys.argv[1:]
    # fork, so that the CPU time of its workers is counted: a fork server is waited for by nobody
    tokenize = MegatronDocumentTokenizer(output_folder=folder, tokenizer_name_or_path=tokenizer, eos_token=eos)
    LocalPipelineExecutor([JsonlReader(corpus), tokenize], tasks=int(workers), workers=int(workers),
                          logging_dir=folder + "/logs", start_method="fork").run()
"""


@dataclass
class Cost:
    wall_seconds: float
    cpu_seconds: float
    peak_rss_mb: float
    """Of the largest single process."""


def run(command: list[str], environment: dict[str, str] | None = None) -> Cost:
    """Run to the end; CPU seconds of the process and all its descendants that it waited for."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = os.posix_spawn(
            command[0],
            command,
            {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                **(environment or {}),
            },
            file_actions=[
                (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(process, 0)
        if status:
            log.seek(0)
            raise SystemExit(
                f"{' '.join(command)[:300]} failed:\n{log.read().decode(errors='replace')[-3000:]}"
            )
    return Cost(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def commands(
    arguments: argparse.Namespace, corpus: str, folder: Path
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The programs to compare, by name: command and further environment."""
    ours = [
        sys.executable,
        "-m",
        "data_tools.preprocess",
        "--input",
        corpus,
        "--tokenizer",
        arguments.tokenizer,
        "--workers",
        str(arguments.workers),
        "--overwrite",
    ]
    found = {
        "ours": ([*ours, "--output-prefix", str(folder / "ours")], {"PYTHONPATH": str(ROOT)}),
        "ours, plain encoder": (
            [*ours, "--encoder", "plain", "--output-prefix", str(folder / "plain")],
            {"PYTHONPATH": str(ROOT)},
        ),
    }
    if arguments.megatron_lm:
        path = os.pathsep.join(filter(None, (arguments.megatron_lm, arguments.megatron_path)))
        found["Megatron-LM"] = (
            [
                sys.executable,
                "-c",
                _MEGATRON_LAUNCHER,
                f"{arguments.megatron_lm}/tools/preprocess_data.py",
                "--input",
                corpus,
                "--output-prefix",
                str(folder / "megatron"),
                "--tokenizer-type",
                "SentencePieceTokenizer",
                "--tokenizer-model",
                arguments.tokenizer,
                "--append-eod",
                "--workers",
                str(arguments.workers),
            ],
            {"PYTHONPATH": path},
        )
    if arguments.datatrove_python:
        if not arguments.tokenizer_json:
            raise SystemExit(
                "--datatrove-python needs --tokenizer-json: datatrove reads Hugging Face vocabularies only"
            )
        found["datatrove"] = (
            [
                arguments.datatrove_python,
                "-c",
                _DATATROVE_LAUNCHER,
                parts_of(corpus, arguments.workers, folder),
                arguments.tokenizer_json,
                str(folder / "datatrove"),
                str(arguments.workers),
                arguments.eos,
            ],
            {},
        )
    return found


def parts_of(corpus: str, workers: int, folder: Path) -> str:
    """A folder with the corpus in one file per worker: datatrove's unit of work is a file."""
    parts = folder / f"parts-{Path(corpus).name}"
    if not parts.exists():
        parts.mkdir(parents=True)
        with contextlib.ExitStack() as opened:
            lines = opened.enter_context(open(corpus, "rb"))
            names = [parts / f"{number}.jsonl" for number in range(workers)]
            streams = [opened.enter_context(open(name, "wb")) for name in names]
            for number, line in enumerate(lines):
                streams[number % workers].write(line)
    return str(parts)


def compare(arguments: argparse.Namespace) -> None:
    text_bytes = corpus_text_bytes(arguments.corpus)
    with tempfile.TemporaryDirectory(prefix="slm-benchmark-") as name:
        folder = Path(name)
        programs = commands(arguments, arguments.corpus, folder)
        costs: dict[str, list[Cost]] = {program: [] for program in programs}
        for number in range(arguments.rounds):
            for program, (command, environment) in programs.items():
                shutil.rmtree(folder / "datatrove", ignore_errors=True)
                cost = run(command, environment)
                costs[program].append(cost)
                print(
                    f"round {number + 1} {program}: {text_bytes / cost.cpu_seconds / 1e6:.2f} MB per CPU second, "
                    f"{text_bytes / cost.wall_seconds / 1e6:.2f} MB/s wall, {cost.cpu_seconds:.1f} CPU s",
                    flush=True,
                )
        start_up = start_up_costs(arguments, folder)
        same = {
            program: same_files(folder / "ours", folder / other)
            for program, other in (
                ("ours, plain encoder", "plain"),
                ("Megatron-LM", "megatron_text_document"),
            )
            if program in programs
        }
        single_call = single_call_speed(arguments.tokenizer, arguments.corpus)
    report(costs, start_up, same, text_bytes, single_call)


def start_up_costs(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """CPU seconds each program needs for a handful of documents: imports and process starts."""
    few = folder / "few.jsonl"
    with open(arguments.corpus, encoding="utf-8") as lines:
        few.write_text("".join(itertools.islice(lines, 5)), encoding="utf-8")
    (folder / "start-up").mkdir()
    return {
        program: run(command, environment).cpu_seconds
        for program, (command, environment) in commands(
            arguments, str(few), folder / "start-up"
        ).items()
    }


def report(
    costs: dict[str, list[Cost]],
    start_up: dict[str, float],
    same: dict[str, bool],
    text_bytes: int,
    single_call: float,
) -> None:
    median = {
        program: statistics.median(cost.cpu_seconds for cost in rounds)
        for program, rounds in costs.items()
    }
    net = {program: seconds - start_up[program] for program, seconds in median.items()}
    print(
        "\n| program | CPU s | of it start-up | MB per CPU s, all | MB per CPU s, after start-up | MB/s wall | peak RSS of a process "
        "(MB) | ours is faster, all | after start-up |\n|---|---|---|---|---|---|---|---|---|"
    )
    for program, rounds in costs.items():
        print(
            f"| {program} | {median[program]:.1f} | {start_up[program]:.1f} | {text_bytes / median[program] / 1e6:.2f} | "
            f"{text_bytes / net[program] / 1e6:.2f} | "
            f"{text_bytes / statistics.median(cost.wall_seconds for cost in rounds) / 1e6:.2f} | "
            f"{max(cost.peak_rss_mb for cost in rounds):.0f} | {median[program] / median['ours']:.2f}× | "
            f"{net[program] / net['ours']:.2f}× |"
        )
    print(
        f"\nSentencePiece `encode`, one call per document, one thread: {single_call:.2f} MB per CPU second; ours reaches "
        f"{text_bytes / median['ours'] / 1e6 / single_call:.0%} of it, the plain encoder "
        f"{text_bytes / median['ours, plain encoder'] / 1e6 / single_call:.0%}."
    )
    for program, equal in same.items():
        print(f"output equals that of {program}, byte for byte: {'yes' if equal else 'NO'}")
    print(
        json.dumps(
            {
                "text_bytes": text_bytes,
                "cpu_seconds": median,
                "start_up_cpu_seconds": start_up,
                "same": same,
            }
        )
    )
    if not all(same.values()):
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
        with open(folder / "large.jsonl", "wb") as large:
            for _ in range(copies):
                with open(arguments.corpus, "rb") as stream:
                    shutil.copyfileobj(stream, large, 16 << 20)
        small = run(*commands(arguments, arguments.corpus, folder)["ours"])
        large = run(*commands(arguments, str(folder / "large.jsonl"), folder)["ours"])
    print(
        f"peak RSS of the largest process: {small.peak_rss_mb:.0f} MB on one copy, {large.peak_rss_mb:.0f} MB on {copies}"
    )


def write(tokens: int, rounds: int, document_tokens: int = 500, batch_documents: int = 500) -> None:
    """C15: encoded documents to .bin and .idx. Ours gets them as bytes, in batches, as workers hand them over, and makes its checksums and
    its fsyncs; megatron-core's builder gets each as the list of ids that Megatron-LM's tool gives it."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from data_tools.writing.writer import CorpusWriter
    from megatron_slm.data.manifest import FORMAT_VERSION, CorpusManifest

    documents = tokens // document_tokens // batch_documents * batch_documents
    ids = np.random.RandomState(0).randint(0, 32000, (documents, document_tokens)).astype(np.uint16)
    lists = [row.tolist() for row in ids[:batch_documents]] * (
        documents // batch_documents
    )  # the builder takes as long for the same list again

    def builder(folder: Path) -> None:
        made = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
        for row in lists:
            made.add_document(row, [document_tokens])
        made.finalize(str(folder / "megatron.idx"))

    def ours(folder: Path) -> None:
        lengths = np.full(batch_documents, document_tokens, np.int32)
        with CorpusWriter(str(folder / "ours"), np.dtype(np.uint16), {}) as made:
            for _ in range(0, documents, batch_documents):
                made.append(repeated)
                made.add_documents(lengths)
            made.finish(
                lambda **sizes: CorpusManifest(
                    format_version=FORMAT_VERSION,
                    **sizes,
                    tokenizer={"vocabulary_size": 32000},
                    append_eod=True,
                    sources=[],
                    created_by={},
                    rejected={},
                ),
                {},
            )

    repeated = ids[:batch_documents].tobytes()
    seconds: dict[str, list[float]] = {"megatron-core's IndexedDatasetBuilder": [], "ours": []}
    for _ in range(rounds):
        for name, way in zip(seconds, (builder, ours), strict=True):
            with tempfile.TemporaryDirectory(prefix="slm-benchmark-") as folder:
                began = time.process_time()
                way(Path(folder))
                seconds[name].append(time.process_time() - began)
                found = {
                    suffix: file_sha256(f"{folder}/{'ours' if way is ours else 'megatron'}{suffix}")
                    for suffix in (".bin", ".idx")
                }
            if way is builder:
                expected = found
            elif found != expected:
                raise SystemExit("the two wrote different files")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print("| writer | CPU s | million tokens per CPU s |\n|---|---|---|")
    for name, time_seconds in median.items():
        print(
            f"| {name} | {time_seconds:.2f} | {documents * document_tokens / time_seconds / 1e6:.0f} |"
        )
    first, second = median.values()
    print(
        f"C15: {first / second:.1f}x (at least 10x), the same files byte for byte, {documents} documents of {document_tokens} tokens"
    )


def make_corpus(path: str, wanted_bytes: int) -> None:
    """jsonl of sources and documentation of what is installed here: every file once, in an order that mixes packages."""
    found = [
        Path(folder, name)
        for root in {
            sysconfig.get_path("stdlib"),
            sysconfig.get_path("purelib"),
            "/usr/share/doc",
            "/usr/include",
        }
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith((".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp"))
    ]
    found.sort(key=lambda file: hashlib.md5(str(file).encode()).digest())
    seen, written = set(), 0
    with open(path, "w", encoding="utf-8") as out:
        for file in found:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if not text.strip() or "\0" in text or len(text) > 300_000 or hash(text) in seen:
                continue
            seen.add(hash(text))
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text)
            if written >= wanted_bytes:
                break
    print(f"{path}: {len(seen)} documents, {written / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    arguments = parser.parse_args(argv)
    if arguments.make_corpus:
        make_corpus(arguments.make_corpus, arguments.bytes)
    elif arguments.write:
        write(arguments.tokens, arguments.rounds)
    elif not (arguments.corpus and arguments.tokenizer):
        parser.error("--corpus and --tokenizer are needed")
    elif arguments.memory:
        memory(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
