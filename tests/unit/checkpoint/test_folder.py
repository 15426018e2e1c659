"""Checkpoints on disk: a rename completes one, and nothing half-written, damaged or removed is ever
taken for one.
"""

import json
import shutil

import pytest

from megatron_slm.checkpoint import folder as folders
from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    complete,
    complete_checkpoints,
    damaged_files,
    read_checkpoint_info,
    resolve_checkpoint,
    step_folder,
    step_of,
    writing_folder,
)
from megatron_slm.files.hashing import file_sha256
from megatron_slm.files.plain import LeadsOutside

WEIGHTS = b"weights" * 1000


def info(step: int) -> CheckpointInfo:
    return CheckpointInfo(
        {"layers": 2, "vocabulary_size": 300},
        64,
        {"path": "t.model", "fingerprint": "sha256:t"},
        step,
        step * 512,
        precision="bf16",
    )


def write(checkpoints, step: int, weights: bytes = WEIGHTS):
    """The files a save leaves in the folder that is not yet a checkpoint, and their checksums."""
    writing = writing_folder(checkpoints, step)
    writing.mkdir(parents=True)
    (writing / "__0_0.distcp").write_bytes(weights)
    (writing / "common.pt").write_bytes(b"common")
    return {name: file_sha256(writing / name) for name in ("__0_0.distcp", "common.pt")}


def save(checkpoints, step: int, weights: bytes = WEIGHTS):
    return complete(
        checkpoints, step, info(step), {"step": step}, write(checkpoints, step, weights)
    )


@pytest.fixture
def checkpoints(tmp_path):
    return tmp_path / "run" / "checkpoints"


def test_completing_renames_and_moves_the_pointer(checkpoints):
    for step in (100, 200):
        assert save(checkpoints, step) == step_folder(checkpoints, step)
        assert not writing_folder(checkpoints, step).exists()
        assert (checkpoints / "latest").read_text() == f"step_{step:08d}\n"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step_00000100",
        "step_00000200",
    ]
    assert json.loads((step_folder(checkpoints, 200) / "trainer.json").read_text()) == {"step": 200}


def test_the_description_comes_back(checkpoints):
    save(checkpoints, 100)
    found = read_checkpoint_info(checkpoints)
    assert found.fingerprint.startswith("sha256:")
    assert found == CheckpointInfo(**{**vars(info(100)), "fingerprint": found.fingerprint})


def test_the_fingerprint_is_of_the_weights_alone(checkpoints, tmp_path):
    first = save(checkpoints, 100)
    again = save(tmp_path / "elsewhere", 300)
    other = save(tmp_path / "other", 100, b"other weights")
    assert (
        read_checkpoint_info(first).fingerprint
        == read_checkpoint_info(again).fingerprint
        != read_checkpoint_info(other).fingerprint
    )


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step_00000200"])
def test_resolve_takes_a_run_its_checkpoints_or_one_of_them(checkpoints, below):
    for step in (100, 200, 9):
        save(checkpoints, step)
    assert resolve_checkpoint(checkpoints.parent / below) == step_folder(checkpoints, 200)
    assert resolve_checkpoint(str(step_folder(checkpoints, 9))) == step_folder(checkpoints, 9)


def test_resolve_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint; give a run folder"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_order_is_by_number_also_beyond_eight_digits(checkpoints):
    for step in (100_000_000, 99_999_999, 2):
        save(checkpoints, step)
    assert [step_of(path) for path in complete_checkpoints(checkpoints)] == [
        2,
        99_999_999,
        100_000_000,
    ]


def test_names_that_are_no_checkpoints_are_passed_over(checkpoints):
    save(checkpoints, 1)
    for name in (
        ".writing_step_00000002",
        ".removing_step_00000003",
        ".replaced_step_00000004",
        "step_5",
        "step_00000006_copy",
        "old_step_00000007",
    ):
        (checkpoints / name).mkdir()
    (checkpoints / "step_00000008").write_text("a file, no folder")
    assert [path.name for path in complete_checkpoints(checkpoints)] == ["step_00000001"]


def test_a_kill_between_any_two_writes_leaves_the_older_checkpoint(checkpoints, monkeypatch):
    """Stop the completion at each of its file operations in turn: the newest checkpoint is whole,
    old or new.
    """
    save(checkpoints, 100)

    class Killed(Exception):
        pass

    def run_until(operation: int) -> bool:
        """Complete step 200, killed at the given operation; whether the kill happened."""
        count = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == operation:
                    raise Killed
                return function(*args, **kwargs)

            return call

        shutil.rmtree(writing_folder(checkpoints, 200), ignore_errors=True)
        checksums = write(checkpoints, 200)
        with monkeypatch.context() as patch:
            for name in ("write_json", "sync_path", "point_to", "file_sha256"):
                patch.setattr(folders, name, counted(getattr(folders, name)))
            for name in ("rename", "replace"):
                patch.setattr(type(checkpoints), name, counted(getattr(type(checkpoints), name)))
            try:
                complete(checkpoints, 200, info(200), {"step": 200}, checksums)
            except Killed:
                return True
        return False

    seen = set()
    operation = 1
    while run_until(operation):
        newest = resolve_checkpoint(checkpoints)
        assert damaged_files(newest) == []
        assert read_checkpoint_info(newest).step == step_of(newest)
        seen.add(step_of(newest))
        shutil.rmtree(step_folder(checkpoints, 200), ignore_errors=True)
        operation += 1
    assert operation > 8
    assert seen == {100, 200}
    assert (checkpoints / "latest").read_text() == "step_00000200\n"


def test_saving_a_step_again_replaces_it(checkpoints):
    save(checkpoints, 100, b"first")
    save(checkpoints, 100, b"second")
    assert (step_folder(checkpoints, 100) / "__0_0.distcp").read_bytes() == b"second"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000100"]


def test_a_whole_checkpoint_has_no_damage(checkpoints):
    assert damaged_files(save(checkpoints, 100)) == []


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", "model.json", "trainer.json"])
def test_one_flipped_bit_is_found(checkpoints, name):
    path = save(checkpoints, 100) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert damaged_files(path.parent) == [name]


def test_missing_and_shortened_files_are_found(checkpoints):
    checkpoint = save(checkpoints, 100)
    (checkpoint / "common.pt").unlink()
    with open(checkpoint / "__0_0.distcp", "r+b") as file:
        file.truncate(len(WEIGHTS) - 1)
    assert damaged_files(checkpoint) == ["__0_0.distcp", "common.pt"]


@pytest.mark.parametrize("content", [None, "{", ""])
def test_unreadable_checksums_are_damage(checkpoints, content):
    checkpoint = save(checkpoints, 100)
    (checkpoint / "checksums.json").unlink() if content is None else (
        checkpoint / "checksums.json"
    ).write_text(content)
    assert damaged_files(checkpoint) == ["checksums.json"]
    with pytest.raises(ValueError, match="damaged checkpoint.*use an older"):
        read_checkpoint_info(checkpoint)


def test_ranks_share_the_checking(checkpoints):
    checkpoint = save(checkpoints, 100)
    for path in checkpoint.iterdir():
        if path.name != "checksums.json":
            path.write_bytes(b"?")
    shares = [damaged_files(checkpoint, (rank, 3)) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == [
        "__0_0.distcp",
        "common.pt",
        "model.json",
        "trainer.json",
    ]
    assert all(len(share) <= 2 for share in shares)


def test_kills_leave_nothing_behind_that_tidy_does_not_clear(checkpoints):
    """An unfinished save goes; a checkpoint that was being replaced gets its name back, unless its
    successor arrived.
    """
    save(checkpoints, 100), save(checkpoints, 200)
    write(checkpoints, 300)
    step_folder(checkpoints, 100).rename(checkpoints / ".replaced_step_00000100")
    shutil.copytree(step_folder(checkpoints, 200), checkpoints / ".replaced_step_00000200")
    shutil.copytree(step_folder(checkpoints, 200), checkpoints / ".removing_step_00000050")
    folders.tidy(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step_00000100",
        "step_00000200",
    ]
    assert damaged_files(step_folder(checkpoints, 100)) == []
    folders.tidy(checkpoints / "nowhere")


def test_going_on_from_an_older_one_sets_the_damaged_aside(checkpoints):
    for step in (100, 200, 300):
        save(checkpoints, step)
    for _ in range(2):  # also when one of that name lies there already
        folders.settle_on(
            step_folder(checkpoints, 100),
            [step_folder(checkpoints, 300), step_folder(checkpoints, 200)],
        )
        assert [step_of(path) for path in complete_checkpoints(checkpoints)] == [100]
        assert (
            resolve_checkpoint(checkpoints / "latest")
            == resolve_checkpoint(checkpoints)
            == step_folder(checkpoints, 100)
        )
        assert sorted(path.name for path in checkpoints.glob("*.damaged")) == [
            "step_00000200.damaged",
            "step_00000300.damaged",
        ]
        save(checkpoints, 200), save(checkpoints, 300)
    assert resolve_checkpoint(checkpoints / "latest") == step_folder(checkpoints, 300)


@pytest.mark.parametrize("content", [b"\xff{}", b"[1]", b"3"])
def test_a_flipped_byte_in_checksums_is_damage_and_no_crash(checkpoints, content):
    checkpoint = save(checkpoints, 100)
    (checkpoint / "checksums.json").write_bytes(content)
    assert damaged_files(checkpoint) == ["checksums.json"]


def test_a_file_that_cannot_be_read_is_damage(checkpoints, monkeypatch):
    checkpoint = save(checkpoints, 100)

    def unreadable(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(folders, "file_sha256", unreadable)
    assert damaged_files(checkpoint) == ["__0_0.distcp", "common.pt", "model.json", "trainer.json"]


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "/dev/zero", "sub/file", ".."])
def test_checksums_that_lead_out_of_the_folder_are_refused_by_every_rank(checkpoints, name):
    """Each rank checks some of the files; an error of one would leave the others waiting."""
    folder = save(checkpoints, 100)
    checksums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps({**checksums, name: "0" * 64}))
    for rank in range(8):
        with pytest.raises(LeadsOutside, match=f"checksums.json names '{name}'"):
            damaged_files(folder, (rank, 8))
    with pytest.raises(LeadsOutside, match=f"checksums.json names '{name}'"):
        read_checkpoint_info(folder)


@pytest.mark.parametrize("target", ["/dev/zero", "elsewhere"])
def test_a_link_in_place_of_a_file_is_damage_and_is_not_followed(checkpoints, target):
    folder = save(checkpoints, 100)
    (folder / "elsewhere").write_bytes((folder / "common.pt").read_bytes())
    (folder / "common.pt").unlink()
    (folder / "common.pt").symlink_to(target)
    assert damaged_files(folder) == ["common.pt"]


@pytest.mark.parametrize("name", ["model.json", "checksums.json"])
def test_a_description_that_is_a_device_is_not_read(checkpoints, name):
    folder = save(checkpoints, 100)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{name}: is no plain file|holds no complete"):
        read_checkpoint_info(folder)
