"""What a change of the corpora, their weights, the sequence length or the seed does to what was
read of each corpus.
"""

import json

import pytest

from megatron_slm.data.position import CorpusPosition, DataPosition, Stretch


def position(names, weights=(), sequence_length=16, seed=1) -> DataPosition:
    """Of corpora whose content is their name in capitals; nothing is read."""
    corpora = tuple(CorpusPosition(name, name.upper()) for name in names)
    return DataPosition(sequence_length, seed, tuple(weights), corpora)


def read(start: DataPosition, samples: int) -> DataPosition:
    return DataPosition(**{**vars(start), "samples": start.samples + samples})


def count(weights, samples):
    """Of three samples, one is of the second corpus."""
    return [samples] if len(weights) < 2 else [samples - samples // 3, samples // 3]


def no_count(weights, samples):
    raise AssertionError("nothing has changed, so nothing is counted")


def pasts(of: DataPosition) -> dict:
    return {each.prefix: each.past for each in of.corpora}


def test_an_unchanged_arrangement_stays_at_its_sample():
    before = read(position("ab", [2, 1]), 30)
    assert before.moved_to(position("ab", [2, 1]), no_count) == before
    assert before.changes(position("ab", [2, 1])) == []


def test_corpora_that_were_moved_go_on_under_their_new_names():
    before = read(position("ab", [2, 1]), 30)
    elsewhere = tuple(CorpusPosition(f"x/{c.prefix}", c.fingerprint) for c in before.corpora)
    wanted = DataPosition(16, 1, (2, 1), elsewhere)
    after = before.moved_to(wanted, no_count)
    assert (after.samples, after.corpora) == (30, elsewhere)


def test_a_corpus_that_is_added_begins_and_the_others_go_on():
    before = read(position("ab", [2, 1]), 30)
    after = before.moved_to(position("cba", [1, 1, 1]), count)
    assert after.samples == 0
    assert pasts(after) == {"c": (), "b": (Stretch(16, 1, 10),), "a": (Stretch(16, 1, 20),)}
    assert before.changes(position("cba", [1, 1, 1])) == [
        "data.train: c is new in this run and is read from its beginning"
    ]


def test_one_corpus_becomes_two():
    before = read(position("a"), 7)
    assert pasts(before.moved_to(position("ab", [1, 1]), count)) == {
        "a": (Stretch(16, 1, 7),),
        "b": (),
    }


def test_a_corpus_that_was_left_out_goes_on_where_it_was():
    before = read(position("ab", [2, 1]), 30)
    alone = before.moved_to(position("a"), count)
    assert [each.prefix for each in alone.left_out] == ["b"]
    assert "b is left out from here on" in before.changes(position("a"))[0]
    again = read(alone, 5).moved_to(position("ab", [1, 1]), count)
    assert pasts(again) == {"a": (Stretch(16, 1, 25),), "b": (Stretch(16, 1, 10),)}
    assert again.left_out == ()


def test_a_corpus_that_is_named_twice_is_read_at_two_places():
    before = read(position("aa", [2, 1]), 30)
    after = before.moved_to(position("aab", [1, 1, 1]), count)
    assert [each.past for each in after.corpora] == [
        (Stretch(16, 1, 20),),
        (Stretch(16, 1, 10),),
        (),
    ]


@pytest.mark.parametrize("change", [dict(sequence_length=32), dict(seed=9)])
def test_another_order_begins_after_what_was_read_in_the_old_one(change):
    before = read(position("ab", [2, 1]), 30)
    after = read(before.moved_to(position("ab", [2, 1], **change), count), 6)
    assert pasts(after) == {"a": (Stretch(16, 1, 20),), "b": (Stretch(16, 1, 10),)}
    back = after.moved_to(position("ab", [2, 1]), count)
    new = (change.get("sequence_length", 16), change.get("seed", 1))
    assert pasts(back)["a"] == (Stretch(16, 1, 20), Stretch(*new, 4))
    assert "no token of it is read twice" in before.changes(position("ab", [2, 1], **change))[0]


def test_weights_alone_are_a_change():
    before = read(position("ab", [2, 1]), 30)
    assert before.changes(position("ab", [1, 1])) == [
        "the blend of data.train has changed: each corpus goes on where it was"
    ]
    assert before.moved_to(position("ab", [1, 1]), count).samples == 0


def test_a_checkpoint_gives_back_what_it_was_given():
    before = read(position("ab", [0.1, 3]), 30)
    after = read(before.moved_to(position("cb", [1, 1], seed=2), count), 4)
    for each in (before, after):
        assert DataPosition.from_json(json.loads(json.dumps(each.to_json()))) == each
