"""A Hugging Face folder from anybody: what its index of shards may name."""

import pytest

from megatron_slm.convert.safetensors_folder import SafetensorsFolder


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"weight_map": {"a": "../other.safetensors"}}', "names '../other.safetensors'"),
        ('{"weight_map": {"a": "/dev/zero"}}', "names '/dev/zero'"),
        ('{"weight_map": {"a": 3}}', "names 3"),
        ("{}", "no index of safetensors files"),
        ("[" * 100_000, "no index of safetensors files"),
    ],
)
def test_an_index_leads_to_files_of_its_folder_only(index, said, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=said):
        SafetensorsFolder(tmp_path)
