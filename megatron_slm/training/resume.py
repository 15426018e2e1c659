"""What may change between two starts of a run, and what happens then; compared before any process
group starts.

A checkpoint identifies what the run reads by content: the fingerprints of corpora, scores,
reference and validation corpora. The same name with other content is refused, because it happens by
accident; another name is a change that is made on purpose. (Model and tokenizer are compared by
checkpoint/architecture.py.)
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    complete_checkpoints,
    read_checkpoint_info,
)
from megatron_slm.config.load import ConfigError, flatten, load_yaml, to_mapping
from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import tokens_per_step
from megatron_slm.data.corpora import Corpus
from megatron_slm.data.position import CorpusPosition, DataPosition, is_count
from megatron_slm.files.plain import read_json_object
from megatron_slm.training.run_length import Done, RunLength, shorter_than_done

Fingerprints = dict[str, dict[str, str]]
"""Setting -> path, as the configuration has it -> fingerprint of what lies there."""
ADVICE = {
    "data.train": "put the old one back, or give the new one another name: it is then read from "
    "its beginning",
    "selection.reference.scores": "put the old ones back, or give the new ones another name",
    "selection.reference.checkpoint": "name the step_* folder of the old one, or give the new one "
    "another name",
}


@dataclass(frozen=True)
class Saved:
    """Where a checkpoint stands, and on what it was trained."""

    done: Done
    step_tokens: int
    """Tokens of its last step."""
    sequence_length: int
    position: DataPosition | None
    """None (as `fingerprints`) in a checkpoint of a version that did not store it."""
    fingerprints: Fingerprints | None


def read_saved(checkpoint: Path) -> Saved:
    """What a checkpoint records about its run. ValueError when it cannot be read."""
    info = read_checkpoint_info(checkpoint)
    trainer = read_json_object(checkpoint, "trainer.json")
    try:
        return _saved(info, trainer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint / 'trainer.json'} does not say where its run stands ({error!r}); use an "
            "older step_* folder"
        ) from error


def _saved(info: CheckpointInfo, trainer: dict) -> Saved:
    if "data" in trainer:
        position = DataPosition.from_json(trainer["data"])
        done = Done(trainer["step"], info.tokens_processed, trainer["samples"])
    else:  # in old checkpoints tokens_processed is steps x the last batch size; samples are exact
        position = None
        samples = trainer["loader"]["consumed_samples"]
        done = Done(trainer["step"], samples * info.sequence_length, samples)
    if not all(is_count(count) for count in (done.steps, done.tokens, done.samples)):
        raise ValueError(f"{done} are no counts")
    step_tokens = trainer.get("step_tokens", done.tokens // max(1, done.steps))
    fingerprints = trainer.get("inputs")
    if fingerprints is not None:
        fingerprints = {setting: dict(by_path) for setting, by_path in fingerprints.items()}
    return Saved(done, step_tokens, info.sequence_length, position, fingerprints)


def newest_saved(run_folder: str | Path) -> Saved | None:
    """The newest checkpoint of a run folder that can be read; None when there is none. Content is
    not hashed here.
    """
    for checkpoint in reversed(complete_checkpoints(Path(run_folder, "checkpoints"))):
        try:
            return read_saved(checkpoint)
        except ValueError:
            continue  # damaged: the start of the run reports it and takes the one before
    return None


def planned_length(config: Config) -> RunLength:
    """The length of the run, as far as it can be known before its checkpoint is loaded."""
    saved = newest_saved(config.run.folder)
    return RunLength(config, saved.done if saved else Done())


def fingerprints_of(
    config: Config, corpora: list[Corpus], validation: dict[str, Corpus]
) -> Fingerprints:
    """Fingerprints of what a run reads beside its training corpora, for its checkpoints."""
    reference = config.selection.reference
    scores: dict[str, str] = {}
    if reference.scores:
        for path, corpus in zip(reference.scores, corpora, strict=True):
            assert corpus.scores is not None  # a store is opened for each path
            scores[str(path)] = corpus.scores.manifest.fingerprint
    fingerprints: Fingerprints = {
        "data.validation": {
            corpus.prefix: corpus.manifest.fingerprint for corpus in validation.values()
        },
        "selection.reference.scores": scores,
        "selection.reference.checkpoint": {},
    }
    if reference.checkpoint:
        fingerprint = read_checkpoint_info(reference.checkpoint).fingerprint
        fingerprints["selection.reference.checkpoint"][reference.checkpoint] = fingerprint
    return fingerprints


def wanted_position(config: Config, corpora: list[Corpus]) -> DataPosition:
    """The arrangement of the data under this configuration, with nothing read yet."""
    weights = config.data.weights or [corpus.manifest.tokens for corpus in corpora]
    return DataPosition(
        config.data.sequence_length,
        config.run.seed,
        tuple(weights) if len(corpora) > 1 else (),
        tuple(CorpusPosition(corpus.prefix, corpus.manifest.fingerprint) for corpus in corpora),
    )


def position_before(saved: Saved, wanted: DataPosition) -> DataPosition:
    """Where the data of the run stood.

    An old checkpoint records how many samples were read, but not of which corpora; `_changed_order`
    has made sure that the corpora and their order are still the same.
    """
    if saved.position is not None:
        return saved.position
    return DataPosition(
        saved.sequence_length, wanted.seed, wanted.weights, wanted.corpora, (), saved.done.samples
    )


def bad_settings(saved: Saved, config: Config) -> list[str]:
    """Settings with which this run cannot go on."""
    problem = shorter_than_done(config, saved.done, saved.step_tokens)
    problems = [problem] if problem else []
    if saved.position is None:
        problems += _changed_order(config)
    return problems


def bad_data(saved: Saved, wanted: DataPosition, fingerprints: Fingerprints) -> list[str]:
    """Corpora, scores and checkpoints of the same name as before, whose content has changed."""
    step = saved.done.steps
    problems: list[str] = []
    if saved.position is not None:
        saved_corpora = (*saved.position.left_out, *saved.position.corpora)
        before = {corpus.prefix: corpus.fingerprint for corpus in saved_corpora}
        problems += [
            _other_content("data.train", corpus.prefix, corpus.fingerprint, before, step)
            for corpus in wanted.corpora
            if before.get(corpus.prefix, corpus.fingerprint) != corpus.fingerprint
        ]
    for setting in ("selection.reference.scores", "selection.reference.checkpoint"):
        before = (saved.fingerprints or {}).get(setting, {})
        problems += [
            _other_content(setting, path, fingerprints[setting][path], before, step)
            for path in _changed(saved, setting, fingerprints)
        ]
    return list(dict.fromkeys(problems))  # a corpus may be named twice


def notes(
    saved: Saved, config: Config, wanted: DataPosition, fingerprints: Fingerprints
) -> list[tuple[str, str]]:
    """Messages (text, level) about changes with which the run can go on."""
    step = saved.done.steps
    sentences = position_before(saved, wanted).changes(wanted)
    sentences += [
        f"data.validation {path}: its content has changed since step {step}; losses before and "
        "after are of different text, also those that checkpoint.keep_best compares"
        for path in _changed(saved, "data.validation", fingerprints)
    ]
    batches = config.monitoring.validation_batches
    step_tokens = tokens_per_step(config)
    if config.data.validation and batches and step_tokens != saved.step_tokens:
        sentences.append(
            f"monitoring.validation_batches: {batches} global batches are "
            f"{batches * step_tokens:,} tokens now, and were {batches * saved.step_tokens:,} "
            "before; where a validation corpus has more, losses before and after are of different "
            "text"
        )
    if saved.position is None:
        sentences.append(
            "this checkpoint was saved by an earlier version, without the fingerprints of corpora "
            "and scores; that they are those it was trained on cannot be checked this time"
        )
    return [(text, "warning") for text in sentences]


def changed_settings(folder: Path, config: Config) -> list[tuple[str, str]]:
    """Settings that differ from those of the start before, as warnings: a resumed run may change,
    but never unseen.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return []
    before = flatten(to_mapping(load_yaml(path)))
    now = flatten(to_mapping(config))
    return [
        (f"{name} was {before.get(name)!r} when this run started, and is {value!r} now", "warning")
        for name, value in now.items()
        if before.get(name) != value
    ]


def _changed_order(config: Config) -> list[str]:
    """Changed settings that rule out resuming from an old checkpoint, which does not record how
    much of each corpus was read, or with which seed.
    """
    path = Path(config.run.folder, "config.yaml")
    try:
        before = load_yaml(path)
    except ConfigError:  # none, or not readable: nothing to compare with
        return []
    settings = {
        "run.seed": (before.run.seed, config.run.seed),
        "data.train": (before.data.train, config.data.train),
    }
    if len(config.data.train) > 1:
        settings["data.weights"] = (before.data.weights, config.data.weights)
    return [
        f"{name}: got {now}, and this run was started with {was}; its checkpoint was saved by an "
        "earlier version, which did not note what was read of each corpus: go on with the old "
        "value until a checkpoint is saved, and change it then"
        for name, (was, now) in settings.items()
        if was != now
    ]


def _changed(saved: Saved, setting: str, fingerprints: Fingerprints) -> list[str]:
    """Paths of a setting under which other content lies than before."""
    before = (saved.fingerprints or {}).get(setting, {})
    return [
        path
        for path, fingerprint in fingerprints[setting].items()
        if before.get(path, fingerprint) != fingerprint
    ]


def _other_content(
    setting: str, path: str, fingerprint: str, before: dict[str, str], step: int
) -> str:
    return (
        f"{setting} {path}: its content has changed, it is {_short(fingerprint)} and was "
        f"{_short(before[path])} at step {step} of this run; {ADVICE[setting]}"
    )


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
