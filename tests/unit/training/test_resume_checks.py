"""What a checkpoint says of its run is compared with what lies there now, before any process group
starts.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_slm.config.load import ConfigError, to_yaml
from megatron_slm.config.schema import Config, CorpusConfig
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from megatron_slm.training import resume
from megatron_slm.training.setup import RunInputError, open_run_inputs
from tests.unit.training.test_setup import checkpoint, word_tokenizer

STEPS, SAMPLES = 5, 40
STEP_TOKENS = 8 * 256  # of the configuration's defaults


def write(folder, name, seed=0, words=50) -> str:
    """A corpus of 50 words, or of more under a tokenizer made again."""
    tokenizer = word_tokenizer(folder / "tokenizer.json", words)
    write_corpus(
        folder / name,
        random_documents(30, 20, vocabulary_size=50, seed=seed),
        vocabulary_size=words,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return str(folder / name)


@pytest.fixture
def config(tmp_path) -> Config:
    """A run on two corpora with scores that has done some steps; its folder holds what the checks
    read.
    """
    made = Config()
    made.run.folder, made.data.tokenizer = str(tmp_path / "run"), str(tmp_path / "tokenizer.json")
    made.data.train = [write(tmp_path, name, seed) for seed, name in enumerate("ab")]
    made.data.validation = [CorpusConfig("target", write(tmp_path, "held_out", 2))]
    for name in "ab":
        write_scores(tmp_path / f"{name}_scores", tmp_path / name)
    made.selection.scorer = "excess_loss"
    made.selection.reference.scores = [str(tmp_path / f"{name}_scores") for name in "ab"]
    made.schedule.train_steps = 10
    save(made)
    return made


def save(config, **trainer):
    """Write the checkpoint of a run that has read SAMPLES samples in STEPS steps."""
    shutil.rmtree(config.run.folder, ignore_errors=True)
    run_inputs = open_run_inputs(config)
    fingerprint = run_inputs.corpora[0].manifest.tokenizer["fingerprint"]
    checkpoint(Path(config.run.folder), fingerprint)
    position = replace(resume.wanted_position(config, run_inputs.corpora), samples=SAMPLES)
    inputs = resume.fingerprints_of(config, run_inputs.corpora, run_inputs.validation)
    state = {"step": STEPS, "samples": SAMPLES, "step_tokens": STEP_TOKENS, "inputs": inputs}
    write_state(config, **state, data=position.to_json())
    Path(config.run.folder, "config.yaml").write_text(to_yaml(config))


def write_state(config, **state):
    path = Path(config.run.folder, "checkpoints", "step_00000001", "trainer.json")
    path.write_text(json.dumps(state))


def save_as_before(config):
    """A checkpoint of the versions that counted samples only."""
    write_state(config, step=STEPS, loader={"consumed_samples": SAMPLES})


def refused(config, error=RunInputError) -> str:
    with pytest.raises(error) as caught:
        open_run_inputs(config)
    assert isinstance(caught.value, RunInputError) == (error is RunInputError)
    return str(caught.value)


def said(config) -> str:
    run_inputs = open_run_inputs(config)
    wanted = resume.wanted_position(config, run_inputs.corpora)
    inputs = resume.fingerprints_of(config, run_inputs.corpora, run_inputs.validation)
    saved = resume.newest_saved(config.run.folder)
    return "\n".join(text for text, _ in resume.notes(saved, config, wanted, inputs))


def test_an_unchanged_run_goes_on_without_a_word(config):
    assert said(config) == ""


def test_a_corpus_made_again_under_its_name_is_refused_with_its_scores(config, tmp_path):
    write(tmp_path, "b", seed=7)
    shutil.rmtree(tmp_path / "b_scores")
    write_scores(tmp_path / "b_scores", tmp_path / "b")
    message = refused(config)
    assert f"data.train {tmp_path / 'b'}: its content has changed" in message
    assert f"at step {STEPS} of this run; put the old one back" in message
    assert f"selection.reference.scores {tmp_path / 'b_scores'}: its content has changed" in message
    assert str(tmp_path / "a") not in message


def test_scores_of_another_reference_are_refused_under_the_same_name_only(config, tmp_path):
    shutil.rmtree(tmp_path / "a_scores")
    for name in ("a_scores", "new_scores"):
        write_scores(tmp_path / name, tmp_path / "a", reference_fingerprint="sha256:another")
    assert "put the old ones back" in refused(config)
    config.selection.reference.scores[0] = str(tmp_path / "new_scores")
    assert said(config) == "", "config.yaml tells of the other name"


def test_a_vocabulary_made_again_under_its_name_is_refused(config, tmp_path):
    """With everything that was made with it; which tokenizer it was, older checkpoints know too."""
    for seed, name in enumerate(("a", "b", "held_out")):
        write(tmp_path, name, seed, words=60)
    for name in "ab":
        shutil.rmtree(tmp_path / f"{name}_scores")
        write_scores(tmp_path / f"{name}_scores", tmp_path / name)
    assert "was trained with the tokenizer" in refused(config, ConfigError)
    save_as_before(config)
    assert "was trained with the tokenizer" in refused(config, ConfigError)


def test_a_reference_that_was_trained_on_under_its_name_is_refused(config, tmp_path):
    fingerprint = CorpusManifest.read(config.data.train[0]).tokenizer["fingerprint"]
    checkpoint(tmp_path / "reference", fingerprint)
    config.selection.reference.scores = []
    config.selection.reference.checkpoint = str(tmp_path / "reference")
    save(config)
    assert said(config) == ""
    (tmp_path / "reference/checkpoints/step_00000001/checksums.json").write_text(
        json.dumps({"weights.distcp": "trained on"})
    )
    assert "name the step_* folder of the old one" in refused(config)


def test_a_changed_blend_is_told_of(config, tmp_path):
    config.selection.reference.scores, config.selection.scorer = [], "none"
    config.data.train = [write(tmp_path, "c", 5), config.data.train[0]]
    assert said(config).splitlines() == [
        f"data.train: {tmp_path / 'c'} is new in this run and is read from its beginning",
        f"data.train: {tmp_path / 'b'} is left out from here on; should it come back, it goes on "
        "where it was",
    ]


def test_another_validation_text_is_told_of(config, tmp_path):
    write(tmp_path, "held_out", seed=9)
    assert "losses before and after are of different text" in said(config)


def test_another_amount_of_validation_text_is_told_of(config):
    config.data.global_batch_size = 4
    config.monitoring.validation_batches = 3
    assert "3 global batches are 3,072 tokens now, and were 6,144 before" in said(config)
    config.monitoring.validation_batches = 0  # all of it, then as now
    assert said(config) == ""


def test_a_run_with_fewer_steps_than_it_has_done_is_a_bad_setting(config):
    config.schedule.train_steps = STEPS - 1
    assert "schedule.train_steps: got 4" in refused(config, ConfigError)


def test_a_checkpoint_without_fingerprints_goes_on_and_says_so_once(config):
    save_as_before(config)
    assert "saved by an earlier version, without the fingerprints" in said(config)
    saved = resume.newest_saved(config.run.folder)
    wanted = resume.wanted_position(config, open_run_inputs(config).corpora)
    assert saved.done == resume.Done(STEPS, SAMPLES * 16, SAMPLES)
    assert resume.position_before(saved, wanted).samples == SAMPLES


@pytest.mark.parametrize("change", ["data.train", "data.weights", "run.seed"])
def test_a_checkpoint_that_did_not_note_what_was_read_needs_the_old_order(config, change):
    save_as_before(config)
    if change == "data.train":
        config.data.train.reverse()
        config.selection.reference.scores.reverse()
    if change == "data.weights":
        config.data.weights = [1.0, 2.0]
    if change == "run.seed":
        config.run.seed = 9
    message = refused(config, ConfigError)
    assert f"{change}: got" in message
    assert "go on with the old value until a checkpoint is saved" in message


def test_a_checkpoint_that_cannot_be_read_is_left_to_the_start_of_the_run(config):
    Path(config.run.folder, "checkpoints/step_00000001/trainer.json").write_text("{")
    assert resume.newest_saved(config.run.folder) is None
    open_run_inputs(config)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"step": 5, "loader": {}},
        {"step": "5", "loader": {"consumed_samples": 3}},
        {"step": 5, "samples": 4, "data": []},
        {"step": 5, "samples": 4, "data": {"weights": [], "corpora": [{"past": 3}]}},
        {"step": 5, "loader": {"consumed_samples": 3}, "inputs": {"data.train": 7}},
    ],
)
def test_a_trainer_json_that_says_nothing_of_its_run_is_named(config, state):
    write_state(config, **state)
    with pytest.raises(ValueError, match="trainer.json does not say where its run stands"):
        resume.read_saved(Path(config.run.folder, "checkpoints", "step_00000001"))
    open_run_inputs(config)
