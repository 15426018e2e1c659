"""Everything we rely on in megatron-core, in one place: an upgrade that moves or renames something fails here, by name.

Imports, attributes of its modules and direct calls are collected from our source; methods called on its objects, methods
of ours that it calls, and its private attributes cannot be seen that way and stand in tables.
"""

import ast
import importlib
import importlib.metadata
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_slm"


def imports_of(path: Path) -> dict[str, tuple[str, str]]:
    """Local name -> (module, symbol) of everything a file takes from megatron ("" = the module itself)."""
    names = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.asname: (alias.name, "")
                for alias in node.names
                if alias.name.split(".")[0] == "megatron" and alias.asname
            }
    return names


IMPORTS = {path: names for path in sorted(PACKAGE.rglob("*.py")) if (names := imports_of(path))}
SYMBOLS = sorted({target for names in IMPORTS.values() for target in names.values()})


def resolve(module: str, symbol: str = ""):
    found = importlib.import_module(module)
    for part in symbol.split(".") if symbol else ():
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(f"{found.__name__}.{part}")
    return found


def core(dotted: str):
    """The object named by "module:attribute" below megatron.core."""
    module, _, symbol = dotted.partition(":")
    return resolve(f"megatron.core.{module}", symbol)


def parent_symbol(path: Path, expression: ast.expr) -> tuple[object, str] | None:
    """The megatron object an expression such as `parallel_state.is_initialized` or `GPTModel` names, with its text."""
    text = ast.unparse(expression)
    if not re.fullmatch(r"[\w.]+", text) or text.split(".")[0] not in IMPORTS[path]:
        return None
    first, *rest = text.split(".")
    found = resolve(*IMPORTS[path][first])
    for part in rest:
        found = getattr(found, part)
    return found, text


def subclasses(path: Path) -> dict[str, object]:
    """Classes of a file that inherit megatron's constructor: calling them is calling megatron."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ClassDef)
            and node.bases
            and not any(
                isinstance(part, ast.FunctionDef) and part.name == "__init__" for part in node.body
            )
        ):
            base = parent_symbol(path, node.bases[0])
            if base:
                found[node.name] = base[0]
    return found


def calls() -> list[tuple[str, object, ast.Call]]:
    """Every direct call of a megatron function or class in our source."""
    found = []
    for path in IMPORTS:
        ours = subclasses(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                called = (ours[text], text) if text in ours else parent_symbol(path, node.func)
                if called:
                    found.append(
                        (f"{path.relative_to(PACKAGE)}:{node.lineno} {called[1]}", called[0], node)
                    )
    return found


def accepts(
    function,
    positional: int,
    keywords: tuple[str, ...] = (),
    *,
    partly: bool = False,
    missing_self: bool = False,
) -> str:
    """ "" when `function` can be called so, else what it says. `partly`: more arguments follow that cannot be seen."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a compiled function has none
        return ""
    bind = signature.bind_partial if partly else signature.bind
    try:
        bind(*[None] * (positional + missing_self), **dict.fromkeys(keywords))
    except TypeError as error:
        return f"{error}; it is {function.__qualname__}{signature}"
    return ""


def test_the_version_is_the_pinned_one():
    pinned = re.search(
        r"^megatron-core==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )[1]
    assert importlib.metadata.version("megatron-core") == pinned == "0.16.1", (
        "read docs and this file again before moving to another megatron-core"
    )


@pytest.mark.parametrize(
    "module, symbol", SYMBOLS, ids=[f"{module}:{symbol}" for module, symbol in SYMBOLS]
)
def test_imported_symbol_exists(module, symbol):
    assert resolve(module, symbol) is not None


def test_attributes_of_its_modules_and_enums_exist():
    missing = []
    for path, names in IMPORTS.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in names
            ):
                holder = resolve(*names[node.value.id])
                if isinstance(holder, (ModuleType, type)) and not hasattr(holder, node.attr):
                    missing.append(
                        f"{path.relative_to(PACKAGE)}:{node.lineno}: {names[node.value.id]} has no {node.attr}"
                    )
    assert not missing


def test_direct_calls_fit_the_signatures():
    seen, wrong = 0, []
    for where, function, node in calls():
        starred = any(isinstance(argument, ast.Starred) for argument in node.args) or any(
            keyword.arg is None for keyword in node.keywords
        )
        positional = sum(not isinstance(argument, ast.Starred) for argument in node.args)
        problem = accepts(
            function,
            positional,
            tuple(keyword.arg for keyword in node.keywords if keyword.arg),
            partly=starred,
        )
        seen += 1
        wrong += [f"{where}: {problem}"] if problem else []
    assert seen > 30, "the collection of calls found next to nothing: it is broken itself"
    assert not wrong, "\n".join(wrong)


# (class or function below megatron.core, method, positional arguments, keywords): called on objects that megatron-core gave us.
METHODS = [
    ("distributed:DistributedDataParallel", "scale_gradients", 1, ()),
    ("distributed:DistributedDataParallel", "zero_grad_buffer", 0, ()),
    ("distributed:DistributedDataParallel", "start_param_sync", 0, ("force_sync",)),
    ("models.gpt:GPTModel", "sharded_state_dict", 0, ()),
    ("models.gpt:GPTModel", "forward", 3, ("labels", "loss_mask")),
    ("models.gpt:GPTModel", "shared_embedding_or_output_weight", 0, ()),
    ("optimizer.distrib_optimizer:DistributedOptimizer", "step", 0, ()),
    ("optimizer.distrib_optimizer:DistributedOptimizer", "zero_grad", 0, ()),
    ("optimizer.distrib_optimizer:DistributedOptimizer", "reload_model_params", 0, ()),
    ("optimizer.optimizer:Float16OptimizerWithFloat16Params", "step", 0, ()),
    ("optimizer.optimizer:FP32Optimizer", "step", 0, ()),
    ("optimizer.optimizer:ChainedOptimizer", "step", 0, ()),
    ("optimizer.optimizer:ChainedOptimizer", "scale_loss", 1, ()),
    ("optimizer.grad_scaler:DynamicGradScaler", "state_dict", 0, ()),
    ("optimizer.grad_scaler:DynamicGradScaler", "load_state_dict", 1, ()),
    ("optimizer.optimizer:ChainedOptimizer", "reload_model_params", 0, ()),
    (
        "dist_checkpointing.strategies.fully_parallel:FullyParallelSaveStrategyWrapper",
        "async_save",
        2,
        (),
    ),
    ("dist_checkpointing.strategies.common:TorchCommonSaveStrategy", "save_common", 2, ()),
    (
        "dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync",
        "preload_tensors",
        1,
        (),
    ),
    ("dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync", "finish", 2, ()),
    ("tensor_parallel.random:CudaRNGStatesTracker", "get_states", 0, ()),
    ("tensor_parallel.random:CudaRNGStatesTracker", "set_states", 1, ()),
]


@pytest.mark.parametrize(
    "owner, method, positional, keywords",
    METHODS,
    ids=[f"{row[0].split(':')[1]}.{row[1]}" for row in METHODS],
)
def test_methods_we_call(owner, method, positional, keywords):
    assert not accepts(getattr(core(owner), method), positional, keywords, missing_self=True)


SCHEDULE_ARGUMENTS = (
    "forward_step_func",
    "data_iterator",
    "model",
    "num_microbatches",
    "seq_length",
    "micro_batch_size",
    "forward_only",
    "collect_non_loss_data",
)


@pytest.mark.parametrize(
    "schedule",
    [
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ],
)
def test_schedules_take_what_we_pass(schedule):
    """get_forward_backward_func returns one of these three."""
    assert not accepts(core(f"pipeline_parallel.schedules:{schedule}"), 0, SCHEDULE_ARGUMENTS)


def calls_in(function, called: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == called
    ]


def fits(ours, node: ast.Call, *, missing_self: bool = False) -> str:
    return accepts(
        ours,
        len(node.args),
        tuple(keyword.arg for keyword in node.keywords if keyword.arg),
        missing_self=missing_self,
        partly=any(keyword.arg is None for keyword in node.keywords),
    )


def our_function(path: str, *names: str):
    """A function of ours, also one inside another, as a lambda with its parameters."""
    node = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for name in names:
        node = next(
            part
            for part in ast.walk(node)
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and part.name == name
        )
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return eval(f"lambda {ast.unparse(node.args)}: None")


# (function of megatron-core, the call in its source, our function it reaches, whether ours is a method)
CALLBACKS = [
    (
        "tensor_parallel.layers:ColumnParallelLinear.forward",
        "self._forward_impl",
        ("ops/row_skipping.py", "linear_skipping_zero_rows"),
        False,
    ),
    (
        "tensor_parallel.layers:RowParallelLinear.forward",
        "self._forward_impl",
        ("ops/row_skipping.py", "linear_skipping_zero_rows"),
        False,
    ),
    (
        "models.gpt:GPTModel.forward",
        "self._postprocess",
        ("model/build.py", "Decoder", "_postprocess"),
        True,
    ),
    (
        "transformer.attention:Attention.__init__",
        "submodules.core_attention",
        ("model/layers.py", "CausalAttention", "__init__"),
        True,
    ),
    (
        "transformer.attention:Attention.forward",
        "apply_module(self.core_attention)",
        ("model/layers.py", "CausalAttention", "forward"),
        True,
    ),
    (
        "pipeline_parallel.schedules:forward_backward_no_pipelining",
        "config.finalize_model_grads_func",
        ("model/forward_backward.py", "finalize"),
        False,
    ),
    (
        "pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
        "config.finalize_model_grads_func",
        ("model/forward_backward.py", "finalize"),
        False,
    ),
    (
        "pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving",
        "config.finalize_model_grads_func",
        ("model/forward_backward.py", "finalize"),
        False,
    ),
    (
        "pipeline_parallel.schedules:forward_step",
        "forward_step_func",
        ("model/forward_backward.py", "step"),
        False,
    ),
    (
        "pipeline_parallel.schedules:forward_step_calc_loss",
        "loss_func",
        ("model/forward_backward.py", "loss"),
        False,
    ),
    (
        "datasets.gpt_dataset:GPTDataset.__init__",
        "self._build_document_sample_shuffle_indices",
        ("data/scored_dataset.py", "ScoredDataset", "_build_document_sample_shuffle_indices"),
        True,
    ),
    (
        "datasets.blended_dataset:BlendedDataset.__init__",
        "self._build_indices",
        ("data/scored_dataset.py", "BlendedScoredDataset", "_build_indices"),
        True,
    ),
    (
        "transformer.moe.moe_layer:MoELayer.__init__",
        "submodules.router",
        ("model/router.py", "Router", "__init__"),
        True,
    ),
    (
        "transformer.moe.router:TopKRouter.forward",
        "self.routing",
        ("model/router.py", "Router", "routing"),
        True,
    ),
    (
        "transformer.moe.router:TopKRouter.routing",
        "self.apply_z_loss",
        ("model/router.py", "Router", "apply_z_loss"),
        True,
    ),
    (
        "transformer.moe.router:TopKRouter.routing",
        "self._apply_expert_bias",
        ("model/router.py", "Router", "_apply_expert_bias"),
        True,
    ),
    (
        "transformer.moe.router:TopKRouter._apply_aux_loss",
        "self.attach_and_log_load_balancing_loss",
        ("model/router.py", "Router", "attach_and_log_load_balancing_loss"),
        True,
    ),
    (
        "transformer.moe.router:TopKRouter._apply_seq_aux_loss",
        "self.attach_and_log_load_balancing_loss",
        ("model/router.py", "Router", "attach_and_log_load_balancing_loss"),
        True,
    ),
    (
        "dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.async_save",
        "self._get_save_and_finalize_callbacks",
        ("checkpoint/writing.py", "_Planning", "_get_save_and_finalize_callbacks"),
        True,
    ),
    ("tensor_parallel.random:CudaRNGStatesTracker.fork", "_get_cuda_rng_state", None, False),
    ("tensor_parallel.random:CudaRNGStatesTracker.fork", "_set_cuda_rng_state", None, False),
]
# What cpu_standins.use_cpu() puts in their place; written as lambdas there.
RANDOM_STAND_INS = {
    "_get_cuda_rng_state": lambda device="cuda", clone=False, graph_safe=False: None,
    "_set_cuda_rng_state": lambda state, device=-1, graph_safe=False: None,
}


@pytest.mark.parametrize(
    "caller, called, ours, method",
    CALLBACKS,
    ids=[f"{row[0].split(':')[1]}_{row[1]}" for row in CALLBACKS],
)
def test_what_it_calls_of_ours(caller, called, ours, method):
    found = calls_in(core(caller), called)
    assert found, f"{caller} no longer calls {called}"
    if (
        called == "forward_step_func"
    ):  # a third argument comes only with partial activation checkpointing, which we never ask for
        found = [
            node for node in found if "checkpoint_activations_microbatch" not in ast.unparse(node)
        ]
    for node in found:
        assert not fits(
            our_function(*ours) if ours else RANDOM_STAND_INS[called], node, missing_self=method
        ), ast.unparse(node)


def test_norms_are_built_with_what_ours_takes():
    """TransformerLayer, SelfAttention and TransformerBlock build submodules through build_module(spec, **arguments)."""
    ours = our_function("model/layers.py", "RMSNorm", "__init__")
    for caller in (
        "transformer.transformer_layer:TransformerLayer.__init__",
        "transformer.attention:SelfAttention.__init__",
        "transformer.transformer_block:TransformerBlock._build_layers",
    ):
        norms = [
            node
            for node in calls_in(core(caller), "build_module")
            if "norm" in ast.unparse(node.args[0])
        ]
        assert norms, caller
        for node in norms:
            node.args = node.args[1:]
            assert not fits(ours, node, missing_self=True), ast.unparse(node)


@pytest.mark.parametrize("name", list(RANDOM_STAND_INS))
def test_random_state_stand_ins_have_the_signature_they_replace(name):
    theirs, ours = (
        inspect.signature(core(f"tensor_parallel.random:{name}")),
        inspect.signature(RANDOM_STAND_INS[name]),
    )
    assert [(p.kind, p.default) for p in theirs.parameters.values()] == [
        (p.kind, p.default) for p in ours.parameters.values()
    ]
    written = re.search(
        rf"megatron_random\.{name} = \(?\s*(lambda [^:]+):",
        (PACKAGE / "cpu_standins.py").read_text(),
    )[1]
    assert written == "lambda " + ", ".join(
        f"{p.name}" + (f"={p.default!r}".replace("'", '"') if p.default is not p.empty else "")
        for p in ours.parameters.values()
    )


# Attributes that megatron-core's constructors set and we read, some of them private.
ATTRIBUTES = [
    (
        "optimizer.distrib_optimizer:DistributedOptimizer",
        (
            "buffers",
            "model_param_gbuf_map",
            "gbuf_ranges",
            "model_param_group_index_map",
            "data_parallel_group",
            "optimizer",
            "is_stub_optimizer",
        ),
    ),
    (
        "optimizer.optimizer:Float16OptimizerWithFloat16Params",
        (
            "float16_groups",
            "fp32_from_float16_groups",
            "fp32_from_fp32_groups",
            "optimizer",
            "is_stub_optimizer",
        ),
    ),
    ("optimizer.optimizer:MixedPrecisionOptimizer", ("grad_scaler",)),
    ("optimizer.optimizer:FP32Optimizer", ("optimizer", "is_stub_optimizer")),
    ("optimizer.optimizer:ChainedOptimizer", ("chained_optimizers",)),
    ("distributed.param_and_grad_buffer:_ParamAndGradBuffer", ("param_index_map",)),
    ("transformer.moe.router:TopKRouter", ("config", "tp_cp_group", "layer_number")),
    ("models.gpt:GPTModel", ("rotary_pos_emb",)),
    (
        "transformer.attention:Attention",
        (
            "num_query_groups_per_partition",
            "num_attention_heads_per_partition",
            "hidden_size_per_attention_head",
        ),
    ),
    ("transformer.attention:SelfAttention", ("linear_qkv",)),
    ("distributed:DistributedDataParallel", ("ddp_config",)),
    ("models.common.embeddings.rotary_pos_embedding:RotaryEmbedding", ("inv_freq",)),
    (
        "models.gpt:GPTModel",
        (
            "post_process",
            "share_embeddings_and_output_weights",
            "output_layer",
            "pg_collection",
            "config",
        ),
    ),
    ("dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync", ("write_buckets",)),
    ("datasets.gpt_dataset:GPTDataset", ("dataset", "config")),
    (
        "datasets.indexed_dataset:_IndexReader",
        ("sequence_lengths", "sequence_pointers", "dtype_size"),
    ),
    ("datasets.blended_dataset:BlendedDataset", ("weights", "size")),
]


@pytest.mark.parametrize(
    "owner, names", ATTRIBUTES, ids=[row[0].split(":")[1] for row in ATTRIBUTES]
)
def test_attributes_we_read(owner, names):
    sources = "\n".join(
        inspect.getsource(part)
        for part in core(owner).__mro__
        if part.__module__.startswith("megatron")
    )
    missing = [
        name
        for name in names
        if not re.search(rf"self\.{name}\b[^=\n]*=[^=]", sources) and not hasattr(core(owner), name)
    ]
    assert not missing


def test_dataclasses_have_the_fields_we_read():
    import dataclasses

    expected = {
        "dist_checkpointing.mapping:ShardedTensor": {
            "key",
            "data",
            "local_shape",
            "global_shape",
            "global_offset",
            "prepend_axis_num",
        },
        "dist_checkpointing.mapping:ShardedTensorFactory": {"key", "data"},
        "transformer.transformer_block:TransformerBlockSubmodules": {"layer_specs", "layer_norm"},
        "transformer.transformer_layer:TransformerLayerSubmodules": {
            "input_layernorm",
            "pre_mlp_layernorm",
            "self_attention",
        },
        "transformer.moe.moe_layer:MoESubmodules": {"router"},
        "transformer.attention:SelfAttentionSubmodules": {
            "core_attention",
            "q_layernorm",
            "k_layernorm",
        },
    }
    for name, fields in expected.items():
        assert fields <= {field.name for field in dataclasses.fields(core(name))}, name


def test_the_loss_scale_enters_backward_where_we_hang_it():
    assert "output_tensor[0] = config.grad_scale_func(output_tensor[0])" in inspect.getsource(
        core("pipeline_parallel.schedules:backward_step")
    )
    saved = inspect.getsource(core("optimizer.grad_scaler:DynamicGradScaler.state_dict"))
    assert set(re.findall(r"state_dict\['(\w+)'\]", saved)) == {
        "scale",
        "growth_tracker",
        "hysteresis_tracker",
    }


def test_the_distributed_optimizer_maps_parameters_as_we_read_them():
    """(buffer, dtype, bucket) per parameter; per bucket a param_map whose "param" range is this rank's slice."""
    source = inspect.getsource(core("optimizer.distrib_optimizer:DistributedOptimizer"))
    assert "param_gbuf_map[param] = (gbuf_index, dtype, bucket_index)" in source
    assert "param_range_map[param] = {" in source and '"param": sub_param_range' in source
    assert "model_param_group_index_map" in source and "(group_index, len(" in source


def test_a_planned_save_hands_over_what_we_read():
    """The plan's results are (writer, metadata of the whole, ...); a bucket is (path, name, data); no queue of results is made when there is one."""
    assert "(storage_writer, global_metadata, dist_wrapper)," in inspect.getsource(
        core("dist_checkpointing.strategies.state_dict_saver:save_state_dict_async_plan")
    )
    assert "file_name, storage_key, (bytes_data, tensor_data) = write_bucket" in inspect.getsource(
        core(
            "dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data"
        )
    )
    assert "if _results_queue is None:" in inspect.getsource(
        core("dist_checkpointing.strategies.filesystem_async:_get_write_results_queue")
    )


def test_the_loss_divisor_may_be_an_integer_zero():
    """We divide gradients ourselves, so megatron-core gets num_tokens = 0 and must leave a sum alone under calculate_per_token_loss."""
    source = inspect.getsource(core("pipeline_parallel.schedules:forward_step_calc_loss"))
    assert "if not config.calculate_per_token_loss:" in source
    assert "finalize_model_grads( chunks, None," in " ".join(
        (PACKAGE / "model" / "forward_backward.py").read_text().split()
    )


def test_the_schedule_scales_auxiliary_losses_by_the_loss_scale_alone():
    """Under calculate_per_token_loss; everything else about their scale is ours (model/router.py)."""
    source = inspect.getsource(core("pipeline_parallel.schedules:forward_step_calc_loss"))
    assert (
        "if config.calculate_per_token_loss:\n            MoEAuxLossAutoScaler.set_loss_scale(loss_scale)"
        in source
    )
    assert "return grad_output, scaled_aux_loss_grad" in inspect.getsource(
        core("transformer.moe.moe_utils:MoEAuxLossAutoScaler")
    )


def test_the_token_dispatcher_takes_our_stand_ins():
    """cpu_standins.use_cpu(): split sizes become numpy by one function that the dispatcher knows by name, and streams are made in its constructor."""
    dispatcher = core("transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher")
    for node in calls_in(dispatcher._maybe_dtoh_and_synchronize, "maybe_move_tensor_to_cpu"):
        assert not accepts(
            lambda tensor, as_numpy=False, record_stream=False: None,
            len(node.args),
            tuple(keyword.arg for keyword in node.keywords),
        )
    for name, last in (
        ("_gather_along_first_dim", "output_split_sizes"),
        ("_reduce_scatter_along_first_dim", "input_split_sizes"),
    ):
        assert list(inspect.signature(core(f"tensor_parallel.mappings:{name}")).parameters) == [
            "input_",
            "group",
            last,
            "use_global_buffer",
        ]
    source = inspect.getsource(dispatcher)
    streams = (
        set(re.findall(r"torch\.cuda\.(\w+)", source))
        | set(re.findall(r"cuda_dtoh_stream\.(\w+)", source))
        | set(re.findall(r"d2h_event\.(\w+)", source))
    )
    assert streams == {
        "Stream",
        "current_stream",
        "stream",
        "wait_stream",
        "record_event",
        "synchronize",
    }


def test_experts_are_reduced_apart_only_with_expert_parallelism():
    """The reason for a rule in config/check.py (parallel.expert_tensor)."""
    assert "not (self.is_expert and self.expert_parallel)" in inspect.getsource(
        core("tensor_parallel.layers:ColumnParallelLinear")
    )
