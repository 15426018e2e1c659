"""A reference run in the step and its stored scores tell the first step the same, through the
programs a user runs.

A stored score was made in a window of the corpus as it lies; a training sequence is S + 1 tokens of
shuffled documents, each S further on: in general a token has another context in each. Here they
coincide: every document has exactly S tokens, so a sequence is one document (its last label opens
the next one and is masked), and documents are scored in isolation with a window of S. The shuffle
then only changes the order, and every token is scored after exactly the tokens it is trained after.
What is left is the rounding of stored scores to fp16.
"""

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.testing.corpora import write_corpus
from megatron_slm.tokenization import load_tokenizer
from tests.end_to_end.tiny_run import (
    LENGTH,
    SEQUENCES,
    VOCABULARY,
    train,
    train_records,
    word_tokenizer,
)
from tests.end_to_end.warm_programs import run_program


def write_text(folder: Path) -> None:
    """A tokenizer and a corpus of one document for each sequence of the step."""
    word_tokenizer(folder / "tokenizer.json")
    random = np.random.RandomState(0)
    count = SEQUENCES + 1  # the last sequence needs one more token
    write_corpus(
        folder / "corpus",
        [random.randint(2, VOCABULARY, LENGTH) for _ in range(count)],
        vocabulary_size=VOCABULARY,
        tokenizer_fingerprint=load_tokenizer(folder / "tokenizer.json").fingerprint,
    )


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory):
    """The first train record of both runs."""
    folder = tmp_path_factory.mktemp("online")
    write_text(folder)
    of_reference = {"model.hidden_size": 16, "run.seed": 5, "schedule.train_steps": 2}
    train(folder, "reference", **of_reference)
    run_program(
        "megatron_slm.score",
        *("--checkpoint", folder / "reference", "--corpus", folder / "corpus"),
        *("--output", folder / "scores"),
        *("--window-tokens", LENGTH, "--document-policy", "isolated"),
    )
    selective = {"schedule.train_steps": 1, "selection.scorer": "excess_loss"}
    stored = {"selection.reference.scores": f"[{folder}/scores]"}
    online = {"selection.reference.checkpoint": folder / "reference"}
    records = {}
    for name, source in (("stored", stored), ("online", online)):
        train(folder, name, **selective, **source)
        records[name] = train_records(folder, name)[0]
    return records


def test_every_token_of_the_step_has_a_score(first_steps):
    """Otherwise the context was another one than intended, and the comparison below would be of
    other tokens.
    """
    for record in first_steps.values():
        assert record["selection/without_score"] == 0
        assert record["selection/non_finite_scores"] == 0


def test_the_model_s_own_loss_is_the_same(first_steps):
    assert first_steps["online"]["loss/all"] == pytest.approx(
        first_steps["stored"]["loss/all"], rel=1e-6
    )


def test_the_reference_loss_agrees_up_to_fp16_storage(first_steps):
    """Values of 4 to 8 nats are stored within 2^-9 nats; means of many agree much better."""
    stored, online = (first_steps[name]["loss/reference"] for name in ("stored", "online"))
    assert online == pytest.approx(stored, abs=2**-9)
    assert online > 1.0
    assert abs(first_steps["online"]["loss/all"] - online) > 0.01, (
        "the reference is another model than the one in training"
    )


def test_the_selection_agrees_up_to_tokens_at_the_threshold(first_steps):
    stored = first_steps["stored"]
    online = first_steps["online"]
    assert (
        online["tokens/selected"]
        == stored["tokens/selected"]
        == 2 * math.ceil(0.6 * SEQUENCES / 2 * (LENGTH - 1))
    )  # two micro-batches
    assert online["selection/threshold_nats"] == pytest.approx(
        stored["selection/threshold_nats"], abs=2**-8
    )
    for name in ("loss/selected", "loss/reference_selected", "optimizer/grad_norm"):
        assert online[name] == pytest.approx(stored[name], rel=5e-3), name
