"""Every rule about sizes, the layout and engines has a value that breaks it.

The message names the field, the value and what to do.
"""

import pytest

RULES = [
    ("model.layers", dict(model__layers=0), "got 0", "at least 1"),
    (
        "model.hidden_size",
        dict(model__hidden_size=254),
        "got 254",
        "change model.attention_heads, or set model.head_size",
    ),
    ("model.head_size", dict(model__head_size=33), "got 33", "even head size"),
    ("model.head_size", dict(model__hidden_size=12), "got 3", "even head size"),
    (
        "model.query_groups",
        dict(model__query_groups=3),
        "got 3",
        "divide model.attention_heads (4)",
    ),
    ("model.dropout", dict(model__dropout=1.0), "got 1.0", "below 1"),
    (
        "model.rope_scaling_factor",
        dict(model__rope_scaling="linear", model__rope_scaling_factor=0.5),
        "got 0.5",
        "at least 1",
    ),
    (
        "model.rope_original_sequence_length",
        dict(model__rope_scaling="llama3", model__rope_original_sequence_length=0),
        "got 0",
        "at least 1",
    ),
    (
        "model.rope_low_frequency_factor",
        dict(model__rope_scaling="llama3", model__rope_low_frequency_factor=4.0),
        "got 4.0",
        "model.rope_high_frequency_factor (4.0)",
    ),
    (
        "device.head_engine",
        dict(device__head_engine="liger", device__kind="cuda"),
        "precision fp32",
        "use torch",
    ),
    (
        "device.head_engine",
        dict(device__head_engine="liger", device__kind="cpu", device__precision="bf16"),
        "kind cpu",
        "use torch",
    ),
    (
        "model.hidden_size",
        dict(device__head_engine="liger", device__precision="bf16", model__hidden_size=264),
        "got 264",
        "multiple of 64",
    ),
    (
        "model.rope_beta_slow",
        dict(model__rope_scaling="yarn", model__rope_beta_slow=40.0),
        "got 40.0",
        "below model.rope_beta_fast (32.0)",
    ),
    (
        "model.rope_base",
        dict(model__rope_scaling="yarn", model__rope_base=1.0),
        "got 1.0",
        "above 1",
    ),
    (
        "model.full_attention_layers",
        dict(model__full_attention_layers=[1]),
        "attention_window_tokens 0",
        "leave it out",
    ),
    (
        "model.full_attention_layers",
        dict(model__attention_window_tokens=8, model__full_attention_layers=[1, 4]),
        "got [1, 4]",
        "from 0 to 3",
    ),
    (
        "model.full_attention_layers",
        dict(model__attention_window_tokens=8, model__full_attention_layers=[0, 1, 2, 3]),
        "got all 4 layers",
        "set it to 0",
    ),
    (
        "parallel.context",
        dict(model__attention_window_tokens=8, parallel__context=2, world_size=2),
        "windows across context-parallel ranks",
        "set device.layers to torch",
    ),
    ("model.attention_window_tokens", dict(model__attention_window_tokens=-1), "got -1", "0"),
    ("model.rope_fraction", dict(model__rope_fraction=0.0), "got 0.0", "above 0"),
    ("model.rope_fraction", dict(model__rope_fraction=0.05), "is 3 channels", "an even number"),
    (
        "model.rope_fraction",
        dict(model__rope_fraction=0.5, model__rope_scaling="yarn"),
        "rope_scaling yarn",
        "rope_fraction 1",
    ),
    (
        "model.learned_positions",
        dict(model__learned_positions=512),
        "with position_embedding rope",
        "set it to 0",
    ),
    (
        "model.learned_positions",
        dict(model__position_embedding="learned", model__learned_positions=255),
        "got 255",
        "the 256 positions of data.sequence_length",
    ),
    (
        "model.rope_scaling",
        dict(
            model__position_embedding="learned",
            model__learned_positions=256,
            model__rope_scaling="linear",
        ),
        "got linear",
        "leave it out",
    ),
    (
        "model.attention_output_bias",
        dict(model__attention_output_bias=True),
        "qkv_bias false",
        "set qkv_bias to true",
    ),
    (
        "model.feed_forward_bias",
        dict(model__experts=4, model__feed_forward_bias=True),
        "got true with model.experts 4",
        "set it to false",
    ),
    (
        "model.activation",
        dict(model__experts=4, model__activation="gelu"),
        "got gelu with model.experts 4",
        "set it to silu",
    ),
    (
        "model.gated_feed_forward",
        dict(model__experts=4, model__gated_feed_forward=False),
        "got false with model.experts 4",
        "set it to true",
    ),
    ("model.experts", dict(model__experts=-1), "got -1", "at least 0"),
    (
        "model.experts_per_token",
        dict(model__experts=4, model__experts_per_token=5),
        "got 5",
        "model.experts (4)",
    ),
    (
        "model.renormalize_experts",
        dict(model__experts=4, model__experts_per_token=1),
        "got true",
        "set it to false",
    ),
    (
        "model.load_balancing_coefficient",
        dict(model__experts=4, model__load_balancing_coefficient=-0.1),
        "got -0.1",
        "at least 0",
    ),
    ("parallel.expert", dict(parallel__expert=0), "got 0", "at least 1"),
    (
        "parallel.expert",
        dict(parallel__expert=2, world_size=2),
        "without experts",
        "set model.experts",
    ),
    (
        "parallel.expert",
        dict(model__experts=6, parallel__expert=4, world_size=4),
        "got 4",
        "divide model.experts (6)",
    ),
    (
        "parallel.expert",
        dict(model__experts=4, parallel__expert=4, world_size=2),
        "2 processes",
        "lower parallel.expert",
    ),
    (
        "parallel.expert_tensor",
        dict(parallel__expert_tensor=-1),
        "got -1",
        "at least 0",
    ),
    (
        "parallel.expert_tensor",
        dict(
            model__experts=4,
            model__ffn_hidden_size=706,
            parallel__tensor=4,
            parallel__sequence=True,
            world_size=4,
        ),
        "got 4",
        "model.ffn_hidden_size (706)",
    ),
    (
        "parallel.expert_tensor",
        dict(
            model__experts=4,
            parallel__tensor=2,
            parallel__sequence=True,
            parallel__expert_tensor=1,
            world_size=2,
        ),
        "expert 1",
        "set parallel.expert above 1",
    ),
    (
        "parallel.sequence",
        dict(model__experts=4, parallel__tensor=2, world_size=2),
        "got false",
        "set it to true",
    ),
    ("parallel.pipeline", dict(parallel__pipeline=0), "got 0", "at least 1"),
    (
        "parallel.tensor",
        dict(parallel__tensor=8, world_size=8),
        "got 8",
        "divide model.attention_heads (4)",
    ),
    (
        "parallel.tensor",
        dict(parallel__tensor=4, model__query_groups=2, world_size=4),
        "got 4",
        "model.query_groups (2)",
    ),
    (
        "parallel.tensor",
        dict(parallel__tensor=4, model__ffn_hidden_size=706, world_size=4),
        "got 4",
        "model.ffn_hidden_size (706)",
    ),
    ("parallel:", dict(parallel__pipeline=2, world_size=3), "3 processes", "a multiple of 2"),
    (
        "model.layers",
        dict(model__layers=5, parallel__pipeline=2, world_size=2),
        "got 5",
        "2 stages must divide it",
    ),
    (
        "model.layers",
        dict(parallel__virtual_pipeline=3, parallel__pipeline=2, world_size=2),
        "got 4",
        "6 stages must divide it",
    ),
    (
        "parallel.virtual_pipeline",
        dict(parallel__virtual_pipeline=2),
        "got 2",
        "set parallel.pipeline above 1",
    ),
    (
        "parallel.sequence",
        dict(parallel__sequence=True),
        "got true with tensor 1",
        "set parallel.tensor above 1",
    ),
    (
        "data.sequence_length",
        dict(data__sequence_length=250, parallel__context=2, world_size=2),
        "got 250",
        "multiple of 4",
    ),
    (
        "data.sequence_length",
        dict(data__sequence_length=255, parallel__tensor=2, parallel__sequence=True, world_size=2),
        "got 255",
        "multiple of 2",
    ),
    (
        "parallel.overlap_param_gather",
        dict(parallel__overlap_param_gather=True),
        "got true",
        "needs distributed_optimizer",
    ),
    ("device.fp8", dict(device__fp8="hybrid"), "precision fp32", "set device.precision to bf16"),
    (
        "device.fp8",
        dict(device__fp8="hybrid", device__precision="bf16", device__layers="torch"),
        "layers torch",
        "set device.layers to auto",
    ),
    (
        "device.fp8",
        dict(device__fp8="e4m3", device__precision="bf16", data__document_policy="isolated"),
        "isolated",
        "choose one",
    ),
    (
        "device.fp8",
        dict(device__fp8="hybrid", device__precision="bf16", model__ffn_hidden_size=700),
        "is 700",
        "multiples of 16",
    ),
    (
        "device.fp8",
        dict(device__fp8="hybrid", device__precision="bf16", model__experts=4),
        "model.experts 4",
        "set it to none",
    ),
]


@pytest.mark.parametrize(
    ("field", "changes", "got", "remedy"),
    RULES,
    ids=[f"{number}_{rule[0]}" for number, rule in enumerate(RULES)],
)
def test_rule(field, changes, got, remedy, breaks_a_rule):
    breaks_a_rule(field, changes, got, remedy)
