"""Every rule has a value that breaks it; the message names the field, the value and what to do."""

import pytest

from megatron_slm.config.check import check_config, data_parallel_size, tokens_per_step, train_steps
from megatron_slm.config.load import ConfigError, from_mapping, to_mapping
from megatron_slm.config.schema import Config, CorpusConfig


def good() -> Config:
    config = Config()
    config.data.tokenizer, config.data.train, config.schedule.train_steps = "t.model", ["c"], 10
    return config


def broken(world_size: int = 1, **changes) -> list[str]:
    """Problems of a good configuration after `section__field=value` changes."""
    config = good()
    for name, value in changes.items():
        *path, last = name.split("__")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    with pytest.raises(ConfigError) as caught:
        check_config(config, world_size)
    return caught.value.problems


def test_a_good_configuration_passes():
    check_config(good(), 1)
    config = good()
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence = 2, 2, True
    check_config(config, 8)


def test_programs_that_do_not_train_need_no_data():
    check_config(Config(), 1, training=False)
    with pytest.raises(ConfigError):
        check_config(Config(), 1)


RULES = [
    # model
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
    (
        "selection.head_rows",
        dict(selection__head_rows="selected", device__head_engine="liger"),
        "got selected",
        "head_engine to torch",
    ),
    (
        "selection.head_rows",
        dict(selection__scope="global_batch", device__head_engine="liger"),
        "scope global_batch",
        "set head_rows to all",
    ),
    (
        "selection.backward_rows",
        dict(selection__backward_rows="last_layer", device__layers="transformer_engine"),
        "got last_layer",
        "set device.layers to torch",
    ),
    (
        "selection.backward_rows",
        dict(selection__backward_rows="every_layer_approximate", model__recompute="full"),
        "recompute full",
        "backward_rows to last_layer",
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
    # parallel
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
    # data
    ("data.train", dict(data__train=[]), "empty", "data_tools.preprocess"),
    ("data.tokenizer", dict(data__tokenizer=""), "empty", "give the SentencePiece"),
    ("data.weights", dict(data__weights=[1.0, 2.0]), "got 2 for 1 corpora", "one per corpus"),
    ("data.weights", dict(data__weights=[0.0]), "[0]: got 0.0", "remove it from data.train"),
    (
        "data.validation",
        dict(data__validation=[CorpusConfig("a", "c"), CorpusConfig("a", "d")]),
        "['a', 'a']",
        "own name",
    ),
    (
        "data.validation[0].corpus",
        dict(data__validation=[CorpusConfig("a", "")]),
        "empty",
        "give a corpus prefix",
    ),
    ("data.micro_batch_size", dict(data__micro_batch_size=0), "got 0", "at least 1"),
    ("data.global_batch_size", dict(data__global_batch_size=6), "got 6", "must divide it"),
    (
        "data.global_batch_size",
        dict(data__global_batch_size=8, data__micro_batch_size=3),
        "got 8",
        "must divide it",
    ),
    (
        "data.global_batch_size",
        dict(
            data__global_batch_size=12,
            parallel__pipeline=2,
            parallel__virtual_pipeline=2,
            world_size=2,
        ),
        "3 micro-batches",
        "multiple of parallel.pipeline",
    ),
    # selection
    ("selection.keep_fraction", dict(selection__keep_fraction=60.0), "got 60.0", "0.6 keeps 60 %"),
    ("selection.keep_fraction", dict(selection__keep_fraction=0.0), "got 0.0", "above 0"),
    ("selection.clm_weight", dict(selection__clm_weight=1.5), "got 1.5", "at most 1"),
    (
        "selection.reference",
        dict(selection__reference__scores=["s"], selection__reference__checkpoint="r"),
        "both",
        "remove one",
    ),
    (
        "selection.reference.scores",
        dict(selection__reference__scores=["s", "t"]),
        "got 2 score folders for 1 corpora",
        "one per corpus",
    ),
    (
        "model.dropout",
        dict(model__dropout=0.1, selection__scorer="own_loss"),
        "got 0.1",
        "set it to 0",
    ),
    # schedule
    ("schedule:", dict(schedule__train_steps=0), "train_steps 0 and train_tokens 0", "exactly one"),
    (
        "schedule:",
        dict(schedule__train_tokens=100),
        "train_steps 10 and train_tokens 100",
        "exactly one",
    ),
    ("schedule.warmup_fraction", dict(schedule__warmup_fraction=2.0), "got 2.0", "at most 1"),
    ("schedule.decay_fraction", dict(schedule__decay_fraction=-0.1), "got -0.1", "at least 0"),
    # numbers
    (
        "optimizer.learning_rate",
        dict(optimizer__learning_rate=0.0, optimizer__min_learning_rate=0.0),
        "got 0.0",
        "above 0",
    ),
    (
        "optimizer.min_learning_rate",
        dict(optimizer__min_learning_rate=1.0),
        "got 1.0",
        "learning_rate (0.0003)",
    ),
    ("optimizer.beta1", dict(optimizer__beta1=1.0), "got 1.0", "below 1"),
    ("optimizer.beta2", dict(optimizer__beta2=-0.5), "got -0.5", "at least 0"),
    ("optimizer.clip_grad_norm", dict(optimizer__clip_grad_norm=-1.0), "got -1.0", "at least 0"),
    ("optimizer.weight_decay", dict(optimizer__weight_decay=-1.0), "got -1.0", "at least 0"),
    ("checkpoint.interval_steps", dict(checkpoint__interval_steps=-1), "got -1", "at least 0"),
    ("checkpoint.keep_last", dict(checkpoint__keep_last=-1), "got -1", "at least 0"),
    (
        "monitoring.validation_batches",
        dict(monitoring__validation_batches=-1),
        "got -1",
        "at least 0",
    ),
    (
        "monitoring.log_interval_steps",
        dict(monitoring__log_interval_steps=0),
        "got 0",
        "at least 1",
    ),
    (
        "optimizer.min_loss_scale",
        dict(optimizer__min_loss_scale=8192.0),
        "got 8192.0",
        "at most the initial one",
    ),
    ("optimizer.min_loss_scale", dict(optimizer__min_loss_scale=0.0), "got 0.0", "above 0"),
    (
        "optimizer.loss_scale_window_steps",
        dict(optimizer__loss_scale_window_steps=0),
        "got 0",
        "at least 1",
    ),
    (
        "optimizer.loss_scale_hysteresis_steps",
        dict(optimizer__loss_scale_hysteresis_steps=0),
        "got 0",
        "at least 1",
    ),
    # documents, fp8
    (
        "data.document_policy",
        dict(data__document_policy="isolated", device__layers="transformer_engine"),
        "got isolated",
        "set device.layers to auto or torch",
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
    "field, changes, got, remedy",
    RULES,
    ids=[f"{number}_{rule[0]}" for number, rule in enumerate(RULES)],
)
def test_rule(field, changes, got, remedy):
    problems = broken(**changes)
    assert any(
        problem.startswith(field) and got in problem and remedy in problem for problem in problems
    ), problems


def test_all_rules_speak_at_once():
    problems = broken(
        model__attention_heads=3,
        optimizer__beta1=2.0,
        data__train=[],
        schedule__train_steps=0,
        monitoring__log_interval_steps=0,
    )
    assert {problem.split(":")[0] for problem in problems} >= {
        "model.hidden_size",
        "optimizer.beta1",
        "data.train",
        "schedule",
        "monitoring.log_interval_steps",
    }


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers",
        "model.attention_heads",
        "model.hidden_size",
        "model.ffn_hidden_size",
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.context",
        "parallel.virtual_pipeline",
        "data.sequence_length",
        "data.micro_batch_size",
        "data.global_batch_size",
    ],
)
def test_sizes_below_one_are_problems_and_never_crash_the_check(name, value):
    """A zero must be reported, not divided by."""
    section, field = name.split(".")
    config, problems = from_mapping(
        {**to_mapping(good()), section: {**to_mapping(good())[section], field: value}}
    )
    assert not problems
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        check_config(config, 1)


def test_sizes_that_follow_from_the_configuration():
    config = good()
    (
        config.parallel.tensor,
        config.parallel.pipeline,
        config.data.global_batch_size,
        config.data.sequence_length,
    ) = 2, 2, 16, 100
    assert data_parallel_size(config, 16) == 4
    assert tokens_per_step(config) == 1600 and train_steps(config) == 10
    config.schedule.train_steps, config.schedule.train_tokens = 0, 1601
    assert train_steps(config) == 2  # rounded up to whole steps
