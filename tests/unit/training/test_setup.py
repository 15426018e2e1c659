"""What a run reads is opened before any process group starts.

Everything that is wrong with it is said together.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.checkpoint.folder import describe_model
from megatron_slm.config.load import ConfigError, to_yaml
from megatron_slm.config.schema import Config, CorpusConfig, ModelConfig
from megatron_slm.files.folder_lock import FolderLock
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from megatron_slm.tokenization import load_tokenizer
from megatron_slm.train import main
from megatron_slm.training.setup import RunInputError, open_run_inputs

ROOT = Path(__file__).resolve().parents[3]


def word_tokenizer(path, words=50):
    from tokenizers import Tokenizer, models

    Tokenizer(
        models.WordLevel(
            {"</s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, words)}}, unk_token="<unk>"
        )
    ).save(str(path))
    return load_tokenizer(path)


def checkpoint(folder, tokenizer_fingerprint, vocabulary_size=50, **model):
    step = folder / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "model.json").write_text(
        json.dumps(
            {
                "model": describe_model(ModelConfig(**model), vocabulary_size),
                "sequence_length": 16,
                "step": 1,
                "tokens_processed": 1,
                "tokenizer": {"path": "theirs.model", "fingerprint": tokenizer_fingerprint},
            }
        )
    )
    (step / "checksums.json").write_text("{}")
    return str(folder)


@pytest.fixture
def config(tmp_path) -> Config:
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json")
    write_corpus(
        tmp_path / "c",
        random_documents(9, 20, vocabulary_size=50),
        vocabulary_size=50,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    made = Config()
    made.data.sequence_length = 16
    made.run.folder, made.data.tokenizer, made.data.train = (
        str(tmp_path / "run"),
        str(tmp_path / "tokenizer.json"),
        [str(tmp_path / "c")],
    )
    return made


def problems_of(config, error, world_size=1) -> str:
    with pytest.raises(error) as caught:
        open_run_inputs(config, world_size)
    assert isinstance(caught.value, RunInputError) == (error is RunInputError)
    return str(caught.value)


def test_a_sound_run_is_opened(config):
    assert open_run_inputs(config).vocabulary_size == 50


def test_a_bad_selection_and_bad_files_are_listed_together(config):
    config.selection.scorer = "exces_loss"
    config.data.tokenizer, config.data.validation = (
        "nowhere.model",
        [CorpusConfig("target", "nowhere")],
    )
    config.checkpoint.initialize_from, config.selection.reference.checkpoint = (
        "no_run",
        "no_reference",
    )
    said = problems_of(config, ConfigError)
    for part in (
        "did you mean 'excess_loss'",
        "data.tokenizer: nowhere.model",
        "data.validation target",
        "checkpoint.initialize_from: no_run",
        "selection.reference.checkpoint: no_reference",
    ):
        assert part in said
    assert "data.train" not in said, "the corpus itself is sound"


def test_a_corpus_whose_documents_another_token_ends_is_refused_with_both_values(config, tmp_path):
    write_corpus(
        tmp_path / "b",
        random_documents(9, 20, vocabulary_size=50),
        vocabulary_size=50,
        tokenizer_fingerprint=load_tokenizer(config.data.tokenizer).fingerprint,
        eod_id=7,
    )
    config.data.train.append(str(tmp_path / "b"))
    config.data.validation = [CorpusConfig("target", str(tmp_path / "b"))]
    said = problems_of(config, RunInputError)
    assert f"data.train: {tmp_path}/b: the corpus was made with the tokenizer none, not" in said
    assert f"data.validation target: {tmp_path}/b" in said
    assert said.count("eod_id 7 and 0") == 2


def test_corpora_of_which_nothing_can_be_trained_or_measured_are_named(config, tmp_path):
    same = dict(
        vocabulary_size=50,
        tokenizer_fingerprint=load_tokenizer(config.data.tokenizer).fingerprint,
    )
    write_corpus(tmp_path / "lone_tokens", [[3]] * 200, **same)
    write_corpus(tmp_path / "one_token", [[3]], **same)
    config.data.train.append(str(tmp_path / "lone_tokens"))
    config.data.validation = [CorpusConfig("target", str(tmp_path / "one_token"))]
    said = problems_of(config, RunInputError)
    assert (
        f"data.train: {tmp_path}/lone_tokens has 200 tokens in 200 documents, none of more" in said
    )
    assert f"data.validation target: {tmp_path}/one_token has 1 tokens in 1 documents" in said
    config.data.sequence_length, config.data.train = 5000, config.data.train[:1]
    assert f"data.train: {tmp_path}/c has" in problems_of(config, RunInputError)


@pytest.fixture
def with_scores(config, tmp_path) -> Config:
    """Two corpora, and their scores."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    write_corpus(
        tmp_path / "b",
        random_documents(9, 20, vocabulary_size=50, seed=1),
        vocabulary_size=50,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    config.data.train.append(str(tmp_path / "b"))
    config.selection.scorer = "excess_loss"
    config.selection.reference.scores = [f"{tmp_path}/c_scores", f"{tmp_path}/b_scores"]
    for name in "cb":
        write_scores(tmp_path / f"{name}_scores", tmp_path / name)
    return config


def test_what_is_wrong_with_scores_is_told_under_their_own_setting(with_scores, tmp_path):
    (tmp_path / "c_scores" / "loss.bin").write_bytes(b"")
    shutil.rmtree(tmp_path / "b_scores" / "shards")
    said = problems_of(with_scores, RunInputError)
    assert f"selection.reference.scores: {tmp_path}/c_scores/loss.bin: 0 bytes, expected" in said
    assert f"selection.reference.scores: {tmp_path}/b_scores/shards: the markers" in said
    assert "data.train" not in said, "the corpora are sound"


def test_stores_in_the_wrong_order_are_told_to_be_swapped(with_scores, tmp_path):
    scores = with_scores.selection.reference.scores
    open_run_inputs(with_scores)
    with_scores.selection.reference.scores = scores[::-1]
    said = problems_of(with_scores, RunInputError)
    assert "selection.reference.scores: The score stores are in another order" in said
    assert f"Give them in this one: [{tmp_path}/c_scores, {tmp_path}/b_scores]" in said
    assert "core this corpus again" not in said


def test_one_store_for_two_corpora_is_told_whose_it_is(with_scores, tmp_path):
    with_scores.selection.reference.scores = [f"{tmp_path}/b_scores"] * 2
    said = problems_of(with_scores, RunInputError)
    assert (
        f"The scores in {tmp_path}/b_scores are those of {tmp_path}/b, and stand in the place of "
        f"{tmp_path}/c" in said
    )


def test_a_reference_of_another_tokenizer_or_for_another_layout_is_refused(config, tmp_path):
    config.selection.scorer = "excess_loss"
    config.selection.reference.checkpoint = checkpoint(
        tmp_path / "reference", "sha256:another", attention_heads=3, hidden_size=96
    )
    config.parallel.tensor = 2
    said = problems_of(config, RunInputError, world_size=2)
    assert (
        "was trained with another tokenizer (theirs.model; fingerprint sha256:another and" in said
    )
    assert (
        "cannot be run in this layout: parallel.tensor: got 2; it must divide "
        "model.attention_heads (3)" in said
    )


def test_a_resumed_run_no_longer_needs_what_it_started_from(config, tmp_path):
    config.checkpoint.initialize_from = "gone"
    assert "checkpoint.initialize_from: gone" in problems_of(config, RunInputError)
    checkpoint(tmp_path / "run", load_tokenizer(config.data.tokenizer).fingerprint)
    open_run_inputs(config)


def test_a_start_from_another_model_is_a_wrong_configuration(config, tmp_path):
    """Exit code 2 and every difference, where weights were once loaded as far as they fitted."""
    config.checkpoint.initialize_from = checkpoint(
        tmp_path / "base", "sha256:another", vocabulary_size=60, qkv_bias=True, layers=3
    )
    said = problems_of(config, ConfigError)
    for part in (
        "model.layers 3",
        "model.qkv_bias true",
        "model.vocabulary_size 60",
        "theirs.model",
    ):
        assert part in said


def test_a_run_is_not_resumed_as_another_model(config, tmp_path):
    fingerprint = load_tokenizer(config.data.tokenizer).fingerprint
    checkpoint(tmp_path / "run", fingerprint, tied_embeddings=True)
    said = problems_of(config, ConfigError)
    assert "set model.tied_embeddings to true, or give another run.folder" in said


def test_a_dense_reference_stands_beside_experts_and_needs_no_backward(config, tmp_path):
    config.selection.scorer, config.model.experts, config.parallel.expert = "excess_loss", 4, 2
    config.device.head_engine, config.device.precision = "liger", "bf16"
    config.selection.reference.checkpoint = checkpoint(
        tmp_path / "reference", load_tokenizer(config.data.tokenizer).fingerprint, hidden_size=96
    )
    open_run_inputs(config, world_size=2)


def test_a_check_alone_starts_nothing_and_prints_where_the_run_would_write(config, tmp_path):
    """What launch/train.sbatch asks on one node before the others wait: no torch, no run folder."""
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    ask = (
        "import sys\nfrom megatron_slm.train import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    words = ["--config", str(tmp_path / "run.yaml"), "--schedule.train_steps", "5", "--check_only"]
    done = subprocess.run(
        [sys.executable, "-c", ask, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, f"{config.run.folder}\n"), done.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "c.bin").unlink()
    done = subprocess.run(
        [sys.executable, "-c", ask, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert "c.bin: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_check_removes_a_stop_file_only_while_it_holds_the_run_folder(config, tmp_path, capsys):
    """One that a killed run left would stop the next; one for a run that lives is left to it."""
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    words = ["--config", str(tmp_path / "run.yaml"), "--schedule.train_steps", "5", "--check_only"]
    request = tmp_path / "run" / "stop_requested"
    with FolderLock(tmp_path / "run", "a training run", ""):
        request.touch()
        assert main(words) == 2
        assert request.exists(), capsys.readouterr().err
    assert main(words) == 0
    assert not request.exists()


def test_a_selection_that_is_to_end_needs_the_references_loss_in_its_scores(config, tmp_path):
    write_scores(tmp_path / "entropies", tmp_path / "c", columns=("entropy",))
    config.selection.scorer = "own_loss"
    config.selection.reference.scores = [str(tmp_path / "entropies")]
    assert open_run_inputs(config).vocabulary_size == 50
    config.selection.end_when_overtaken = True
    said = problems_of(config, RunInputError)
    assert "selection.scorer own_loss with end_when_overtaken reads reference_loss, but" in said
    assert "hold only reference_entropy" in said
