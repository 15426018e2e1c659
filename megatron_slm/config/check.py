"""Rules between fields, as sentences: what was got, what is expected, what to change.

Pure; opens no file, starts nothing.
"""

import math

from megatron_slm.config.load import ConfigError
from megatron_slm.config.ranges import out_of_range
from megatron_slm.config.schema import Config, ModelConfig


def check_config(config: Config, world_size: int, *, training: bool = True) -> None:
    """Raise ConfigError listing every number out of range and every broken rule between settings.

    `world_size` is the number of processes of the job.
    """
    found = dict(out_of_range(config))
    wrong_sections = {name.split(".")[0] for name in found}
    problems = list(found.values())
    for rule, sections in _rules(training):
        # A rule divides by sizes: it is asked only where the numbers of its sections are in range.
        if not wrong_sections & set(sections):
            problems += rule(config, world_size)
    if problems:
        raise ConfigError(problems)


def _rules(training: bool):
    """The rules between settings, each with the sections whose numbers it reads."""
    yield _model, ("model", "parallel")
    yield _parallel, ("model", "parallel", "data")
    yield _head_engine, ("model",)
    yield _fp8, ("model", "parallel", "data")
    if training:
        yield _data, ()
        yield _batch, ("data", "parallel")
        yield _selection, ()
        yield _schedule, ()
        yield _optimizer, ("optimizer",)
        yield _checkpoint, ()


def data_parallel_size(config: Config, world_size: int) -> int:
    """Processes left for data parallelism: world size / (tensor * pipeline * context)."""
    return world_size // (
        config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    )


def padded_vocabulary_size(config: Config, vocabulary_size: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of the configured number and
    of the tensor size.

    Kept equal over tensor sizes whenever the tensor size divides the configured multiple, so that
    weights of one seed and checkpoints agree between layouts.
    """
    multiple = math.lcm(config.model.pad_vocabulary_to_multiple_of, config.parallel.tensor)
    return -(-vocabulary_size // multiple) * multiple


def train_steps(config: Config) -> int:
    """Optimizer steps of the run, from train_steps or from train_tokens rounded up to whole steps."""
    return config.schedule.train_steps or -(
        -config.schedule.train_tokens // tokens_per_step(config)
    )


def tokens_per_step(config: Config) -> int:
    """Processed tokens of one optimizer step."""
    return config.data.global_batch_size * config.data.sequence_length


def _model(config: Config, world_size: int):
    model, parallel = config.model, config.parallel
    if not model.head_size and model.hidden_size % model.attention_heads:
        yield (
            f"model.hidden_size: got {model.hidden_size}, which {model.attention_heads} attention "
            "heads do not divide; change model.attention_heads, or set model.head_size"
        )
    if (model.head_size or model.hidden_size // model.attention_heads) % 2:
        yield (
            "model.head_size: got "
            f"{model.head_size or model.hidden_size // model.attention_heads}; rotary embeddings "
            "need an even head size"
        )
    groups = model.query_groups or model.attention_heads
    if model.attention_heads % groups:
        yield (
            f"model.query_groups: got {groups}; it must divide model.attention_heads "
            f"({model.attention_heads})"
        )
    split_by_tensor = {"attention_heads": model.attention_heads, "query_groups": groups}
    if not model.experts:
        split_by_tensor["ffn_hidden_size"] = model.ffn_hidden_size
    for name, size in split_by_tensor.items():
        if size % parallel.tensor:
            yield f"parallel.tensor: got {parallel.tensor}; it must divide model.{name} ({size})"
    yield from _rope(model)
    yield from _experts(model)


def _rope(model: ModelConfig):
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    if model.rope_scaling == "llama3" and low >= high:
        yield (
            f"model.rope_low_frequency_factor: got {low}; expected below "
            f"model.rope_high_frequency_factor ({high})"
        )


def _experts(model: ModelConfig):
    if not model.experts:
        return
    if model.experts_per_token > model.experts:
        yield (
            f"model.experts_per_token: got {model.experts_per_token}; expected 1 up to "
            f"model.experts ({model.experts})"
        )
    if model.experts_per_token == 1 and model.renormalize_experts:
        yield (
            "model.renormalize_experts: got true with experts_per_token 1; the one expert's "
            "weight would always be 1 and the router would learn nothing: set it to false"
        )


def _expert_parallel(config: Config, world_size: int):
    parallel, model = config.parallel, config.model
    inside = parallel.expert_tensor or parallel.tensor
    if not model.experts:
        if parallel.expert > 1 or parallel.expert_tensor:
            yield (
                f"parallel.expert: got expert {parallel.expert}, expert_tensor "
                f"{parallel.expert_tensor} for a model without experts; set model.experts, or "
                "expert to 1 and expert_tensor to 0"
            )
        return
    if model.experts % parallel.expert:
        yield (
            f"parallel.expert: got {parallel.expert}; it must divide model.experts "
            f"({model.experts})"
        )
    if model.ffn_hidden_size % inside:
        yield (
            f"parallel.expert_tensor: got {inside}; it must divide model.ffn_hidden_size "
            f"({model.ffn_hidden_size})"
        )
    if parallel.expert == 1 and inside != parallel.tensor:
        # megatron-core reduces expert gradients apart only when expert > 1; here they would miss
        # the tensor ranks' tokens, in silence.
        yield (
            f"parallel.expert_tensor: got {inside} with tensor {parallel.tensor} and expert 1; "
            "set parallel.expert above 1, or expert_tensor to 0"
        )
    if world_size % (inside * parallel.expert * parallel.pipeline):
        yield (
            f"parallel.expert: expert_tensor {inside} x expert {parallel.expert} x pipeline "
            f"{parallel.pipeline} = {inside * parallel.expert * parallel.pipeline} processes hold "
            f"one copy of the experts, and {world_size} processes are not a multiple of that; "
            "lower parallel.expert, or start more processes"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"parallel.sequence: got false with tensor {parallel.tensor} and experts; every "
            "tensor rank would send the same tokens to the experts: set it to true"
        )


def _parallel(config: Config, world_size: int):
    parallel, model = config.parallel, config.model
    yield from _expert_parallel(config, world_size)
    model_parallel_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_parallel_size:
        yield (
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {model_parallel_size} processes hold one copy of the model, "
            f"and {world_size} processes are not a multiple of that; start a multiple of "
            f"{model_parallel_size}, or change the layout"
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if model.layers % stages:
        yield (
            f"model.layers: got {model.layers}; pipeline {parallel.pipeline} x virtual_pipeline "
            f"{parallel.virtual_pipeline} = {stages} stages must divide it"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline: got {parallel.virtual_pipeline} with pipeline 1; set "
            "parallel.pipeline above 1, or virtual_pipeline to 1"
        )
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence: got true with tensor 1; sequence parallelism splits over the "
            "tensor group: set parallel.tensor above 1, or sequence to false"
        )
    pieces = parallel.tensor if parallel.sequence else 1
    pieces *= 2 * parallel.context if parallel.context > 1 else 1
    if config.data.sequence_length % pieces:
        yield (
            f"data.sequence_length: got {config.data.sequence_length}; this layout cuts a "
            f"sequence into {pieces} equal pieces: use a multiple of {pieces}"
        )
    if parallel.overlap_param_gather and not (
        parallel.distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather: got true; it needs distributed_optimizer: true and "
            "overlap_grad_reduce: true"
        )


def _head_engine(config: Config, world_size: int):
    device, hidden_size = config.device, config.model.hidden_size
    if device.head_engine == "torch":
        return
    if device.kind == "cpu" or device.precision != "bf16":
        yield (
            f"device.head_engine: got liger with device.kind {device.kind} and precision "
            f"{device.precision}; its kernels need a Hopper GPU and bf16: change those, or use "
            "torch"
        )
    if hidden_size % 64:
        yield (
            f"model.hidden_size: got {hidden_size}; device.head_engine liger needs a multiple of "
            "64: change it, or use torch"
        )


def _fp8(config: Config, world_size: int):
    device, model, parallel = config.device, config.model, config.parallel
    if device.fp8 == "none":
        return
    if device.precision != "bf16":
        yield (
            f"device.fp8: got {device.fp8} with device.precision {device.precision}; fp8 products "
            "stand in a bf16 model: set device.precision to bf16"
        )
    if device.layers == "torch":
        yield (
            f"device.fp8: got {device.fp8} with device.layers torch; only Transformer Engine's "
            "layers have fp8 products: set device.layers to auto"
        )
    if config.model.experts:
        yield (
            f"device.fp8: got {device.fp8} with model.experts {config.model.experts}; fp8 "
            "products need multiples of 16 tokens, and experts get any number: set it to none"
        )
    if config.data.document_policy == "isolated":
        yield (
            f"device.fp8: got {device.fp8} with data.document_policy isolated, which needs the "
            "torch-native layers; fp8 needs Transformer Engine's: choose one"
        )
    tokens = (
        config.data.micro_batch_size
        * config.data.sequence_length
        // (parallel.context * (parallel.tensor if parallel.sequence else 1))
    )
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // parallel.tensor,
        "tokens of a micro-batch on one process": tokens,
    }
    for name, size in sizes.items():
        if size % 16:
            yield (
                f"device.fp8: got {device.fp8}; {name} is {size}, and fp8 products need multiples "
                "of 16"
            )


def _data(config: Config, world_size: int):
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
    if data.document_policy == "isolated" and config.device.layers == "transformer_engine":
        yield (
            "data.document_policy: got isolated with device.layers transformer_engine; its "
            "attention takes no mask of documents here: set device.layers to auto or torch"
        )
    names = [corpus.name for corpus in data.validation]
    if len(set(names)) != len(names):
        yield f"data.validation: names {names} repeat; each corpus is reported under its own name"
    for i, corpus in enumerate(data.validation):
        if not corpus.corpus:
            yield f"data.validation[{i}].corpus: empty; give a corpus prefix"


def _batch(config: Config, world_size: int):
    data, parallel = config.data, config.parallel
    if world_size % (parallel.tensor * parallel.pipeline * parallel.context):
        return  # _parallel says so; there is no whole number of data-parallel ranks
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


def _selection(config: Config, world_size: int):
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


def _schedule(config: Config, world_size: int):
    schedule = config.schedule
    if (schedule.train_steps > 0) == (schedule.train_tokens > 0):
        yield (
            f"schedule: got train_steps {schedule.train_steps} and train_tokens "
            f"{schedule.train_tokens}; give exactly one of them, above 0"
        )


def _optimizer(config: Config, world_size: int):
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


def _checkpoint(config: Config, world_size: int):
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
