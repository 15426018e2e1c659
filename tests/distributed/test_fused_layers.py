"""A decoder whose layers use the fused passes gives the losses and gradients that it gave before.

On CPU processes the passes are plain torch, so this holds what stands around the kernels: where the
layers call them, with which tensors, in every layout. The kernels are held in tests/unit/ops.
"""

import dataclasses

import pytest
import torch

from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.test_layouts import LENGTH, VOCABULARY, make_config
from tests.known_models import GEMMA_3, OLMO_3

LAYOUTS = {
    "one process": {},
    "tensor and sequence": dict(tp=2, sequence_parallel=True),
    "context": dict(cp=2),
}
WINDOWED = dict(attention_window_tokens=5, full_attention_layers=[1])
MODELS = {
    "grouped": {},
    "fewer groups than ranks": dict(query_groups=1),
    "norms of queries and keys": dict(qk_norm=True, head_size=6),
    "biases": dict(qkv_bias=True, query_groups=8),
    "stretched": dict(rope_scaling="linear", rope_scaling_factor=4.0),
    "a layer without rotary embedding": dict(layers_without_rope=[1]),
    "recomputed": dict(recompute="full"),
    "attention recomputed": dict(recompute="selective"),
    "a part of each head": dict(rope_fraction=0.5, attention_heads=4),
    "learned positions": dict(position_embedding="learned", learned_positions=LENGTH),
    "GELU without a gate": dict(
        activation="gelu", gated_feed_forward=False, feed_forward_bias=True, parallel_residual=True
    ),
    "biases everywhere, LayerNorm": dict(
        normalization="layernorm",
        qkv_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
    ),
    "norms on outputs and over all heads": OLMO_3 | WINDOWED,
    "zero-centered norms in both places": GEMMA_3 | WINDOWED,
    "experts": dict(experts=4, experts_per_token=2, load_balancing_coefficient=0.0),
}


def losses_and_gradients(model, text_BT: torch.Tensor, groups) -> dict[str, torch.Tensor]:
    chunks = text_BT[:, :-1].chunk(2 * groups.cp_size, dim=1)
    labels = text_BT[:, 1:].chunk(2 * groups.cp_size, dim=1)
    places = (groups.cp_rank, 2 * groups.cp_size - 1 - groups.cp_rank)
    tokens_BS = torch.cat([chunks[place] for place in places], dim=1)
    labels_BS = torch.cat([labels[place] for place in places], dim=1)
    loss_BS = model(tokens_BS, torch.zeros_like(tokens_BS), None, labels=labels_BS).loss_BS
    loss_BS.sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return {"loss": loss_BS.detach()} | gradients


def both(groups, name: str) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Per model and value: before and after."""
    from megatron_slm.model.build import build_model
    from megatron_slm.model.fused_layers import use_fused_passes

    generator = torch.Generator().manual_seed(0)
    text_BT = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
    found = {}
    for kind, changes in MODELS.items():
        config = make_config("data_parallel", LAYOUTS[name])
        config.model = dataclasses.replace(config.model, layers=2, **changes)
        (model,) = build_model(config, VOCABULARY, groups)
        before = losses_and_gradients(model, text_BT, groups)
        unfused = {place: module.forward for place, module in model.named_modules()}
        use_fused_passes(model)
        changed = [
            place for place, module in model.named_modules() if module.forward != unfused[place]
        ]
        # Every attention, and every feed-forward layer that is SwiGLU without biases.
        swiglu = config.model.activation == "silu" and not config.model.feed_forward_bias
        assert len(changed) >= (1 + swiglu) * config.model.layers, changed
        rotation = model.decoder.layers[0].self_attention.get_query_key_value_tensors.__self__
        whole_groups = config.model.query_groups >= groups.tp_size
        assert rotation.splits == (whole_groups and not config.model.qk_norm), kind
        after = losses_and_gradients(model, text_BT, groups)
        found[kind] = {each: (before[each], after[each]) for each in before}
    return found


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(both, LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_stay(results, layout, kind):
    for rank, found in enumerate(results[layout]):
        for name, (before, after) in found[kind].items():
            assert before.isfinite().all(), (rank, name)
            torch.testing.assert_close(
                after, before, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
