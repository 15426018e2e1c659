"""Family x option x layout: small models of transformers in, their logits here, and out again.

A model is imported, read into a parallel layout, saved from there and exported: its logits are
those of transformers, and the exported tensors those that came in, bit for bit.

SLM_CONVERSIONS=all tries every option in every layout; without it, the first option of each family.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm import export_hf, import_hf
from megatron_slm.config.schema import Config, DataConfig
from megatron_slm.convert.families.registry import MODEL_TYPES
from megatron_slm.convert.hf_settings import model_config
from megatron_slm.convert.safetensors_folder import SafetensorsFolder
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu
from tests.unit.convert.matrix_cases import CASES, SIZES
from tests.unit.convert.small_models import random_model, word_tokenizer

WHOLE = os.environ.get("SLM_CONVERSIONS") == "all"
LENGTH = 24
TOKENS_BS = torch.randint(0, 101, (2, LENGTH), generator=torch.Generator().manual_seed(5))
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": dict(tp=2, sequence_parallel=True),
    "pp2": dict(pp=2),
    "tp2_pp2": dict(tp=2, pp=2, sequence_parallel=True),
    "ep2": dict(dp=2, ep=2),
}
TRIED = LAYOUTS if WHOLE else {"tp2": LAYOUTS["tp2"]}
MODELS = {
    f"{model_type}, {option}": (model_type, settings)
    for model_type, options in CASES.items()
    for option, settings in list(options.items())[: None if WHOLE else 1]
}


def tried_in(layout: str, model: str) -> bool:
    """Expert parallelism is for mixtures of experts."""
    return "ep" not in LAYOUTS[layout] or "experts" in " ".join(MODELS[model][1])


PLACES = [(layout, model) for layout in TRIED for model in MODELS if tried_in(layout, model)]


def whole_logits(model, groups, sequence_parallel: bool) -> torch.Tensor | None:
    """Logits of the whole vocabulary, on the ranks of the last pipeline stage: [B, S, V]."""
    positions_BS = torch.arange(LENGTH).expand_as(TOKENS_BS)
    if groups.pp_rank > 0:
        local = LENGTH // (groups.tp_size if sequence_parallel else 1)
        hidden_SBH = torch.empty(local, len(TOKENS_BS), model.config.hidden_size)
        torch.distributed.recv(hidden_SBH, group=groups.pp, group_src=groups.pp_rank - 1)
        model.set_input_tensor(hidden_SBH)
    with torch.no_grad():
        output = model.eval()(TOKENS_BS, positions_BS, None)
    if not groups.is_last_stage:
        torch.distributed.send(output.contiguous(), group=groups.pp, group_dst=groups.pp_rank + 1)
        return None
    parts = [torch.empty_like(output) for _ in range(groups.tp_size)]
    torch.distributed.all_gather(parts, output.contiguous(), group=groups.tp)
    return torch.cat(parts, dim=-1)[..., :101]


def run_and_save(groups, layout: str, folder: str) -> dict[str, torch.Tensor | None]:
    """Logits of each imported model, which is saved again from this layout."""
    from megatron_slm.checkpoint.folder import read_checkpoint_info
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.checkpoint.weights import load_weights
    from megatron_slm.model.build import build_model

    results = {}
    for model in [model for place, model in PLACES if place == layout]:
        source = Path(folder, "imported", model)
        config = Config(
            model=read_checkpoint_info(source).reference_model(),
            data=DataConfig(sequence_length=LENGTH),
            parallel=parallel_config(LAYOUTS[layout]),
        )
        chunks = build_model(config, 101, groups)
        info = load_weights(chunks, source, groups)
        results[model] = whole_logits(chunks[0], groups, config.parallel.sequence)
        store = CheckpointStore(Path(folder, layout, model), groups)
        store.save(chunks, None, info, trainer_state(None, groups))
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of originals, imports and checkpoints by layout; logits of transformers by model,
    logits here by layout and model).
    """
    folder = tmp_path_factory.mktemp("matrix")
    theirs = {}
    for name, (model_type, settings) in MODELS.items():
        original = folder / "original" / name
        peer = random_model(model_type, spread=0.1, **(SIZES | settings))
        with torch.no_grad():
            theirs[name] = peer(TOKENS_BS).logits
        peer.save_pretrained(original)
        word_tokenizer(original)
        imported = str(folder / "imported" / name)
        assert import_hf.main(["--input", str(original), "--output", imported]) == 0
    ours = run_layouts_on_cpu(run_and_save, TRIED, str(folder), side_by_side=True)
    return folder, theirs, {layout: ranks[-1] for layout, ranks in ours.items()}


@pytest.mark.parametrize(("layout", "model"), PLACES)
def test_logits_are_those_of_transformers(runs, layout, model):
    _, theirs, ours = runs
    assert theirs[model].std() > 0.05
    torch.testing.assert_close(ours[layout][model], theirs[model], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "model"), PLACES)
def test_an_export_gives_back_every_tensor_bit_for_bit(runs, layout, model, tmp_path):
    folder = runs[0]
    checkpoint = ["--checkpoint", str(folder / layout / model), "--tokenizer", "none"]
    kind = ["--model-type", MODELS[model][0]]
    assert export_hf.main([*checkpoint, *kind, "--output", str(tmp_path / "export")]) == 0
    before = SafetensorsFolder(folder / "original" / model)
    after = SafetensorsFolder(tmp_path / "export")
    assert set(before) == set(after)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    configs = [
        json.loads((path / "config.json").read_text())
        for path in (folder / "original" / model, tmp_path / "export")
    ]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    read = [model_config(config)[0] for config in configs]
    assert read[0] == read[1]


def test_every_family_is_tried():
    assert set(CASES) == set(MODEL_TYPES)
