"""Rules between settings that only training checks."""

from collections.abc import Iterator

from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import data_parallel_size, model_parallel_size


def data_problems(config: Config, world_size: int) -> Iterator[str]:
    data = config.data
    if not data.train:
        yield (
            "data.train: empty; give at least one corpus prefix (python -m data_tools.preprocess "
            "makes one)"
        )
    if not data.tokenizer:
        yield (
            "data.tokenizer: empty; give the SentencePiece .model or tokenizer.json the corpora "
            "were made with"
        )
    if data.weights and len(data.weights) != len(data.train):
        yield (
            f"data.weights: got {len(data.weights)} for {len(data.train)} corpora; give one per "
            "corpus, or none"
        )
    names = [corpus.name for corpus in data.validation]
    if len(set(names)) != len(names):
        yield f"data.validation: names {names} repeat; each corpus is reported under its own name"
    for i, corpus in enumerate(data.validation):
        if not corpus.corpus:
            yield f"data.validation[{i}].corpus: empty; give a corpus prefix"


def batch_problems(config: Config, world_size: int) -> Iterator[str]:
    data, parallel = config.data, config.parallel
    if world_size % model_parallel_size(config):
        return  # parallel_problems reports it: the number of data-parallel ranks is not whole
    replicas = data_parallel_size(config, world_size)
    per_pass = data.micro_batch_size * replicas
    if data.global_batch_size % per_pass:
        yield (
            f"data.global_batch_size: got {data.global_batch_size}; {replicas} data-parallel "
            f"ranks x micro_batch_size {data.micro_batch_size} = {per_pass} sequences per pass "
            "must divide it"
        )
    elif parallel.virtual_pipeline > 1 and (data.global_batch_size // per_pass) % parallel.pipeline:
        yield (
            f"data.global_batch_size: got {data.global_batch_size}, which is "
            f"{data.global_batch_size // per_pass} micro-batches per step; the interleaved "
            f"schedule needs a multiple of parallel.pipeline ({parallel.pipeline})"
        )


def selection_problems(config: Config, world_size: int) -> Iterator[str]:
    selection, reference = config.selection, config.selection.reference
    if reference.scores and reference.checkpoint:
        yield (
            "selection.reference: both scores and checkpoint are given; stored scores and an "
            "online reference exclude each other: remove one"
        )
    if reference.scores and len(reference.scores) != len(config.data.train):
        yield (
            f"selection.reference.scores: got {len(reference.scores)} score folders for "
            f"{len(config.data.train)} corpora; give one per corpus, in the same order"
        )
    if config.device.head_engine != "torch" and (
        selection.head_rows == "selected"
        or (selection.head_rows == "auto" and selection.scope == "global_batch")
    ):
        yield (
            f"selection.head_rows: got {selection.head_rows} with scope {selection.scope} and "
            f"device.head_engine {config.device.head_engine}, which has no head on selected rows; "
            "set head_rows to all, or head_engine to torch"
        )
    if selection.backward_rows != "all" and config.device.layers == "transformer_engine":
        yield (
            f"selection.backward_rows: got {selection.backward_rows} with device.layers "
            "transformer_engine, whose products cannot leave rows out; set device.layers to "
            "torch, or backward_rows to all"
        )
    if selection.backward_rows == "every_layer_approximate" and config.model.recompute == "full":
        yield (
            "selection.backward_rows: got every_layer_approximate with model.recompute full, "
            "which runs layers again inside backward, where dropped rows cannot be told; set "
            "model.recompute to selective or none, or backward_rows to last_layer"
        )
    if config.model.dropout and selection.scorer not in ("none", "random"):
        yield (
            f"model.dropout: got {config.model.dropout} with scorer {selection.scorer}; dropout "
            "noise raises the current loss and biases the choice: set it to 0"
        )


def schedule_problems(config: Config, world_size: int) -> Iterator[str]:
    schedule = config.schedule
    if (schedule.train_steps > 0) == (schedule.train_tokens > 0):
        yield (
            f"schedule: got train_steps {schedule.train_steps} and train_tokens "
            f"{schedule.train_tokens}; give exactly one of them, above 0"
        )


def optimizer_problems(config: Config, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate: got {optimizer.min_learning_rate}; "
            f"expected at most learning_rate ({optimizer.learning_rate})"
        )
    if optimizer.min_loss_scale > optimizer.initial_loss_scale:
        yield (
            f"optimizer.min_loss_scale: got {optimizer.min_loss_scale} with initial_loss_scale "
            f"{optimizer.initial_loss_scale}; expected at most the initial one"
        )


def checkpoint_problems(config: Config, world_size: int) -> Iterator[str]:
    checkpoint, names = config.checkpoint, [corpus.name for corpus in config.data.validation]
    if checkpoint.keep_best and not names:
        yield (
            f"checkpoint.keep_best: got {checkpoint.keep_best} without a validation corpus; give "
            "one in data.validation, or set it to 0"
        )
    if checkpoint.best_validation and checkpoint.best_validation not in names:
        yield (
            f"checkpoint.best_validation: got {checkpoint.best_validation}; expected one of "
            f"data.validation ({', '.join(names) or 'empty'})"
        )
    if checkpoint.best_validation and not checkpoint.keep_best:
        yield (
            f"checkpoint.best_validation: got {checkpoint.best_validation} with keep_best 0, "
            "which keeps none for it; set checkpoint.keep_best, or leave it empty"
        )
