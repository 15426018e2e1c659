"""Which tokens a frozen set holds, and what is refused."""

import numpy as np
import pytest

from megatron_slm.data.corpora import open_corpora
from megatron_slm.data.indexed import read_index
from megatron_slm.evaluation.options import TokenSetConfig
from megatron_slm.evaluation.token_sets import fingerprint_of, open_sets
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores


def base(offsets):
    return (offsets * 7) % 11


def reference(offsets):
    return (offsets * 5) % 3


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "c", random_documents(6, 10, seed=1))
    write_corpus(tmp_path / "other", random_documents(6, 10, seed=2))
    write_scores(tmp_path / "base", tmp_path / "c", base)
    write_scores(tmp_path / "reference", tmp_path / "c", reference)
    write_scores(tmp_path / "of_other", tmp_path / "other")
    return tmp_path


def opened(folder, **settings):
    [corpus] = open_corpora([str(folder / "c")])
    for name in ("tokens", "scores", "minus"):
        if name in settings:
            settings[name] = str(folder / settings[name])
    token_set = TokenSetConfig("s", "c", **settings)
    return open_sets([token_set], {"c": corpus}, {"c"})


def test_the_top_of_the_excess_is_taken_and_equal_values_by_their_place(folder):
    sets, problems = opened(folder, scores="base", minus="reference", top_fraction=0.25)
    assert not problems
    members = sets["c"][0].members()
    [corpus] = open_corpora([str(folder / "c")])
    first_tokens = set(read_index(folder / "c.idx").non_empty_starts_tokens().tolist())
    offsets = np.array([i for i in range(corpus.manifest.tokens) if i not in first_tokens])
    excess = base(offsets) - reference(offsets)
    ranked = offsets[np.lexsort((offsets, -excess))]
    expected = set(ranked[: int(np.ceil(0.25 * len(offsets)))].tolist())
    assert set(np.flatnonzero(members).tolist()) == expected
    assert len(set(excess.tolist())) < len(excess)  # there are ties


def test_a_mask_is_taken_as_it_is_and_known_by_its_members(folder):
    [corpus] = open_corpora([str(folder / "c")])
    mask = np.arange(corpus.manifest.tokens) % 3 == 0
    np.save(folder / "mask.npy", mask)
    sets, problems = opened(folder, tokens="mask.npy")
    assert not problems
    members = sets["c"][0].members()
    np.testing.assert_array_equal(members, mask)
    assert fingerprint_of(members) == fingerprint_of(mask.copy())
    assert fingerprint_of(members) != fingerprint_of(~mask)
    assert fingerprint_of(mask[:8]) != fingerprint_of(np.append(mask[:8], False))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"scores": "of_other"}, "of another corpus"),
        ({"scores": "base", "minus": "of_other"}, "of another corpus"),
        ({"scores": "base", "column": "entropy"}, "has no column 'entropy'; it has loss"),
        ({"scores": "nowhere"}, "nowhere"),
        ({"tokens": "integers.npy"}, "expected one bool for each"),
        ({"tokens": "nowhere.npy"}, "nowhere.npy: cannot be read"),
    ],
)
def test_what_is_not_of_the_corpus_is_refused(folder, settings, sentence):
    [corpus] = open_corpora([str(folder / "c")])
    np.save(folder / "integers.npy", np.zeros(corpus.manifest.tokens, int))
    _, [problem] = opened(folder, **settings)
    assert sentence in problem
    assert "token_sets s: " in problem
