"""Join corpora end to end, for example the shards of an array job.

    python -m data_tools.merge --input 'data/corpus.shard-*-of-00008' --output-prefix data/corpus

The tokens are copied as bytes; the result is what one run over the same input writes, to the byte.
Shards of one run are put in their order, and a missing, foreign or damaged one is an error. Other
corpora are joined in the order given, if they have the same tokenizer, token dtype and
end-of-document policy. Statistics are joined too, where every part has them.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from data_tools.corpus_arguments import corpus_prefix
from data_tools.writing.corpus_files import CorpusCopy, finished_before
from data_tools.writing.statistics_report import (
    merged_statistics,
    read_statistics,
    write_statistics,
)
from megatron_slm import __version__
from megatron_slm.config.arguments import Program
from megatron_slm.data.indexed import check_bin_size, read_index
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.installation import says_missing_extra
from megatron_slm.tokenization import tokenizer_differences

PROGRAM = "data_tools.merge"


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="C",
        help="prefixes of corpora (without .bin), or globs of prefixes in quotes",
    )
    parser.add_argument("--output-prefix", required=True, metavar="C", help="the joined corpus")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a corpus under the output prefix"
    )
    return parser


def find_prefixes(arguments: list[str]) -> list[str]:
    """Prefixes named directly, or by globs that match manifests.

    Raises ValueError when an argument names nothing.
    """
    prefixes: list[str] = []
    for argument in arguments:
        prefix = corpus_prefix(argument)
        if Path(f"{prefix}.manifest.json").exists() or not glob.has_magic(prefix):
            prefixes.append(prefix)
            continue
        found = sorted(glob.glob(f"{prefix}.manifest.json"), key=os.fsencode)
        if not found:
            raise ValueError(
                f"--input {prefix}: no corpus matches (looked for {prefix}.manifest.json)"
            )
        prefixes += [path.removesuffix(".manifest.json") for path in found]
    if len(set(prefixes)) != len(prefixes):
        twice = next(prefix for prefix, count in Counter(prefixes).items() if count > 1)
        raise ValueError(f"--input names {twice} twice; its documents would be in the corpus twice")
    return prefixes


def in_order(corpora: dict[str, CorpusManifest]) -> list[str]:
    """Prefixes in the order to join them: shards by number, anything else as given.

    Raises ValueError when shards of one run are missing or mixed with others.
    """
    shards = {prefix: manifest.shard for prefix, manifest in corpora.items() if manifest.shard}
    if not shards:
        return list(corpora)
    if len(shards) != len(corpora):
        whole = next(prefix for prefix in corpora if prefix not in shards)
        raise ValueError(
            f"{whole} is a whole corpus, the others are shards of one; merge the shards first"
        )
    first = next(iter(shards.values()))
    for prefix, shard in shards.items():
        if (shard["plan"], shard["count"]) != (first["plan"], first["count"]):
            raise ValueError(
                f"{prefix} is a shard of another run: its inputs or the number of shards differ "
                f"from those of {next(iter(shards))}"
            )
    missing = sorted(set(range(first["count"])) - {shard["index"] for shard in shards.values()})
    if missing or len(shards) != first["count"]:
        raise ValueError(
            f"shards {missing} of {first['count']} are missing; run them first "
            f"(--shard i/{first['count']})"
        )
    return sorted(corpora, key=lambda prefix: shards[prefix]["index"])


def check_alike(corpora: dict[str, CorpusManifest]) -> None:
    """Raises ValueError unless all corpora have one tokenizer, token dtype and document policy."""
    first_prefix, first = next(iter(corpora.items()))
    for prefix, manifest in corpora.items():
        if differences := tokenizer_differences(manifest.tokenizer, first.tokenizer):
            raise ValueError(
                f"{prefix} and {first_prefix} cannot be joined: they have different tokenizers, "
                f"{manifest.tokenizer['path']} and {first.tokenizer['path']}: "
                f"{'; '.join(differences)}"
            )
        for name, ours, theirs in (
            ("token dtype", manifest.token_dtype, first.token_dtype),
            ("append_eod", manifest.append_eod, first.append_eod),
            ("prepend_bos", manifest.prepend_bos, first.prepend_bos),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{prefix} and {first_prefix} cannot be joined: {name} {ours} and {theirs}"
                )


def merge(prefixes: list[str], output_prefix: str, *, overwrite: bool = False) -> CorpusManifest:
    """Join the corpora and return the new manifest.

    Raises ValueError with a sentence; then nothing is published.
    """
    corpora = {prefix: CorpusManifest.read(prefix) for prefix in prefixes}
    prefixes = in_order(corpora)
    check_alike(corpora)
    if output_prefix in prefixes:
        raise ValueError(f"--output-prefix {output_prefix} is one of the inputs")
    if not overwrite and (finished := _finished_before(output_prefix, prefixes, corpora)):
        return finished
    indexes = {}
    for prefix in prefixes:
        indexes[prefix] = read_index(f"{prefix}.idx")
        check_bin_size(prefix, indexes[prefix])
        if indexes[prefix].documents != len(indexes[prefix].sequence_lengths_tokens):
            raise ValueError(f"{prefix}: documents of several sequences are not supported")
    dtype = indexes[prefixes[0]].dtype
    with (
        CorpusCopy(output_prefix, dtype, overwrite=overwrite) as copy,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        for prefix in progress.track(prefixes, description="copying"):
            if copy.copy_file(f"{prefix}.bin") != corpora[prefix].bin_sha256:
                raise ValueError(
                    f"{prefix}.bin: the content has changed since the corpus was made. Make it "
                    "again."
                )
            copy.add_lengths(indexes[prefix].sequence_lengths_tokens[:])
        manifest = copy.finish(corpora[prefixes[0]], **_history(prefixes, corpora))
    parts = []
    for prefix in prefixes:
        statistics = read_statistics(prefix, corpora[prefix])
        if statistics is not None:
            parts.append((indexes[prefix].sequence_lengths_tokens, statistics))
    if len(parts) == len(prefixes):
        write_statistics(
            Path(f"{output_prefix}.statistics.json"),
            merged_statistics(parts, shards=bool(corpora[prefixes[0]].shard)),
        )
    return manifest


def _finished_before(
    output_prefix: str, prefixes: list[str], corpora: dict[str, CorpusManifest]
) -> CorpusManifest | None:
    """The joined corpus when an earlier call has made it from the same parts; None when there is
    none.

    Raises ValueError when it was made from others.
    """
    now = {"parts": [corpora[prefix].fingerprint for prefix in prefixes]}
    manifest = finished_before(output_prefix, PROGRAM, _made_from, now)
    if manifest is not None:
        print(f"{output_prefix}: done before, from the same parts")
    return manifest


def _made_from(joined: CorpusManifest) -> dict[str, Any]:
    return {"parts": [part["fingerprint"] for part in joined.created_by["parts"]]}


def _history(prefixes: list[str], corpora: dict[str, CorpusManifest]) -> dict[str, Any]:
    """The combined history fields of the parts' manifests."""
    manifests = [corpora[prefix] for prefix in prefixes]
    reasons: Counter[str] = Counter()
    filters: Counter[str] = Counter()
    for manifest in manifests:
        reasons += Counter(manifest.rejected.get("reasons", {}))
        filters += Counter(manifest.filters)
    if manifests[0].shard:
        sources = _sum_sources([manifest.sources for manifest in manifests])
    else:
        sources = [source for manifest in manifests for source in manifest.sources]
    return {
        "sources": sources,
        "rejected": {"records": sum(reasons.values()), "reasons": dict(reasons)},
        "filters": dict(filters),
        "created_by": {
            "program": PROGRAM,
            "version": __version__,
            "parts": [
                {
                    "name": Path(prefix).name,
                    "fingerprint": corpora[prefix].fingerprint,
                    "documents": corpora[prefix].documents,
                    "tokens": corpora[prefix].tokens,
                }
                for prefix in prefixes
            ],
        },
    }


def _sum_sources(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Counts of the same --input arguments over all shards.

    The content's checksums are listed, because each shard has its own.
    """
    merged = []
    for entries in zip(*parts, strict=True):
        total: dict[str, Any] = {"input": entries[0]["input"]}
        for name in ("records", "documents", "tokens", "text_bytes"):
            total[name] = sum(entry[name] for entry in entries)
        total["content_sha256"] = [entry["content_sha256"] for entry in entries]
        merged.append(total)
    return merged


@says_missing_extra("merge")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        prefixes = find_prefixes(arguments.input)
        Path(arguments.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        manifest = merge(prefixes, arguments.output_prefix, overwrite=arguments.overwrite)
    except ValueError as error:
        print(f"merge: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"merge: {error}. Nothing was published.", file=sys.stderr)
        return 4
    print(
        f"{arguments.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens "
        f"from {len(prefixes)} corpora"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
