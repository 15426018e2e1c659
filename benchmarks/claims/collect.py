"""The numbers of finished runs as rows, and the compressed file they are kept in.

The first row (`kind` experiment) says what was run: declaration, sizes, sources, versions. Then
come rows of models (the base, references) and of arms, one per pair and seed.
"""

import gzip
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.claims.commands import corpus_prefix, text_folder
from benchmarks.claims.cost import scoring_flops, training_flops
from benchmarks.claims.experiment import BASE
from benchmarks.claims.graph import Graph, Stage, folder_of
from benchmarks.claims.runner import ROOT, is_done, read_note
from benchmarks.claims.token_noise import found_tokens
from megatron_slm.analysis.run_folder import PROCESSED, SELECTED, Run, read_run
from megatron_slm.config.load import flatten
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.files.atomic import write_bytes_atomically

LOSS = "validation/target/loss"
KEPT_METRICS = (
    "loss/all",
    "loss/selected",
    "loss/rejected",
    "loss/reference",
    "selection/kept_fraction",
    "selection/missed_fraction",
    "selection/extra_fraction",
)
BY_CORPUS = "selection/rate_by_corpus/"
Row = dict[str, Any]


def collect(graphs: Sequence[Graph], folder: Path) -> list[Row]:
    """The rows of what is done."""
    rows: list[Row] = [experiment_row(graphs, folder)]
    for graph in graphs:
        for name in graph.experiment.trainings:
            stage = graph.training(name)
            if is_done(stage, folder):
                rows.append(training_row(graph, name, stage, folder))
    return rows


def experiment_row(graphs: Sequence[Graph], folder: Path) -> Row:
    """What all runs have in common."""
    experiment, scale = graphs[0].experiment, graphs[0].scale
    texts = {graph.text.name: graph.text for graph in graphs}
    sources: dict[str, Row] = {pair: {} for pair in texts}
    for graph in graphs:
        stages = [graph.text, *(graph.corpus(kind).needs[0] for kind in experiment.planted)]
        for stage in stages:
            path = text_folder(stage, folder) / "sources.json"
            if path.is_file():
                sources[graph.text.name] |= json.loads(path.read_text())
    return {
        "kind": "experiment",
        "name": experiment.name,
        "declared": asdict(experiment),
        "scale": asdict(scale),
        "corpora": {pair: _corpora(graphs, pair, folder) for pair in texts},
        "sources": sources,
        "machine": machine(),
        "collected_by_revision": revision(),
    }


def _corpora(graphs: Sequence[Graph], pair: str, folder: Path) -> dict[str, Any]:
    """Tokens and fingerprints of a pair's corpora that are made."""
    found: dict[str, Any] = {}
    for graph in graphs:
        if graph.text.name != pair:
            continue
        names = ["corpus", "curated", "held_out", *graph.experiment.planted]
        for name in names:
            stage = graph.corpus(name)
            if name not in found and is_done(stage, folder):
                manifest = CorpusManifest.read(corpus_prefix(stage, folder))
                found[name] = {"tokens": manifest.tokens, "documents": manifest.documents}
                found[name] |= {"fingerprint": manifest.fingerprint}
    return found


def training_row(graph: Graph, name: str, stage: Stage, folder: Path) -> Row:
    """One finished run."""
    run = read_run(folder_of(stage, folder))
    note = read_note(stage, folder)
    return {
        "kind": "arm" if name in graph.experiment.arms else "model",
        "experiment": graph.experiment.name,
        "pair": graph.text.name,
        "seed": graph.seed,
        "name": name,
        "settings": flatten(note["identity"]["settings"].get("selection", {})),
        "validation": validation_points(run),
        "training": [_kept(record) for record in run.training],
        "warnings": run.warnings,
        "flops": costs(graph, name, stage, folder),
        "token_noise": found_tokens(graph, name, folder),
        "cpu_seconds": note["cpu_seconds"],
    }


def validation_points(run: Run) -> list[list[float]]:
    """[step, processed tokens, selected tokens, loss in nats] of every validation."""
    steps, losses = run.series(LOSS, "step")
    processed = run.series(LOSS, PROCESSED)[0]
    selected = run.series(LOSS, SELECTED)[0]
    columns = zip(steps, processed, selected, losses, strict=True)
    return [[int(a), int(b), round(float(c)), round(float(d), 6)] for a, b, c, d in columns]


def _kept(record: Row) -> Row:
    kept = {PROCESSED: record[PROCESSED]}
    for name, value in record.items():
        if name in KEPT_METRICS and isinstance(value, float):
            kept[name] = round(value, 5)
        if name.startswith(BY_CORPUS):  # named by the whole prefix; its last part is enough
            kept[BY_CORPUS + name.rpartition("/")[2]] = round(value, 5)
    return kept


def costs(graph: Graph, name: str, stage: Stage, folder: Path) -> dict[str, float]:
    """FLOPs of a run, of the references it needs beside the base, and of scoring with them.

    The run includes the arms that it starts from. Several arms share one reference and its scores.
    """
    trainings = graph.experiment.trainings
    training = trainings[name]
    found = {"run": _run_flops(graph, name, stage, folder), "reference": 0.0, "scoring": 0.0}
    earlier = training.start
    while earlier in graph.experiment.arms:
        found["run"] += _run_flops(graph, earlier, graph.training(earlier), folder)
        earlier = trainings[earlier].start
    if not reads_reference(stage):
        return found
    model = graph.experiment.stores[training.scores].model if training.scores else training.online
    if model and model != BASE:
        found["reference"] = _run_flops(graph, model, graph.training(model), folder)
    if training.scores:
        run = folder_of(graph.training(model), folder)
        for corpus in training.train:
            manifest = CorpusManifest.read(corpus_prefix(graph.corpus(corpus), folder))
            size = manifest.tokenizer["vocabulary_size"]
            found["scoring"] += scoring_flops(run, size, manifest.tokens)
    return found


def reads_reference(stage: Stage) -> bool:
    """Whether the choice depends on a reference: others have it for its metrics alone."""
    selection = stage.identity["settings"].get("selection", {})
    without = ("none", "random", "own_loss", "own_entropy")
    return selection.get("scorer", "none") not in without


def _run_flops(graph: Graph, name: str, stage: Stage, folder: Path) -> float:
    online = graph.experiment.trainings[name].online
    reference = folder_of(graph.training(online), folder) if online else None
    processed = validation_points(read_run(folder_of(stage, folder)))[-1][1]
    corpus = CorpusManifest.read(corpus_prefix(graph.corpus("held_out"), folder))
    size = corpus.tokenizer["vocabulary_size"]
    return training_flops(folder_of(stage, folder), size, processed, reference)


def machine() -> dict[str, str]:
    """Versions that results may depend on; no names of hosts or folders."""
    packages = ("torch", "megatron-core", "numpy", "sentencepiece")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "processor": platform.machine(), **versions}


def revision() -> str:
    """The revision of the checkout, with + where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as gzipped lines of JSON; the same rows are the same file."""
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, gzip.compress(text.encode(), 9, mtime=0))


def read_rows(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
