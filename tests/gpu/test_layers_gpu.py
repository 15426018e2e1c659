"""What layers have on a GPU only. Skipped without CUDA.

apex's fused norm, fp8 products, and the masks of isolated documents in fused attention.
"""

import dataclasses

import pytest
import torch

from megatron_slm.accelerations import apex_rms_norm, has_transformer_engine
from megatron_slm.config.schema import Config
from tests.known_models import GEMMA_3, GPT_2, NEOX, OLMO_3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEQUENCES, LENGTH, VOCABULARY = 2, 64, 500


def losses(
    groups,
    precision="fp32",
    fp8="none",
    layers="torch",
    isolated=False,
    model=None,
    fused_layers="auto",
):
    """(loss_BS, gradient of the embedding) of one backward pass on fixed tokens."""
    from megatron_slm.data.batch import hidden_from
    from megatron_slm.model.build import build_model
    from megatron_slm.model.decoder import head_output

    config = Config()
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=128,
        ffn_hidden_size=256,
        attention_heads=4,
        query_groups=2,
        **(model or {}),
    )
    config.data.document_policy = "isolated" if isolated else "packed"
    config.device = dataclasses.replace(
        config.device, precision=precision, fp8=fp8, layers=layers, fused_layers=fused_layers
    )
    decoder = build_model(config, VOCABULARY, groups)[0]
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator, device="cuda")
    positions = torch.arange(LENGTH, device="cuda").expand_as(tokens)
    starts = torch.where(positions < 20, 0, 20) if isolated else None
    output = decoder(
        tokens,
        positions,
        None if starts is None else hidden_from(starts),
        labels=tokens.roll(-1, 1),
    )
    loss = head_output(output).loss_BS
    loss.sum().backward()
    name = "embedding.word_embeddings.weight"
    return (
        loss.detach(),
        next(p.grad.float() for n, p in decoder.named_parameters() if n.endswith(name)),
        tokens,
    )


@pytest.mark.skipif(
    not torch.cuda.is_available() or apex_rms_norm() is None,
    reason="apex's fused norms are not built",
)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_apex_norm_is_torchs(dtype, tolerance):
    from types import SimpleNamespace

    from megatron_slm.model.layers import RMSNorm

    config = SimpleNamespace(
        params_dtype=dtype, sequence_parallel=False, layernorm_zero_centered_gamma=False
    )
    norm = RMSNorm(config, 256)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    hidden = torch.randn(8, 2, 256, device="cuda", dtype=dtype)
    results = []
    for fused in (norm.fused, None):
        norm.fused, leaf = fused, hidden.clone().requires_grad_()
        out = norm(leaf)
        norm.weight.grad = None
        out.float().pow(2).sum().backward()
        results.append((out.detach(), leaf.grad, norm.weight.grad))
    assert all(a.dtype == b.dtype for a, b in zip(*results, strict=True))
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


def test_isolated_documents_do_not_see_each_other(groups):
    """The second document's losses are those of the same tokens run alone."""
    loss, _, _ = losses(groups, isolated=True)
    packed, _, _ = losses(groups)
    assert torch.allclose(loss[:, :20], packed[:, :20], atol=1e-4)
    assert not torch.allclose(loss[:, 20:], packed[:, 20:], atol=1e-3)


NEEDS_TRANSFORMER_ENGINE = pytest.mark.skipif(
    not has_transformer_engine(), reason="no Transformer Engine"
)


ENGINES = pytest.mark.parametrize(
    "layers, precision, tolerance",
    [
        ("torch", "fp32", 1e-3),
        ("torch", "bf16", 5e-2),
        pytest.param("transformer_engine", "fp32", 1e-3, marks=NEEDS_TRANSFORMER_ENGINE),
        pytest.param("transformer_engine", "bf16", 5e-2, marks=NEEDS_TRANSFORMER_ENGINE),
    ],
)
PARTS = {
    "neox": NEOX,
    "gpt-2": GPT_2 | dict(learned_positions=LENGTH),
    "a layer without rotary embedding": dict(layers_without_rope=[1]),
    "bias of the feed-forward layer alone": dict(feed_forward_bias=True),
    "gelu with a gate": dict(activation="gelu", qk_norm=True, normalization="layernorm"),
}


WINDOWED = dict(attention_window_tokens=10, full_attention_layers=[1])
NORMS = {
    "olmo 3": WINDOWED | OLMO_3 | dict(rope_original_sequence_length=16),
    "gemma 3": WINDOWED | GEMMA_3 | dict(attention_scale_size=48.0, embedding_scale=128**0.5),
}


def plain_loss(groups, tokens, model: dict) -> torch.Tensor:
    """The losses of the plain decoder with the same weights, on the CPU."""
    from megatron_slm.model.build import build_model
    from megatron_slm.testing.plain import PlainDecoder

    config = Config()
    config.device.layers = "torch"
    sizes = dict(layers=2, hidden_size=128, ffn_hidden_size=256, attention_heads=4, query_groups=2)
    config.model = dataclasses.replace(config.model, **sizes, **model)
    source = build_model(config, VOCABULARY, groups)[0]
    state = {name: weight.detach().cpu() for name, weight in source.named_parameters()}
    plain = PlainDecoder(config.model, VOCABULARY, state)
    with torch.no_grad():
        return plain.loss(tokens.cpu(), tokens.roll(-1, 1).cpu())


@ENGINES
@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_the_model_are_plain_torchs(groups, layers, precision, tolerance, parts):
    """GELU is the exact one also where megatron-core has a fused approximation of it."""
    model = PARTS[parts] | {"initialization_std": 0.1}
    loss, gradient, tokens = losses(groups, precision, layers=layers, model=model)
    assert (loss.cpu() - plain_loss(groups, tokens, model)).abs().mean() < tolerance
    assert gradient.isfinite().all()


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("norms", NORMS)
def test_norms_in_other_places_are_plain_torchs(groups, precision, tolerance, norms):
    """By the torch-native layers, which device.layers auto means for these models."""
    model = NORMS[norms] | {"initialization_std": 0.1}
    loss, gradient, tokens = losses(groups, precision, layers="auto", model=model)
    assert (loss.cpu() - plain_loss(groups, tokens, model)).abs().mean() < tolerance
    assert gradient.isfinite().all()


@ENGINES
@pytest.mark.parametrize("full", [[], [0]])
def test_a_window_hides_what_lies_before_it(groups, layers, precision, tolerance, full):
    """Losses are those of the plain decoder, and differ from full attention where they must."""
    windows = {"attention_window_tokens": 10, "full_attention_layers": full}
    drawn = {"initialization_std": 0.1}
    loss, _, tokens = losses(groups, precision, layers=layers, model=windows | drawn)
    expected = plain_loss(groups, tokens, windows | drawn)
    assert (loss.cpu() - expected).abs().mean() < tolerance
    without, _, _ = losses(groups, precision, layers=layers, model=drawn)
    assert (loss - without)[:, 20:].abs().mean() > 0.2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_fp32(groups, precision):
    loss, gradient, _ = losses(groups, precision)
    expected, expected_gradient, _ = losses(groups)
    assert (loss - expected).abs().mean() < 0.02
    assert (gradient - expected_gradient).norm() < 0.05 * expected_gradient.norm()


@pytest.mark.skipif(
    not torch.cuda.is_available()
    or not has_transformer_engine()
    or torch.cuda.get_device_capability() < (8, 9),
    reason="fp8 needs Transformer Engine and compute capability 8.9",
)
@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_fp8_is_near_bf16(groups, fp8):
    loss, gradient, _ = losses(groups, "bf16", fp8, "auto")
    expected, expected_gradient, _ = losses(groups, "bf16", "none", "auto")
    assert not torch.equal(loss, expected), "fp8 changed nothing: it is not on"
    assert (loss - expected).abs().mean() < 0.1
    assert (gradient - expected_gradient).norm() < 0.2 * expected_gradient.norm()
