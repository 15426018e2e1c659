"""The benchmarks of the threshold's time and of the selected set's exactness: what they compare is
right, what is wrong is found, and both run on a CPU.
"""

import math

import pytest
import torch

from benchmarks import selected_set, topk
from benchmarks.gpu_parts import smoke_parts
from benchmarks.library_words import library_tokens
from benchmarks.model_pair import Shape, checkpoint_pair, trained_pair
from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import run_on_cpu
from tests.unit.scoring.test_fp8_change import VOCABULARY, WINDOW, save_models

CPU = torch.device("cpu")
TINY = Shape(
    layers=1,
    hidden=32,
    vocabulary=64,
    sequence_tokens=32,
    sequences=4,
    steps=20,
    text_tokens=20_000,
    measured_tokens=1_024,
)


@pytest.mark.parametrize("name", topk.CASES)
def test_every_way_finds_the_same_threshold(name):
    row = topk.run_case(topk.CASES[name], CPU, 1_000, 0.6, rounds=1)
    assert row["correct"]
    assert not row["missed"], "the gate is a GPU's"
    assert row["peer"] in row["peers_median_seconds"]
    assert row["peer_median_seconds"] == min(row["peers_median_seconds"].values())
    assert row["scores"] == 1_000


def test_a_wrong_threshold_fails_the_case_whatever_its_speed(monkeypatch):
    monkeypatch.setattr(topk, "our_ways", lambda *_: {"radix": lambda: 0.0})
    row = topk.run_case(topk.CASES["G10-radix"], CPU, 1_000, 0.6, rounds=1)
    assert not row["correct"]
    assert row["missed"]


@pytest.mark.parametrize("keep_fraction", [0.001, 0.55, 1.0])
def test_ties_and_tokens_that_do_not_compete_nowhere_move_the_threshold(keep_fraction):
    ranked_N = torch.tensor([2.0, 1.0, 1.0, 1.0, -3.0] * 20)
    ways = topk.our_ways(ranked_N, keep_fraction) | topk.torch_ways(ranked_N, keep_fraction)
    (threshold,) = {way() for way in ways.values()}
    assert threshold == {0.001: 2.0, 0.55: 1.0, 1.0: -3.0}[keep_fraction]


def test_the_share_that_differs_by_hand():
    """Of the three largest of five, one is left out."""
    exact_N = selected_set.exact_choice(torch.tensor([5.0, 1, 4, 3, 2]).double(), 0.6)
    assert exact_N.tolist() == [True, False, True, True, False]
    other_N = torch.tensor([True, False, True, False, True])
    assert selected_set.differs(exact_N, other_N) == pytest.approx(1 / 3)
    assert selected_set.differs(exact_N, exact_N) == 0


def test_words_of_the_library_are_ranked_by_frequency():
    tokens = library_tokens(5_000, vocabulary=50)
    assert len(tokens) == 5_000
    assert set(tokens) == set(range(50))
    counts = [(tokens == rank).sum() for rank in range(49)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 5 * counts[-1]


def measure_pairs(groups, folder: str) -> dict[str, dict]:
    case = selected_set.CASES["G11"]
    model, reference = f"{folder}/model", f"{folder}/reference"
    pairs = {
        "trained": trained_pair(TINY, groups),
        "checkpoints": checkpoint_pair(model, reference, f"{folder}/corpus", 320, groups),
    }
    return {name: selected_set.measured(case, pair, 0.6) for name, pair in pairs.items()}


def test_a_trained_pair_and_checkpoints_are_measured(tmp_path):
    documents = list(random_documents(40, 14, vocabulary_size=VOCABULARY, seed=4))
    write_corpus(tmp_path / "corpus", documents, vocabulary_size=VOCABULARY)
    run_on_cpu(save_models, str(tmp_path))
    (rows,) = run_on_cpu(measure_pairs, str(tmp_path))
    for row in rows.values():
        assert row["correct"]
        assert row["ours_loss_rms_nats"] < 1e-6
        assert row["peer_loss_rms_nats"] > 1e-4, "the peer's logits are bf16"
        assert row["ours_differs_fraction"] == 0
        assert not row["missed"]
    trained = rows["trained"]
    assert trained["tokens"] == TINY.measured_tokens
    assert trained["model_loss_nats"] < 0.9 * math.log(TINY.vocabulary)
    assert trained["reference_loss_nats"] < trained["model_loss_nats"] - 0.2, "it goes on from it"
    assert rows["checkpoints"]["tokens"] == 320 // WINDOW * WINDOW
    assert rows["checkpoints"]["peer_differs_fraction"] > 0
    assert rows["checkpoints"]["vocabulary"] == VOCABULARY


@pytest.mark.parametrize(
    "options, said",
    [
        (["--case", "G1"], "--case: got 'G1'; expected G11"),
        (["--k", "0"], "--k: got 0.0"),
        (["--model", "run"], "--model, --reference and --corpus: got some of them"),
    ],
)
def test_wrong_usage_is_named(options, said, capsys):
    assert selected_set.main(options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("program", [topk, selected_set])
def test_the_smoke_run_gives_options_that_the_program_has(program):
    name = program.__name__.split(".")[-1]
    (part,) = [part for part in smoke_parts() if part.name == name]
    options = program._parser().parse_args(part.command(list(part.cases))[2:])
    assert options.device == "cpu"
    assert options.case == ",".join(program.CASES)
