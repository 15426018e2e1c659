"""Everything we take from megatron-core: an upgrade that moves or renames something fails here, by
name. What it calls of ours is in test_megatron_core_callbacks.py.

Imports, attributes of its modules and direct calls are collected from our source. Methods called on
its objects and its private attributes cannot be seen that way and stand in tables. All of it holds
in both supported versions; what holds in one of them alone is in test_megatron_core_versions.py.
"""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from megatron_slm.core_versions import SUPPORTED, planned_save_arguments
from tests.megatron_core import INSTALLED, accepts, core, resolve
from tests.source_tree import PACKAGE, ROOT, library_files, tree


def imports_of(path: Path) -> dict[str, tuple[str, str]]:
    """Local name -> (module, symbol) of what a file takes from megatron; "" = the module itself."""
    names = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.asname: (alias.name, "")
                for alias in node.names
                if alias.name.split(".")[0] == "megatron" and alias.asname
            }
    return names


IMPORTS = {path: names for path in library_files() if (names := imports_of(path))}
SYMBOLS = sorted({target for names in IMPORTS.values() for target in names.values()})


def parent_symbol(path: Path, expression: ast.expr) -> tuple[object, str] | None:
    """The megatron object that an expression such as `parallel_state.is_initialized` or `GPTModel`
    names, with its text.
    """
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
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ClassDef) or not node.bases:
            continue
        methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        base = parent_symbol(path, node.bases[0])
        if base and "__init__" not in methods:
            found[node.name] = base[0]
    return found


def calls() -> list[tuple[str, object, ast.Call]]:
    """Every direct call of a megatron function or class in our source."""
    found = []
    for path in IMPORTS:
        ours = subclasses(path)
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            text = ast.unparse(node.func)
            called = (ours[text], text) if text in ours else parent_symbol(path, node.func)
            if called:
                where = f"{path.relative_to(PACKAGE)}:{node.lineno} {called[1]}"
                found.append((where, called[0], node))
    return found


def test_the_version_is_a_supported_one():
    pinned = re.findall(
        r"^megatron-core==([\d.]+)", (ROOT / "requirements/train.txt").read_text(), re.MULTILINE
    )
    assert INSTALLED in SUPPORTED, (
        "read docs/compatibility.md and this file again before moving to another megatron-core"
    )
    assert tuple(pinned) == SUPPORTED


@pytest.mark.parametrize(
    "module, symbol", SYMBOLS, ids=[f"{module}:{symbol}" for module, symbol in SYMBOLS]
)
def test_imported_symbol_exists(module, symbol):
    assert resolve(module, symbol) is not None


def test_attributes_of_its_modules_and_enums_exist():
    missing = []
    for path, names in IMPORTS.items():
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in names
            ):
                holder = resolve(*names[node.value.id])
                if isinstance(holder, (ModuleType, type)) and not hasattr(holder, node.attr):
                    where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    missing.append(f"{where}: {names[node.value.id]} has no {node.attr}")
    assert not missing


def test_direct_calls_fit_the_signatures():
    seen = 0
    wrong = []
    for where, function, node in calls():
        named = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        positional = [part for part in node.args if not isinstance(part, ast.Starred)]
        starred = len(positional) < len(node.args) or len(named) < len(node.keywords)
        problem = accepts(function, len(positional), named, partly=starred)
        seen += 1
        wrong += [f"{where}: {problem}"] if problem else []
    assert seen > 30, "the collection of calls found next to nothing: it is broken itself"
    assert not wrong, "\n".join(wrong)


# Called on objects that megatron-core gave us:
# (class or function below megatron.core, method, positional arguments, keywords).
METHODS = [
    ("distributed:DistributedDataParallel", "scale_gradients", 1, ()),
    ("distributed:DistributedDataParallel", "zero_grad_buffer", 0, ()),
    ("distributed:DistributedDataParallel", "start_param_sync", 0, ("force_sync",)),
    (
        "distributed.param_and_grad_buffer:_ParamAndGradBucketGroup",
        "finish_param_sync",
        0,
        (),
    ),
    ("models.gpt:GPTModel", "sharded_state_dict", 0, ()),
    ("models.gpt:GPTModel", "forward", 3, ("labels", "loss_mask")),
    ("models.gpt:GPTModel", "shared_embedding_or_output_weight", 0, ()),
    ("transformer.transformer_layer:TransformerLayer", "_forward_attention", 1, ()),
    ("transformer.transformer_layer:TransformerLayer", "_forward_mlp", 1, ("padding_mask",)),
    ("transformer.transformer_layer:TransformerLayer", "_forward_post_mlp", 2, ()),
    ("optimizer.distrib_optimizer:DistributedOptimizer", "step", 0, ()),
    ("optimizer.distrib_optimizer:DistributedOptimizer", "zero_grad", 0, ()),
    ("optimizer.distrib_optimizer:DistributedOptimizer", "reload_model_params", 0, ()),
    ("optimizer.optimizer:Float16OptimizerWithFloat16Params", "step", 0, ()),
    ("optimizer.optimizer:FP32Optimizer", "step", 0, ()),
    ("optimizer.optimizer:ChainedOptimizer", "step", 0, ()),
    ("optimizer.optimizer:ChainedOptimizer", "prepare_grads", 0, ()),
    ("optimizer.optimizer:ChainedOptimizer", "step_with_ready_grads", 0, ()),
    ("optimizer.optimizer:MegatronOptimizer", "get_parameters", 0, ()),
    ("optimizer.optimizer:MegatronOptimizer", "get_grad_stats_parallel_group", 0, ()),
    ("optimizer.optimizer:ChainedOptimizer", "scale_loss", 1, ()),
    ("optimizer.grad_scaler:DynamicGradScaler", "state_dict", 0, ()),
    ("optimizer.grad_scaler:DynamicGradScaler", "load_state_dict", 1, ()),
    ("optimizer.optimizer:ChainedOptimizer", "reload_model_params", 0, ()),
    (
        "dist_checkpointing.strategies.fully_parallel:FullyParallelSaveStrategyWrapper",
        "async_save",
        2 + len(planned_save_arguments()),
        (),
    ),
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
    ("transformer.attention:SelfAttention", ("linear_qkv", "core_attention", "pg_collection")),
    ("distributed:DistributedDataParallel", ("ddp_config", "param_to_bucket_group")),
    ("models.common.embeddings.rotary_pos_embedding:RotaryEmbedding", ("inv_freq", "cp_group")),
    (
        "transformer.transformer_layer:TransformerLayer",
        ("config", "layer_number", "self_attention", "input_layernorm", "pre_mlp_layernorm"),
    ),
    (
        "models.gpt:GPTModel",
        (
            "post_process",
            "share_embeddings_and_output_weights",
            "output_layer",
            "decoder",
            "pg_collection",
            "config",
        ),
    ),
    ("dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync", ("write_buckets",)),
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
    """(buffer, dtype, bucket) per parameter; per bucket a param_map whose "param" range is this
    rank's slice.
    """
    source = inspect.getsource(core("optimizer.distrib_optimizer:DistributedOptimizer"))
    assert "param_gbuf_map[param] = (gbuf_index, dtype, bucket_index)" in source
    assert "param_range_map[param] = {" in source
    assert '"param": sub_param_range' in source
    assert "model_param_group_index_map" in source
    assert "(group_index, len(" in source


def test_a_planned_save_hands_over_what_we_read():
    """The plan's results are (writer, metadata of the whole, ...), a bucket is (path, name,
    data).
    """
    assert "(storage_writer, global_metadata, dist_wrapper)," in inspect.getsource(
        core("dist_checkpointing.strategies.state_dict_saver:save_state_dict_async_plan")
    )
    writing = "dist_checkpointing.strategies.filesystem_async"
    assert "file_name, storage_key, (bytes_data, tensor_data) = write_bucket" in inspect.getsource(
        core(f"{writing}:FileSystemWriterAsync.write_preloaded_data")
    )


LOADING_STEPS = (
    "force_all_tensors_to_non_fp8(sharded_state_dict)",
    "load_preprocess(",
    "merge(common_state_dict, nonpersistent_state_dict)",
    "extract_sharded_base(sharded_state_dict)",
    "determine_global_metadata(",
    "validate_integrity_and_strict_load(",
    "sharded_strategy.load(sharded_state_dict, checkpoint_dir",
    "merge(common_state_dict, loaded_state_dict)",
    "apply_factory_merges(common_state_dict, sh_ten_factories)",
)


def test_a_load_takes_the_steps_that_ours_takes():
    """checkpoint/loading.py repeats dist_checkpointing.load with readers of its own."""
    source = inspect.getsource(core("dist_checkpointing.serialization:load"))
    places = [source.index(step) for step in LOADING_STEPS]
    assert places == sorted(places)
    ours = (PACKAGE / "checkpoint" / "loading.py").read_text()
    for step in LOADING_STEPS:
        assert step.partition("(")[0].rpartition(".")[2] + "(" in ours, step


def test_the_loss_divisor_may_be_an_integer_zero():
    """We divide gradients ourselves: megatron-core gets num_tokens = 0 and must leave a sum alone
    under calculate_per_token_loss.
    """
    source = inspect.getsource(core("pipeline_parallel.schedules:forward_step_calc_loss"))
    assert "if not config.calculate_per_token_loss:" in source
    assert "finalize_model_grads( chunks, None," in " ".join(
        (PACKAGE / "model" / "forward_backward.py").read_text().split()
    )


def test_the_schedule_scales_auxiliary_losses_by_the_loss_scale_alone():
    """Under calculate_per_token_loss; all else about their scale is ours (model/router.py)."""
    source = inspect.getsource(core("pipeline_parallel.schedules:forward_step_calc_loss"))
    scaling = "MoEAuxLossAutoScaler.set_loss_scale(loss_scale)"
    assert f"if config.calculate_per_token_loss:\n            {scaling}" in source
    assert "return grad_output, scaled_aux_loss_grad" in inspect.getsource(
        core("transformer.moe.moe_utils:MoEAuxLossAutoScaler")
    )
