"""What torch.save wrote is loaded when it is tensors and plain values, and refused by name when it
is anything else.
"""

import argparse
import io
import pathlib
import random

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_slm.checkpoint.plain_reader import (
    NOTHING,
    RANDOM_STATES,
    TENSORS,
    PlainReader,
    load_plain,
)
from megatron_slm.files.inert_pickle import UnsafeFile

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def saved(value, **how) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    stream.seek(0)
    return stream


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_and_plain_values_are_loaded(dtype):
    value = {"a": [torch.ones(3, 2, dtype=dtype), 1, 2.5, "x", None, True], 3: (1, 2)}
    loaded = load_plain(saved(value), TENSORS, "F")
    assert torch.equal(loaded["a"][0], value["a"][0])
    assert (loaded["a"][1:], loaded[3]) == (value["a"][1:], value[3])


class Planted:
    def __reduce__(self):
        return eval, ("1/0",)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Planted(), "builtins.eval"),
        (torch.nn.Parameter(torch.ones(1)), "torch._utils._rebuild_parameter"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (pathlib.PurePosixPath("/etc"), "PurePosixPath"),
        (argparse.Namespace(a=1), "argparse.Namespace"),
        (np.ones(2), "numpy.ndarray"),
    ],
)
def test_anything_else_is_refused_by_name(value, name):
    torch.serialization.add_safe_globals([argparse.Namespace, pathlib.PurePosixPath])
    with pytest.raises(UnsafeFile, match="^FOLDER/common.pt: refused") as refusal:
        load_plain(saved([value]), TENSORS, "FOLDER/common.pt")
    assert name in str(refusal.value)


def test_the_list_is_the_reader_s_own():
    with pytest.raises(UnsafeFile, match="torch.FloatStorage"):
        load_plain(saved(torch.ones(1)), NOTHING, "F")


def test_what_others_allow_is_allowed_again_afterwards():
    before = set(torch.serialization.get_safe_globals())
    load_plain(saved([1]), TENSORS, "F")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "stream",
    [
        io.BytesIO(b""),
        io.BytesIO(b"no archive"),
        saved([1, 2], _use_new_zipfile_serialization=False),  # torch's old format
        io.BytesIO(saved([1, 2]).getvalue()[:-40]),
    ],
)
def test_what_is_no_archive_is_named_unreadable(stream):
    with pytest.raises(ValueError, match="^FOLDER/x: not readable"):
        load_plain(stream, TENSORS, "FOLDER/x")


def round_trip(folder, key: str, value) -> object:
    """Save one object as megatron-core packs it, in a list that is not flattened, and load it
    through PlainReader.
    """
    dcp.save(
        {key: [value]},
        storage_writer=dcp.FileSystemWriter(folder),
        planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    state = {key: None}
    dcp.load(state, storage_reader=PlainReader(folder), no_dist=True)
    return state[key][0]


def test_random_states_go_on_where_they_were(tmp_path):
    generator = np.random.RandomState(3)
    state = {
        "python": random.Random(5).getstate(),
        "numpy": generator.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": {"model": torch.get_rng_state()},
    }
    loaded = round_trip(tmp_path, "random/shard_0_1", state)
    again = np.random.RandomState(0)
    again.set_state(loaded["numpy"])
    assert again.randint(10**6, size=5).tolist() == generator.randint(10**6, size=5).tolist()
    assert loaded["python"] == state["python"]
    assert torch.equal(loaded["tracker"]["model"], state["tracker"]["model"])


@pytest.mark.parametrize(
    "array", [np.array([object], dtype=object), np.ones(3), np.ones((2, 2), np.uint32)]
)
def test_an_array_that_is_no_random_state_is_refused(array, tmp_path):
    with pytest.raises(BaseException, match="no vector of uint32|refused"):
        round_trip(tmp_path, "random/shard_0_1", {"numpy": ("MT19937", array)})


def test_the_random_list_is_for_random_states_only(tmp_path):
    with pytest.raises(BaseException, match="refused, because it names .*numpy"):
        round_trip(tmp_path, "layer._extra_state/shard_0_1", np.ones(3, np.uint32))


def test_arrays_are_read_under_both_of_numpy_s_names():
    """numpy 1 and 2 write another name for the same function."""
    assert {"numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"} <= (
        RANDOM_STATES
    )


def test_a_tensor_entry_that_is_something_else_is_refused(tmp_path):
    dcp.save({"w": torch.ones(4)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    [file] = tmp_path.glob("*.distcp")
    content = saved([torch.ones(4)]).getvalue()
    reader = PlainReader(tmp_path)
    place = next(iter(reader.read_metadata().storage_data.values()))
    place.length = len(content)
    file.write_bytes(content)
    with pytest.raises(BaseException, match=f"{file.name}: w is no tensor"):
        dcp.load({"w": torch.zeros(4)}, storage_reader=reader, no_dist=True)
