"""The experiments of benchmarks/claims as they are declared: every run is one that the trainer
takes, arms differ in nothing but what they say, and shared runs are shared.
"""

import importlib
import itertools
import json
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.claims.commands import command_of, run_settings
from benchmarks.claims.corpora import PARTS, part_of
from benchmarks.claims.experiment import (
    Experiment,
    Training,
    experiment_names,
    experiment_problems,
    read_experiment,
    read_pairs,
    read_scale,
)
from benchmarks.claims.graph import Graph, in_order
from benchmarks.claims.noise import KINDS, with_replaced_words
from benchmarks.claims.page import ORDER
from benchmarks.claims.runner import CommandLauncher
from benchmarks.claims.token_noise import detection, overlaps
from megatron_slm.config.check import check_config
from megatron_slm.config.load import from_mapping
from megatron_slm.ops.linear_cross_entropy import linear_cross_entropy
from megatron_slm.ops.selected_linear_cross_entropy import selected_linear_cross_entropy
from megatron_slm.selection.schedule import build_schedule

SCALES = ("smoke", "cpu", "gpu", "cluster")


def graph(name: str, scale: str = "smoke", seed: int = 1, pair: str = "code") -> Graph:
    return Graph(read_experiment(name), read_scale(scale), pair, read_pairs()[pair], seed)


def trainings(name: str, scale: str = "smoke", seed: int = 1) -> dict:
    made = graph(name, scale, seed)
    return {each: made.training(each) for each in made.experiment.trainings}


def test_all_parts_are_declared():
    assert set(experiment_names()) == set(ORDER)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", experiment_names())
def test_every_run_is_one_that_the_trainer_takes(name, scale, tmp_path):
    for training, stage in trainings(name, scale).items():
        config, problems = from_mapping(run_settings(stage, tmp_path))
        assert problems == [], training
        check_config(config, 1)
        build_schedule(config.selection.keep_fraction)


@pytest.mark.parametrize("name", experiment_names())
def test_every_run_has_a_settings_file_of_its_own(name, tmp_path):
    stages = trainings(name).values()
    files = {command_of(stage, tmp_path)[2] for stage in stages}
    assert len(files) == len({stage.key for stage in stages})


@pytest.mark.parametrize("name", experiment_names())
def test_arms_share_seed_start_and_data_unless_they_say_otherwise(name):
    made = graph(name)
    baseline = made.training(made.experiment.baseline)
    for arm, declared in made.experiment.arms.items():
        stage = made.training(arm)
        settings = stage.identity["settings"]
        assert settings["run"] == baseline.identity["settings"]["run"]
        if declared.train == made.experiment.arms[made.experiment.baseline].train:
            assert stage.needs[:3] == baseline.needs[:3]


def test_experiments_share_the_runs_that_are_the_same():
    main, keep = trainings("main", "cpu"), trainings("keep_fraction", "cpu")
    for name in ("base", "reference", "plain", "slm"):
        assert main[name].key == keep[name].key
    assert trainings("noise", "cpu")["reference"].key == main["reference"].key
    assert trainings("main", "cpu", seed=2)["base"].key != main["base"].key


def test_stages_of_two_seeds_are_two_stages():
    first, second = (trainings("main", seed=seed)["base"] for seed in (1, 2))
    assert first.needs == second.needs
    assert first != second


def test_keys_change_with_what_a_stage_is_made_of():
    plain, slm = trainings("main")["plain"], trainings("main")["slm"]
    assert plain.key != slm.key
    changed = graph("main")
    changed.experiment.models["reference"].times = 2
    assert changed.training("slm").key != slm.key


def test_stages_come_after_what_they_need():
    stages = in_order(list(graph("lead").arms(["slm_refreshed"]).values()))
    for place, stage in enumerate(stages):
        assert all(needed in stages[:place] for needed in stage.needs)


def test_arms_of_other_batch_sizes_process_the_same_tokens():
    made = trainings("batch", "cpu")
    processed = set()
    for name in ("plain", "plain_small", "plain_large", "plain_long"):
        settings = made[name].identity["settings"]
        data, steps = settings["data"], settings["schedule"]["train_steps"]
        processed.add(data["sequence_length"] * data["global_batch_size"] * steps)
    assert len(processed) == 1


def test_schedules_are_given_as_shares_of_the_run():
    settings = trainings("lead", "cpu")["half"].identity["settings"]
    schedule = settings["selection"]["keep_fraction"]
    tokens = 128 * 16 * settings["schedule"]["train_steps"]
    assert schedule["hold_tokens"] == round(0.5 * tokens)
    assert "hold_of_run" not in schedule
    mixed_in = trainings("lead", "cpu")["mixed_in"].identity["settings"]["selection"]["clm_weight"]
    assert mixed_in == {"style": "linear", "start": 0.0, "end": 1.0, "tokens": tokens}


def test_a_store_is_made_of_every_corpus_of_its_arms(tmp_path):
    settings = run_settings(trainings("noise")["slm"], tmp_path)
    assert len(settings["selection"]["reference"]["scores"]) == len(settings["data"]["train"]) == 6


def test_the_command_of_a_score_store(tmp_path):
    made = graph("reference")
    module, *words = command_of(made.scores("scores_fp32", "corpus"), tmp_path)
    assert module == "megatron_slm.score"
    assert words[words.index("--dtype") + 1] == "fp32"
    assert words[words.index("--device.kind") + 1] == "cpu"


def test_a_file_that_changes_what_no_setting_changes_is_named_on_the_command_line(tmp_path):
    made = trainings("exactness")
    words = command_of(made["bf16_logits"], tmp_path)
    hook = "benchmarks/claims/parts/rounded_logits.py:after_step"
    assert words[-2:] == ["--monitoring.after_step", hook]
    assert "--monitoring.after_step" not in command_of(made["slm"], tmp_path)
    assert made["slm"].identity["settings"] == made["bf16_logits"].identity["settings"]
    assert made["slm"].key != made["bf16_logits"].key


def test_rounded_logits_are_those_of_a_head_that_writes_bf16(monkeypatch):
    for head in ("head_forward", "head_backward", "selected_linear_cross_entropy"):
        module = importlib.import_module(f"megatron_slm.ops.{head}")
        monkeypatch.setattr(module, "logits_into", module.logits_into)  # puts it back at the end
    runpy.run_path("benchmarks/claims/parts/rounded_logits.py")
    hidden = torch.randn(12, 8, requires_grad=True)
    weight = 4.0 * torch.randn(40, 8)
    target = torch.arange(12)
    exact = hidden @ weight.t()
    rounded = exact + (exact.bfloat16().float() - exact).detach()  # its gradient passes through
    expected = F.cross_entropy(rounded, target, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    for mode in ("keep", "recompute"):
        loss = linear_cross_entropy(hidden, weight, target, mode=mode)
        torch.testing.assert_close(loss, expected)
        (found,) = torch.autograd.grad(loss.sum(), hidden)
        torch.testing.assert_close(found, gradient)
    loss_sum, _ = selected_linear_cross_entropy(hidden, weight, target, target < 6)
    torch.testing.assert_close(loss_sum, expected[:6].sum())
    assert not torch.allclose(expected, F.cross_entropy(exact, target, reduction="none"))


def test_programs_are_jobs_at_the_scale_of_a_cluster():
    launcher = CommandLauncher(read_scale("cluster").launch)
    assert launcher.words(["megatron_slm.train", "--config", "x.yaml"]) == [
        *("sbatch", "--wait", "launch/train.sbatch", "--config", "x.yaml")
    ]
    program = ["sbatch", "--wait", "launch/program.sbatch", "python", "-m", "tokenizer.train"]
    assert launcher.words(["tokenizer.train", "--input"]) == [*program, "--input"]
    assert CommandLauncher({}).words(["tokenizer.train"])[1:] == ["-m", "tokenizer.train"]


def test_names_that_are_not_there_are_said():
    wrong = Experiment(
        arms={"slm": Training(start="bse", scores="none", train=["text"])},
        planted={"shuffle": 0.1},
        contrasts={"slm": ["other"]},
    )
    problems = " ".join(experiment_problems(wrong))
    for said in ("'bse'", "slm.scores", "'text'", "'shuffle'", "'other'", "'plain'"):
        assert said in problems


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match="got 'maine'; expected one of batch, exactness"):
        read_experiment("maine")


def test_parts_of_the_target_are_sixths():
    assert sorted(sixth for sixths in PARTS.values() for sixth in sixths) == list(range(6))
    parts = [part_of(f"library/{number}.py") for number in range(6000)]
    assert parts.count("held_out") == pytest.approx(1000, abs=120)
    assert parts.count("curated") == pytest.approx(3000, abs=200)


CLEAN_TEXTS = [("a", "one two three, four\n" * 20), ("b", "alpha bêta gamma " * 20)]
CLEAN = [(f"d{number}", f"some words of document {number} " * 30) for number in range(30)]


@pytest.mark.parametrize("kind", ["shuffled", "random", "boilerplate"])
def test_noise_depends_on_the_documents_alone(kind):
    first, again = (KINDS[kind](CLEAN, 4000) for _ in range(2))
    assert first == again
    assert 4000 <= sum(len(text) for _, text in first) < 4000 + 12_000
    assert len({text for _, text in first}) == len(first)


def test_shuffled_documents_keep_their_words():
    by_name = dict(CLEAN)
    for name, text in KINDS["shuffled"](CLEAN, 2000):
        original = by_name[name.removeprefix("shuffled/")]
        assert sorted(text.split(" ")) == sorted(original.split(" "))
        assert text != original


def test_replaced_words_lie_where_they_are_said_to():
    for (name, text), spans in with_replaced_words(CLEAN_TEXTS):
        if name == "words/b":
            continue
        original = dict(CLEAN_TEXTS)[name.removeprefix("words/")]
        content = text.encode()
        kept = [content[: spans[0][0]]]
        kept += [content[a[1] : b[0]] for a, b in itertools.pairwise(spans)]
        planted = [content[first:last].decode() for first, last in spans]
        assert set(planted) <= {"alpha", "bêta", "gamma"}
        assert all(piece.decode() in original for piece in kept)


def test_tokens_overlap_the_spans_that_hold_one_of_their_bytes():
    ends = np.array([1, 4, 6, 9, 9])
    assert overlaps(ends, [[2, 3], [6, 8]]).tolist() == [False, True, False, True, False]
    assert overlaps(ends, [[3, 5]]).tolist() == [False, True, True, False, False]
    assert not overlaps(ends, []).any()


def test_detection_counts_planted_tokens_among_the_lowest():
    score = np.array([0.0, 1.0, 2.0, 3.0, 4.0, np.nan], np.float32)
    found = detection(score, np.array([True, False, True, False, False, True]))
    assert found == {"precision": 0.5, "recall": 0.5, "planted_fraction": 0.4}


def test_declarations_can_be_stored(tmp_path):
    for name in experiment_names():
        for stage in in_order(list(graph(name).arms(list(read_experiment(name).arms)).values())):
            json.dumps(stage.identity)
