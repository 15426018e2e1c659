"""verify accepts a sound corpus and refuses a damaged one with a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from data_tools.verify import main
from megatron_slm.data.indexed import write_index
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.files.hashing import file_sha256
from megatron_slm.tokenization import load_tokenizer


def resign(prefix, **changes):
    """Make the manifest agree with damaged files, as a careless tool would."""
    manifest = json.loads(Path(f"{prefix}.manifest.json").read_text())
    manifest.update(
        bin_sha256=file_sha256(f"{prefix}.bin"),
        idx_sha256=file_sha256(f"{prefix}.idx"),
        **changes,
    )
    Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))


def test_sound(prefix, capsys):
    assert main([str(prefix)]) == 0
    out = capsys.readouterr().out
    assert "sound" in out
    assert "def add" in out
    assert main([f"{prefix}.bin"]) == 0


def test_truncated_bin(prefix, capsys):
    os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 2)
    assert main([str(prefix)]) == 3
    assert "truncated" in capsys.readouterr().err


def test_ids_outside_the_vocabulary(prefix, capsys):
    tokens = np.fromfile(f"{prefix}.bin", "<u2")
    tokens[5] = 60_000
    tokens.tofile(f"{prefix}.bin")
    assert main([str(prefix)]) == 3
    assert "changed" in capsys.readouterr().err
    resign(prefix)
    assert main([str(prefix)]) == 3
    assert "60000" in capsys.readouterr().err


def test_document_not_closed(prefix, capsys):
    tokens = np.fromfile(f"{prefix}.bin", "<u2")
    tokens[-1] = 7
    tokens.tofile(f"{prefix}.bin")
    resign(prefix)
    assert main([str(prefix)]) == 3
    assert "1 documents do not end" in capsys.readouterr().err


def test_another_tokenizer(prefix, tmp_path, vocabulary, capsys):
    changed = tmp_path / "other.model"
    changed.write_bytes(
        vocabulary.read_bytes() + b"\x12\x02\x38\x01"
    )  # one more trainer setting: same pieces, other file
    assert main([str(prefix), "--tokenizer", str(changed)]) == 3
    assert "not the tokenizer" in capsys.readouterr().err


def test_manifest_for_a_corpus_of_another_tool(tmp_path, vocabulary, capsys):
    np.array([5, 6, 2, 7, 2], "<u2").tofile(tmp_path / "m.bin")
    with open(tmp_path / "m.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint16), np.array([3, 2], np.int32))
    assert main([str(tmp_path / "m")]) == 3
    assert "--write-manifest" in capsys.readouterr().err
    assert main([str(tmp_path / "m"), "--write-manifest"]) == 3
    assert main([str(tmp_path / "m"), "--write-manifest", "--tokenizer", str(vocabulary)]) == 0
    made = CorpusManifest.read(tmp_path / "m")
    assert made.append_eod
    assert not made.prepend_bos
    assert main([str(tmp_path / "m")]) == 0
    bos_id = load_tokenizer(vocabulary).bos_id
    np.array([bos_id, 6, 2, bos_id, 2], "<u2").tofile(tmp_path / "m.bin")
    os.unlink(tmp_path / "m.manifest.json")
    assert main([str(tmp_path / "m"), "--write-manifest", "--tokenizer", str(vocabulary)]) == 0
    assert CorpusManifest.read(tmp_path / "m").prepend_bos
    np.array([5, 6, 2, 9999, 2], "<u2").tofile(tmp_path / "m.bin")
    os.unlink(tmp_path / "m.manifest.json")
    assert main([str(tmp_path / "m"), "--write-manifest", "--tokenizer", str(vocabulary)]) == 3
    assert not (tmp_path / "m.manifest.json").exists()
