"""megatron_slm.check_scores scores windows again with the reference.

So does verify --rescore, its deprecated place.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_tools import verify
from megatron_slm import check_scores
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring.corpus import TokenStream, score_corpus
from megatron_slm.scoring.foreign_model import huggingface_fingerprint, transformers_runner
from megatron_slm.testing.corpora import random_documents, score_manifest, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus `c`, two models, and the scores of each: those of `wrong` claim to be of `right`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("scores")
    documents = random_documents(9, 15, vocabulary_size=50, seed=3)
    corpus = write_corpus(folder / "c", documents, vocabulary_size=50)
    torch.manual_seed(0)
    for name in ("right", "wrong"):
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                initializer_range=0.5,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).save_pretrained(folder / name)
    stream = TokenStream(str(folder / "c"))
    fingerprint = huggingface_fingerprint(folder / "right")
    manifest = score_manifest(corpus, reference_fingerprint=fingerprint)
    for name in ("right", "wrong"):
        store = ScoreStore.create(folder / f"scores_{name}", manifest)
        runner = transformers_runner(
            folder / name, stream, stream.plan(manifest), ("loss",), vocabulary_size=50
        )
        score_corpus(runner, store)
        store.finish()
    other = ScoreStore.create(
        folder / "scores_other", replace(manifest, reference_fingerprint="sha256:other")
    )
    for shard in range(manifest.shard_count):
        other.write_shard(shard, {"loss": np.zeros(np.diff(manifest.shard_range(shard))[0])})
    other.finish()
    return folder


def with_check_scores(folder, scores: str) -> int:
    return check_scores.main(
        [
            *("--corpus", str(folder / "c")),
            *("--scores", str(folder / scores)),
            *("--reference", str(folder / "right")),
            *("--windows", "3"),
        ]
    )


def with_verify(folder, scores: str) -> int:
    return verify.main(
        [
            str(folder / "c"),
            *("--scores", str(folder / scores)),
            *("--reference", str(folder / "right")),
            *("--rescore", "3"),
        ]
    )


@pytest.mark.parametrize("check", [with_check_scores, with_verify])
def test_scores_are_compared_with_what_the_reference_gives(folder, capsys, check):
    assert check(folder, "scores_right") == 0
    assert "3 windows scored again: largest difference loss " in capsys.readouterr().out
    assert check(folder, "scores_wrong") == 3
    assert "scores are of another model" in capsys.readouterr().err
    assert check(folder, "scores_other") == 3
    assert "is not the reference of" in capsys.readouterr().err


def test_verify_names_the_new_command(folder, capsys):
    assert with_verify(folder, "scores_right") == 0
    said = capsys.readouterr().err
    assert (
        f"python -m megatron_slm.check_scores --corpus {folder}/c --scores {folder}/scores_right "
        f"--reference {folder}/right --windows 3"
    ) in said


def test_verify_needs_to_know_the_reference(folder, capsys):
    assert verify.main([str(folder / "c"), "--rescore", "3"]) == 2
    assert "--reference" in capsys.readouterr().err


def test_scores_of_another_corpus_are_a_sentence(folder, tmp_path, capsys):
    documents = random_documents(9, 15, vocabulary_size=50, seed=4)
    write_corpus(tmp_path / "c", documents, vocabulary_size=50)
    for name in ("scores_right", "right"):
        (tmp_path / name).symlink_to(folder / name)
    assert with_check_scores(tmp_path, "scores_right") == 3
    assert "of another corpus" in capsys.readouterr().err
