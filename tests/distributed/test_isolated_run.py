"""A run with isolated documents, from corpus to metrics: what it validates is each document's loss
when it is run alone by plain torch.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_slm.config.schema import Config
from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.spawn import run_on_cpu

VOCABULARY = 50
LENGTH = 32


def make_config(folder: Path, policy: str) -> Config:
    config = Config()
    config.run.folder = str(folder / policy)
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=16,
        ffn_hidden_size=16,
        attention_heads=2,
        initialization_std=0.2,
    )
    config.data = dataclasses.replace(
        config.data,
        tokenizer="none",
        train=[str(folder / "corpus")],
        sequence_length=LENGTH,
        micro_batch_size=2,
        global_batch_size=2,
        document_policy=policy,
    )
    config.selection.scorer = "own_loss"
    config.schedule.train_steps = 1
    config.monitoring.validation_batches = 0
    config.monitoring.wandb.mode = "disabled"
    return config


def train(groups, folder: Path, policy: str) -> dict:
    """One step of a whole run with its validation before and after; returns the weights it began
    with.
    """
    from megatron.core.utils import unwrap_model

    from megatron_slm.data.scored_dataset import open_corpora
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.setup import RunInputs

    config = make_config(folder, policy)
    Path(config.run.folder).mkdir()
    corpora = open_corpora(config.data.train)
    run = TrainingRun(
        config,
        groups,
        RunInputs(SimpleNamespace(piece=str), corpora, {"whole": corpora[0]}, VOCABULARY),
    )
    run.start()
    state = {
        name: parameter.detach().clone()
        for name, parameter in unwrap_model(run.trainer.models)[0].named_parameters()
    }
    run.run()
    return state


@pytest.mark.parametrize("policy", ["packed", "isolated"])
def test_validation_is_the_loss_of_what_the_policy_lets_a_token_see(tmp_path, policy):
    documents = random_documents(12, 14, vocabulary_size=VOCABULARY, seed=3)
    write_corpus(tmp_path / "corpus", documents, vocabulary_size=VOCABULARY)
    [state] = run_on_cpu(train, tmp_path, policy)
    decoder = PlainDecoder(make_config(tmp_path, policy).model, VOCABULARY, state)
    flat = torch.cat([torch.from_numpy(document).long() for document in documents])
    number = torch.cat([torch.full((len(document),), i) for i, document in enumerate(documents)])
    losses = []
    with torch.no_grad():
        for first in range(0, len(flat) - 1, LENGTH):
            tokens = flat[first : first + LENGTH + 1]
            inside = number[first : first + LENGTH + 1]
            pieces = (
                [tokens[inside == i] for i in inside.unique()] if policy == "isolated" else [tokens]
            )
            counted = [slice(None)] if policy == "isolated" else [inside[1:] == inside[:-1]]
            for piece, kept in zip(pieces, counted * len(pieces), strict=True):
                losses.append(
                    decoder.loss(piece[None, :-1], piece[None, 1:])[0][kept]
                    if len(piece) > 1
                    else torch.empty(0)
                )
    records = [
        json.loads(line) for line in (tmp_path / policy / "metrics.jsonl").read_text().splitlines()
    ]
    before, after = [record for record in records if record["kind"] == "validation"]
    assert (
        before["validation/whole/tokens"]
        == len(torch.cat(losses))
        == after["validation/whole/tokens"]
    )
    assert before["validation/whole/loss"] == pytest.approx(
        float(torch.cat(losses).mean()), rel=1e-5
    )
