""".metadata read as data is what torch would unpickle, and what it says about the folder's files
has to be true.
"""

import pickle

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_slm.checkpoint.metadata_file import METADATA, read_metadata
from megatron_slm.files.inert_pickle import UnsafeFile

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path):
    state = {
        "weight": torch.arange(12.0).reshape(3, 4),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "object": {"epoch": 3},
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    return tmp_path


def changed(folder, change) -> None:
    """Let `change` work on the unpickled .metadata and write it back."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def test_it_says_what_torch_would_unpickle(folder):
    torchs = pickle.loads((folder / METADATA).read_bytes())
    ours = read_metadata(folder)
    assert ours.storage_data == torchs.storage_data
    assert list(ours.state_dict_metadata) == list(torchs.state_dict_metadata)
    for name, theirs in torchs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert type(mine) is type(theirs)
        if not isinstance(theirs, BytesStorageMetadata):
            assert (mine.properties, mine.size, mine.chunks) == (
                theirs.properties,
                theirs.size,
                theirs.chunks,
            )


def places(metadata, name):
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def other_file(name):
    def change(metadata):
        places(metadata, "weight").relative_path = name

    return change


def further(metadata):
    places(metadata, "weight").length += 10**9


def before(metadata):
    places(metadata, "weight").offset = -1


def compressed(metadata):
    places(metadata, "weight").transform_descriptors = ["stream.zstd"]


def larger(metadata):
    metadata.state_dict_metadata["weight"].size = torch.Size([10**9, 10**9])


def without_end(metadata):
    metadata.state_dict_metadata["weight"].size = torch.Size([10**15, 0])


def outside(metadata):
    metadata.state_dict_metadata["weight"].chunks[0].offsets = torch.Size([1, 0])


def no_tensor(metadata):
    metadata.state_dict_metadata["weight"] = "a tensor"


def no_chunks(metadata):
    metadata.state_dict_metadata["weight"].chunks = None


def no_places(metadata):
    metadata.storage_data = None


def other_keys(metadata):
    metadata.state_dict_metadata = {3: BytesStorageMetadata()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_file("../../weights"), "leads out of the folder"),
        (other_file("/dev/zero"), "leads out of the folder"),
        (other_file("gone.distcp"), "gone.distcp: cannot be read"),
        (further, "up to byte"),
        (before, "a place in"),
        (compressed, "compressed"),
        (larger, "takes 4000000000000000000 bytes"),
        (without_end, "has the size or offset"),
        (outside, "outside of it"),
        (no_tensor, "expected TensorStorageMetadata, got 'a tensor'"),
        (no_chunks, "no list of pieces"),
        (no_places, "expected a mapping"),
        (other_keys, "3 names an entry"),
    ],
)
def test_what_the_folder_cannot_hold_is_refused(change, said, folder):
    changed(folder, change)
    with pytest.raises(ValueError, match=said) as refusal:
        read_metadata(folder)
    assert str(folder / METADATA) in str(refusal.value)


def test_a_link_to_another_file_is_refused(folder):
    (folder / "elsewhere").write_bytes((folder / "__0_0.distcp").read_bytes())
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").symlink_to(folder / "elsewhere")
    with pytest.raises(ValueError, match="__0_0.distcp: is no plain file"):
        read_metadata(folder)


def test_a_class_of_megatron_or_torch_that_is_not_listed_is_refused(folder):
    changed(folder, lambda metadata: setattr(metadata, "planner_data", torch.nn.Linear(1, 1)))
    with pytest.raises(UnsafeFile, match="torch.nn.modules.linear.Linear"):
        read_metadata(folder)
