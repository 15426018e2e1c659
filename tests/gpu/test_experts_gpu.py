"""A mixture of experts on a GPU against the plain decoder. Skipped without CUDA.

Torch-native experts run one by one, Transformer Engine's are grouped.
"""

import dataclasses

import pytest
import torch

from megatron_slm.accelerations import has_transformer_engine
from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEQUENCES, LENGTH, VOCABULARY = 2, 32, 500


def make_config(layers: str, precision: str) -> Config:
    config = Config()
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=128,
        ffn_hidden_size=256,
        attention_heads=4,
        query_groups=2,
        experts=8,
        load_balancing_coefficient=0.1,
        router_z_loss_coefficient=0.01,
        initialization_std=0.1,
    )
    config.device = dataclasses.replace(config.device, layers=layers, precision=precision)
    return config


def whole_objective(model, tokens, labels) -> torch.Tensor:
    """What one micro-batch of plain training differentiates.

    The routers attach their losses themselves.
    """
    from megatron_slm.model.decoder import head_output
    from megatron_slm.model.router import scale_auxiliary_losses

    scale_auxiliary_losses([model], torch.ones((), device="cuda"))
    positions = torch.arange(LENGTH, device="cuda").expand_as(tokens)
    return head_output(model(tokens, positions, None, labels=labels)).loss_BS.mean()


@pytest.mark.parametrize(
    "layers, precision, tolerance",
    [
        ("torch", "fp32", 1e-4),
        ("torch", "bf16", 5e-2),
        pytest.param(
            "transformer_engine",
            "fp32",
            1e-3,
            marks=pytest.mark.skipif(not has_transformer_engine(), reason="no Transformer Engine"),
        ),
        pytest.param(
            "transformer_engine",
            "bf16",
            5e-2,
            marks=pytest.mark.skipif(not has_transformer_engine(), reason="no Transformer Engine"),
        ),
    ],
)
def test_loss_and_gradient_are_those_of_the_plain_decoder(layers, precision, tolerance, groups):
    """In bf16 the loss alone.

    Weights are drawn by name and expert number, so the grouped experts start as the single ones do.
    """
    from megatron_slm.model.build import build_model

    torch.backends.cuda.matmul.allow_tf32 = False
    source = build_model(make_config("torch", "fp32"), VOCABULARY, groups)[0]
    config = make_config(layers, precision)
    plain = PlainDecoder(
        config.model, VOCABULARY, {name: p.cpu() for name, p in source.named_parameters()}
    )
    tokens = torch.randint(
        0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    labels = tokens.roll(-1, 1)
    expected = plain.loss(tokens, labels).mean()
    balance, z_loss = plain.auxiliary_losses([[0, 1]])
    (
        expected
        + config.model.load_balancing_coefficient * balance
        + config.model.router_z_loss_coefficient * z_loss
    ).backward()

    model = build_model(config, VOCABULARY, groups)[0].train()
    loss = whole_objective(model, tokens.cuda(), labels.cuda())
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    if precision == "bf16":
        # Rounding sends some tokens to other experts, which hardly changes the loss, but does
        # change a router's gradient.
        return
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    for name in (
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.1.mlp.router.weight",
    ):
        wanted = plain.weight(name).grad
        assert (gradients[name].float().cpu() - wanted).norm() <= 3 * tolerance * wanted.norm(), (
            name
        )
