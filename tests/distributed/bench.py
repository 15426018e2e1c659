"""What tests of training in several layouts share: random samples, a trainer, its steps on the rank
a process is, and the same samples whole for plain single-process torch.

A layout is a dict with tp, pp, vpp, cp, dp (default 1) and more of the test's own. B sequences of a
micro-batch, S tokens.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import ModelConfig

LENGTH = 16
VOCABULARY = 50


class SyntheticSamples:
    """Samples as ScoredDataset gives them: random tokens, some masked labels, some tokens without a
    score, many tied scores.

    With `isolate_documents`, of one to four documents, whose first tokens are no targets.
    """

    def __init__(self, count: int, isolate_documents: bool = False):
        self.count = count
        self.isolate_documents = isolate_documents

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        random = np.random.default_rng(index)
        text = random.integers(0, VOCABULARY, LENGTH + 1)
        reference = np.round(random.uniform(3, 5, LENGTH), 1).astype(np.float32)
        reference[random.random(LENGTH) < 0.05] = np.nan
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (random.random(LENGTH) > 0.1).astype(np.float32),
            "position_ids": np.arange(LENGTH),
            "corpus_id": np.int64(0),
            "reference_loss": reference,
        }
        if self.isolate_documents:
            begins = np.unique([0, *random.integers(1, LENGTH, index % 4)])
            documents = np.searchsorted(begins, np.arange(LENGTH), side="right") - 1
            sample["document_start"] = begins[documents]
            sample["position_ids"] = sample["position_ids"] - sample["document_start"]
            sample["loss_mask"][begins[1:] - 1] = 0.0
        return sample


def cut_back(whole: Path, run: Path, step: int) -> None:
    """Make `run` the run folder of `whole` as a kill after `step` would have left it, but for files
    beside its checkpoints.
    """
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def whole_batch(samples, indices: Iterable[int]) -> dict[str, torch.Tensor]:
    """These samples side by side, each column as one tensor."""
    columns: dict[str, list] = {}
    for index in indices:
        for name, values in samples[index].items():
            columns.setdefault(name, []).append(values)
    return {name: torch.from_numpy(np.stack(rows)) for name, rows in columns.items()}


def assert_same_step(
    ranks: list[dict], step: int, selected: set[int], grad_norm: float
) -> list["StepRecord"]:
    """Every rank's gradient norm of a step, and the tokens selected by all, are plain torch's; the
    step as ranks of the last pipeline stage saw it.

    A rank is a dict with "steps", a StepRecord for each, and "last_stage".
    """
    for rank in ranks:
        found = rank["steps"][step].grad_norm
        assert found == pytest.approx(grad_norm, rel=2e-4), (
            f"step {step}: another gradient norm, {found} for {grad_norm}"
        )
    last_stage = [rank["steps"][step] for rank in ranks if rank["last_stage"]]
    chosen = set().union(*(found.selected for found in last_stage))
    assert chosen == selected, (
        f"step {step}: another set of tokens, which differs in {sorted(chosen ^ selected)}"
    )
    return last_stage


def rows_in_populations(scope: str, sequences: int, width: int) -> list[list[int]]:
    """The rows of a global batch that compete with each other: `width` of them at once, or what the
    scope says.
    """
    size = {"sequence": 1, "global_batch": sequences}.get(scope, width)
    everything = list(range(sequences))
    return [everything[first : first + size] for first in range(0, sequences, size)]


def make_trainer(groups, config, vocabulary_size: int = VOCABULARY, reference=None):
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.training.step import Trainer
    from megatron_slm.training.token_selector import TokenSelector

    models = wrap_data_parallel(build_model(config, vocabulary_size, groups), config)
    selector = TokenSelector(
        config.selection, groups, sequence_length=config.data.sequence_length, corpora=1
    )
    return Trainer(models, build_optimizer(models, config), selector, groups, reference)


def save_reference(groups, run: str, model: ModelConfig, window_tokens: int) -> None:
    """A checkpoint of `model` with its first weights, in the run folder `run`; every rank calls."""
    from dataclasses import asdict

    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.config.schema import Config, DataConfig
    from megatron_slm.model.build import build_model
    from megatron_slm.testing.corpora import TOKENIZER_FINGERPRINT

    config = Config(model=model, data=DataConfig(sequence_length=window_tokens))
    tokenizer = {"path": "none", "fingerprint": TOKENIZER_FINGERPRINT}
    info = CheckpointInfo(asdict(model), window_tokens, tokenizer, step=3, tokens_processed=300)
    models = build_model(config, model.vocabulary_size, groups)
    CheckpointStore(run, groups).save(models, None, info, trainer_state(None, groups))


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """This rank's weights by their local names."""
    from megatron.core.utils import unwrap_model

    return {
        name: parameter.detach().clone()
        for chunk in unwrap_model(trainer.models)
        for name, parameter in chunk.named_parameters()
    }


def local_steps(groups, config, samples, count: int, first: int = 0) -> Iterator[list]:
    """This rank's micro-batches of `count` steps."""
    from megatron_slm.data.batch import slice_for_context_parallel
    from megatron_slm.data.loader import TrainingLoader

    loader = TrainingLoader(
        samples,
        global_batch_size=config.data.global_batch_size,
        micro_batch_size=config.data.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        start_sample=first * config.data.global_batch_size,
    )
    try:
        for _ in range(count):
            yield [
                slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size).to(groups.device)
                for batch in loader.next_step()
            ]
    finally:
        loader.close()


@dataclass(frozen=True)
class StepRecord:
    """One step as its rank saw it."""

    noted: list
    """What was noted of the choice on each micro-batch, on the last pipeline stage."""
    summary: dict
    """The metrics, reduced over the ranks."""
    grad_norm: float

    @property
    def selected(self) -> set[int]:
        """The ids of this rank's selected tokens, if these were noted."""
        return set().union(*self.noted)


def selected_ids(batch, outputs, selection) -> set[int]:
    """A note for watch_selections: the ids of the tokens that have a weight."""
    return set(batch.token_id_BS[selection.weights > 0].tolist())


@contextlib.contextmanager
def watch_selections(selector, note: Callable) -> Iterator[list]:
    """A list of `note(batch, outputs, selection)` for each micro-batch of the steps taken
    meanwhile.

    A step asks the selector to describe every choice, after its loss is known: this is where this
    function looks, and the only place in the tests that knows it.
    """
    describe = selector.describe
    noted = []

    def noting(batch, outputs, selection, progress):
        noted.append(note(batch, outputs, selection))
        return describe(batch, outputs, selection, progress)

    selector.describe = noting
    try:
        yield noted
    finally:
        selector.describe = describe


def train(
    trainer,
    config,
    batches_of_steps: Iterable[list],
    *,
    first: int = 0,
    rate: float | None = None,
    note: Callable = selected_ids,
    summarise: Callable | None = None,
) -> Iterator[StepRecord]:
    """Take real steps from step `first` on; the learning rate is the schedule's unless given."""
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection import TrainingProgress, diagnostics
    from megatron_slm.training.learning_rate import learning_rate
    from megatron_slm.training.step import train_step

    metrics = Metrics(trainer.groups.device)
    step_tokens = config.data.global_batch_size * config.data.sequence_length
    with watch_selections(trainer.selector, note) as noted:
        for step, batches in enumerate(batches_of_steps, first):
            scheduled = learning_rate(config, step + 1, config.schedule.train_steps)
            progress = TrainingProgress(step, step * step_tokens)
            report = train_step(trainer, batches, progress, scheduled if rate is None else rate)
            metrics.add_all(report.measured)
            summary = metrics.reduce(
                trainer.groups.dp_cp, summarise=summarise or diagnostics.summarise
            )
            yield StepRecord(list(noted), summary, report.grad_norm)
            noted.clear()
