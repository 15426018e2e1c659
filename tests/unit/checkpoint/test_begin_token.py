"""Documents that begin with the begin token, and documents that do not, are not mixed silently."""

import json
from dataclasses import replace

import pytest

from megatron_slm.checkpoint.begin_token import begin_token_warnings, other_than_trained
from megatron_slm.config.schema import Config
from megatron_slm.data.corpora import open_corpora
from megatron_slm.testing.corpora import random_documents, write_corpus


@pytest.fixture
def corpora(tmp_path):
    """Two corpora, of which the second has the begin token."""
    for number, name in enumerate(("plain", "begun")):
        write_corpus(tmp_path / name, random_documents(8, 20, seed=number))
    opened = open_corpora([tmp_path / "plain", tmp_path / "begun"])
    return [opened[0], replace(opened[1], manifest=replace(opened[1].manifest, prepend_bos=True))]


def checkpoint(folder, **tokenizer) -> str:
    folder.mkdir()
    model = {"model": {}, "sequence_length": 8, "tokenizer": tokenizer}
    described = {**model, "step": 1, "tokens_processed": 8}
    (folder / "model.json").write_text(json.dumps(described))
    (folder / "checksums.json").write_text("{}")
    return str(folder)


def test_corpora_that_are_alike_are_fine(corpora):
    plain, begun = corpora
    assert begin_token_warnings(Config(), [plain, plain], resumed=False) == []
    assert begin_token_warnings(Config(), [begun], resumed=False) == []


def test_a_blend_of_both_is_named(corpora):
    plain, begun = corpora
    [sentence] = begin_token_warnings(Config(), corpora, resumed=True)
    assert f"documents of {begun.prefix} begin with the begin token" in sentence
    assert f"those of {plain.prefix} do not" in sentence


@pytest.mark.parametrize(
    "setting", ["checkpoint.initialize_from", "selection.reference.checkpoint"]
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_checkpoint_of_other_documents_is_named(setting, trained, corpora, tmp_path):
    config = Config()
    path = checkpoint(tmp_path / "checkpoint", prepend_bos=trained)
    section, _, name = setting.rpartition(".")
    target = config.selection.reference if "." in section else config.checkpoint
    setattr(target, name, path)
    same, other = corpora[::-1] if trained else corpora
    assert begin_token_warnings(config, [same], resumed=False) == []
    [sentence] = begin_token_warnings(config, [other], resumed=False)
    assert f"{setting} {path} was trained on documents that" in sentence
    assert other.prefix in sentence
    assert f"{'with' if trained else 'without'} --prepend-bos" in sentence


def test_a_resumed_run_starts_from_no_other_checkpoint(corpora, tmp_path):
    config = Config()
    config.checkpoint.initialize_from = str(tmp_path / "gone")
    assert begin_token_warnings(config, corpora[:1], resumed=True) == []


@pytest.mark.parametrize("tokenizer", [{}, {"prepend_bos": None}])
def test_what_a_checkpoint_does_not_say_is_not_compared(tokenizer):
    assert other_than_trained("a checkpoint", tokenizer, {"corpus": True}) == []
