"""Every scorer and scope inside real training steps: the same tokens, loss and gradient norm in
every layout that promises it.
"""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import Config
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.bench import (
    LENGTH,
    VOCABULARY,
    StepRecord,
    local_steps,
    make_trainer,
    train,
)

STEPS = 2
SEQUENCES = 8
PROBED = {
    name: random_documents(12, 20, vocabulary_size=VOCABULARY, seed=seed)
    for seed, name in enumerate(("web", "code"), start=4)
}
"""The documents of the probe's corpora."""
LAYOUTS = {
    "single": {},
    "dp2": dict(dp=2),
    "dp4": dict(dp=4),
    "tp2_pp2": dict(tp=2, pp=2),
    "cp2": dict(cp=2),
}
POPULATION = 4  # data-parallel size x micro-batch size, in every layout

# scorer -> options; each with the columns SyntheticColumns makes
SCORERS = {
    "excess_loss": {},
    "own_loss": {},
    "own_entropy": {},
    "history": {"column": "old_loss"},
    "reference_loss": {},
    "reference_entropy": {},
    "color_filter": {"prior": "old_loss", "conditional": "reference_loss"},
    "token_cleaning": {"base": "old_loss", "reference": "reference_loss"},
    "stored_score": {"column": "old_loss"},
    "none": {},
    "stored_mask": {"column": "quality"},
    "stored_weight": {"column": "quality"},
    "entropy_weight": {},
    "random": {},
    "reverse": {},
    "weighted_sum": {"of": {"excess_loss": 1.0, "own_entropy": 0.5}},
    "rho_loss": {},
    "intersection": {},
    "union": {},
    "band": {},
    "mixed_with_clm": {},
    "long_context_weight": {"column": "old_loss"},
}
CASES = {
    **{f"scorer_{name}": (name, options, "data_parallel") for name, options in SCORERS.items()},
    "scope_sequence": ("excess_loss", {}, "sequence"),
    "scope_micro_batch": ("excess_loss", {}, "micro_batch"),
    "scope_global_batch": ("excess_loss", {}, "global_batch"),
    "scope_global_batch_static": ("reference_loss", {}, "global_batch"),
    "scope_running_threshold": ("excess_loss", {}, "running_threshold"),
}


class SyntheticColumns:
    def __len__(self):
        return STEPS * SEQUENCES

    def __getitem__(self, index):
        random = np.random.default_rng(1000 + index)
        text = random.integers(0, VOCABULARY, LENGTH + 1)
        columns = {
            name: random.uniform(2, 6, LENGTH).astype(np.float32)
            for name in ("reference_loss", "reference_entropy", "old_loss")
        }
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (random.random(LENGTH) > 0.1).astype(np.float32),
            "position_ids": np.arange(LENGTH),
            "corpus_id": np.int64(0),
            "quality": (random.random(LENGTH) > 0.3).astype(np.float32),
            **columns,
        }


def make_config(groups, scorer, options, scope):
    config = Config()
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        pad_vocabulary_to_multiple_of=64,
        initialization_std=0.1,
    )
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=SEQUENCES,
        micro_batch_size=POPULATION // groups.dp_size,
    )
    config.parallel = dataclasses.replace(
        config.parallel, tensor=groups.tp_size, pipeline=groups.pp_size, context=groups.cp_size
    )
    config.selection = dataclasses.replace(
        config.selection, scorer=scorer, scorer_options=options, scope=scope
    )
    config.selection.reference.scores = ["synthetic"]
    config.schedule.train_steps = STEPS
    return config


def take_steps(groups, trainer, config, batches_of_steps=None) -> list[StepRecord]:
    own = local_steps(groups, config, SyntheticColumns(), STEPS)
    return list(train(trainer, config, batches_of_steps or own, rate=1e-3))


def every_case(groups, name, folder):
    results = {}
    for name, case in CASES.items():
        config = make_config(groups, *case)
        results[name] = take_steps(groups, make_trainer(groups, config), config)
    return {
        "steps": results,
        "last_stage": groups.is_last_stage,
        "reference": online_and_stored(groups),
        "probe": probed(groups, folder),
    }


def probed(groups, folder):
    """What the probe sees at two evaluations with two training steps between them, and what it says
    of the change.
    """
    from megatron_slm.data.scored_dataset import open_corpora
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.training.probe import Probe

    config = make_config(groups, "excess_loss", {}, "data_parallel")
    config.data.micro_batch_size = 2
    config.run.folder = str(folder)
    trainer = make_trainer(groups, config)
    prefixes = [f"{folder}/{name}" for name in PROBED]
    scores = [f"{prefix}_scores" for prefix in prefixes]
    run_inputs = SimpleNamespace(
        corpora=open_corpora(prefixes, scores), tokenizer=SimpleNamespace(piece=str)
    )
    probe = Probe(config, run_inputs, trainer)
    start = TrainingProgress(0, 0)
    later = TrainingProgress(STEPS, STEPS * SEQUENCES * LENGTH)
    first = probe.compare(start), probe.view(start)
    take_steps(groups, trainer, config)
    resumed = Probe(config, run_inputs, trainer)
    resumed.load_state_dict(probe.state_dict())
    of_other_text = Probe(config, run_inputs, trainer)
    of_other_text.load_state_dict({**probe.state_dict(), "text": "digest of other tokens"})
    assert of_other_text.compare(later) == {}
    return first, (probe.compare(later), probe.view(later)), resumed.compare(later)


def text_named_by(line):
    """The tokens that a line of the token view names by corpus, first token and documents, as the
    corpus has them.
    """
    documents = PROBED[Path(line["corpus"]).name]
    starts = np.cumsum([0, *map(len, documents)])
    text = []
    places = [place for _, place in line["documents"]]
    for (number, place), end in zip(line["documents"], [*places[1:], LENGTH], strict=True):
        # The first document may be entered anywhere, the others at their beginning.
        begin = line["first_token"] - starts[number] if place == 0 else 0
        assert 0 <= begin < len(documents[number])
        text += documents[number][begin : begin + end - place].tolist()
    return text


def online_and_stored(groups):
    """The same run with an online reference, with its losses stored in fp32, and stored in fp16."""
    from megatron_slm.model.build import build_model
    from megatron_slm.model.forward_backward import forward_losses

    config = make_config(groups, "excess_loss", {}, "data_parallel")
    smaller = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hidden_size=16, ffn_hidden_size=32),
        run=dataclasses.replace(config.run, seed=7),
    )
    reference = build_model(smaller, VOCABULARY, groups, trainable=False)
    outcome = {
        "online": take_steps(groups, make_trainer(groups, config, reference=reference), config)
    }
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        steps = list(local_steps(groups, config, SyntheticColumns(), STEPS))
        for batches in steps:
            losses = forward_losses(reference, batches, groups)
            for batch, output in zip(batches, losses, strict=groups.is_last_stage):
                batch.columns["reference_loss"] = output["loss"].to(dtype).float()
        outcome[name] = take_steps(groups, make_trainer(groups, config), config, steps)
    return outcome


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    for name, documents in PROBED.items():
        write_corpus(folder / name, documents, vocabulary_size=VOCABULARY)
        write_scores(
            folder / f"{name}_scores", folder / name, lambda offsets: 3.0 + np.sin(offsets)
        )
    return run_layouts_on_cpu(every_case, LAYOUTS, folder, side_by_side=True)


def merged(ranks, read):
    """(ids selected by all last-stage ranks together, loss, gradient norm) per step."""
    last_stage = [read(rank) for rank in ranks if rank["last_stage"]]
    rows = []
    for step in range(STEPS):
        selected = set().union(*(steps[step].selected for steps in last_stage))
        first = last_stage[0][step]
        rows.append((selected, first.summary.get("loss/selected"), first.grad_norm))
    return rows


def merged_case(results, layout, case):
    return merged(results[layout], lambda rank: rank["steps"][case])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
@pytest.mark.parametrize("case", CASES)
def test_every_scorer_and_scope_in_every_layout(case, layout, results):
    if case == "scope_running_threshold" and layout != "tp2_pp2":
        pytest.skip(
            "the first step of a running threshold chooses among the tokens of one rank, "
            "and ranks hold other tokens here"
        )
    if case == "scope_micro_batch" and layout.startswith("dp"):
        pytest.skip(
            "a data-parallel rank's micro-batch holds other sequences here: "
            "the choice is meant to differ"
        )
    expected, found = (merged_case(results, name, case) for name in ("single", layout))
    for step in range(STEPS):
        assert found[step][0] == expected[step][0], f"step {step}: other tokens"
        assert found[step][1] == pytest.approx(expected[step][1], rel=2e-5)
        assert found[step][2] == pytest.approx(expected[step][2], rel=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_online_reference_selects_as_stored_scores_do(layout, results):
    online, fp32, fp16 = (
        merged(results[layout], lambda rank, name=name: rank["reference"][name])
        for name in ("online", "fp32", "fp16")
    )
    assert online == fp32, "the same losses, so the same bits"
    for step in range(STEPS):
        assert len(online[step][0] ^ fp16[step][0]) <= 2, (
            "fp16 storage swaps only tokens at the threshold"
        )


def test_global_batch_is_one_set_whatever_the_layout(results):
    for case in ("scope_global_batch", "scope_global_batch_static"):
        expected = merged_case(results, "single", case)
        for name in LAYOUTS:
            found = merged_case(results, name, case)
            for step in range(STEPS):
                assert found[step][0] == expected[step][0], f"{name}, step {step}"


def places_selected(lines) -> set[tuple[int, int]]:
    return {
        (row, place)
        for row, line in enumerate(lines)
        for place, selected in enumerate(line["selected"])
        if selected
    }


def places_of_largest_excess(lines) -> set[tuple[int, int]]:
    """The top keep_fraction of all places that have a reference loss."""
    excess = {}
    for row, line in enumerate(lines):
        for place, reference in enumerate(line["reference_loss"]):
            if reference is not None:
                excess[row, place] = line["loss"][place] - reference
    kept = math.ceil(0.6 * len(excess))
    return set(sorted(excess, key=lambda place: -excess[place])[:kept])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_probe_sees_whole_sequences_and_the_same_choice_in_every_layout(layout, results):
    """The top keep_fraction by excess loss of its two sequences, and the tokens chosen at both
    evaluations over those chosen at either.
    """
    single = results["single"][0]["probe"]
    for rank in results[layout]:
        (before, seen), (after, again), resumed = rank["probe"]
        if not rank["last_stage"]:
            assert (before, seen, after, again) == ({}, [], {}, [])
            continue
        sets = []
        for lines, expected in ((seen, single[0][1]), (again, single[1][1])):
            assert [Path(line["corpus"]).name for line in lines] == list(PROBED)
            for line, same in zip(lines, expected, strict=True):
                assert line["tokens"] == same["tokens"]
                assert line["tokens"] == [str(token) for token in text_named_by(line)]
            chosen = places_selected(lines)
            assert chosen == places_of_largest_excess(lines)
            assert chosen == places_selected(expected)
            sets.append(chosen)
        assert before == {}
        overlap = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert after == {"selection/probe_overlap_fraction": pytest.approx(overlap)}
        assert after == resumed
        assert 0.5 < after["selection/probe_overlap_fraction"] < 1.0
