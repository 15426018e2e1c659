"""Every rule about data, selection, schedule, optimizer and checkpoints has a breaking value.

The message names the field, the value and what to do.
"""

import pytest

from megatron_slm.config.schema import CorpusConfig

RULES = [
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
    ("schedule:", dict(schedule__train_steps=0), "train_steps 0 and train_tokens 0", "exactly one"),
    (
        "schedule:",
        dict(schedule__train_tokens=100),
        "train_steps 10 and train_tokens 100",
        "exactly one",
    ),
    ("schedule.warmup_fraction", dict(schedule__warmup_fraction=2.0), "got 2.0", "at most 1"),
    ("schedule.decay_fraction", dict(schedule__decay_fraction=-0.1), "got -0.1", "at least 0"),
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
    (
        "data.document_policy",
        dict(data__document_policy="isolated", device__layers="transformer_engine"),
        "got isolated",
        "set device.layers to auto or torch",
    ),
]


@pytest.mark.parametrize(
    ("field", "changes", "got", "remedy"),
    RULES,
    ids=[f"{number}_{rule[0]}" for number, rule in enumerate(RULES)],
)
def test_rule(field, changes, got, remedy, breaks_a_rule):
    breaks_a_rule(field, changes, got, remedy)
