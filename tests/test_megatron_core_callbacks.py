"""What megatron-core calls of ours: an upgrade that calls it with other arguments fails here, by
name. What we call of megatron-core is in test_megatron_core_surface.py.
"""

import ast
import inspect
import re

import pytest

from tests.megatron_core import INSTALLED, accepts, calls_in, core
from tests.source_tree import PACKAGE


def fits(ours, node: ast.Call, *, missing_self: bool = False) -> str:
    named = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
    starred = len(named) < len(node.keywords)
    return accepts(ours, len(node.args), named, missing_self=missing_self, partly=starred)


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


# (function of megatron-core, the call in its source, our function it reaches, whether that is a
# method)
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
        ("model/decoder.py", "Decoder", "_postprocess"),
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
        "transformer.transformer_layer:TransformerLayer._forward_mlp",
        "self._forward_post_mlp",
        ("model/layer_variants.py", "ParallelResidualLayer", "_forward_post_mlp"),
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
        "transformer.moe.moe_layer:MoELayer.__init__",
        "submodules.router" if INSTALLED == "0.16.1" else "self.submodules.router",
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
    if called == "forward_step_func":
        # A third argument comes with partial activation checkpointing only, which we never ask for.
        found = [
            node for node in found if "checkpoint_activations_microbatch" not in ast.unparse(node)
        ]
    for node in found:
        assert not fits(
            our_function(*ours) if ours else RANDOM_STAND_INS[called], node, missing_self=method
        ), ast.unparse(node)


NORMS = [
    (
        "transformer.transformer_layer:TransformerLayer.__init__",
        ("submodules.input_layernorm", "submodules.pre_mlp_layernorm"),
    ),
    (
        "transformer.attention:SelfAttention.__init__",
        ("submodules.q_layernorm", "submodules.k_layernorm")
        if INSTALLED == "0.16.1"
        else ("q_norm_cls", "k_norm_cls"),
    ),
    (
        "transformer.transformer_block:TransformerBlock._build_layers",
        ("self.submodules.layer_norm",)
        if INSTALLED == "0.16.1"
        else ("not_none(self.submodules.layer_norm)",),
    ),
]


@pytest.mark.parametrize(
    "path, name", [("model/layers.py", "RMSNorm"), ("model/layer_norm.py", "LayerNorm")]
)
@pytest.mark.parametrize("caller, norms", NORMS, ids=[row[0].split(":")[1] for row in NORMS])
def test_norms_are_built_with_what_ours_takes(caller, norms, path, name):
    """0.16.1 builds them through build_module(norm, **arguments), 0.19.2 calls the norm itself."""
    ours = our_function(path, name, "__init__")
    for norm in norms:
        found = norm_calls(core(caller), norm)
        assert found, f"{caller} no longer builds {norm}"
        for node in found:
            assert not fits(ours, node, missing_self=True), ast.unparse(node)


def norm_calls(caller, norm: str) -> list[ast.Call]:
    """The calls that make a norm, with the arguments that the norm gets."""
    if INSTALLED != "0.16.1":
        return calls_in(caller, norm)
    found = [node for node in calls_in(caller, "build_module") if ast.unparse(node.args[0]) == norm]
    for node in found:
        node.args = node.args[1:]
    return found


@pytest.mark.parametrize("name", list(RANDOM_STAND_INS))
def test_random_state_stand_ins_have_the_signature_they_replace(name):
    theirs = inspect.signature(core(f"tensor_parallel.random:{name}"))
    ours = inspect.signature(RANDOM_STAND_INS[name])
    expected = [(parameter.kind, parameter.default) for parameter in theirs.parameters.values()]
    assert [(p.kind, p.default) for p in ours.parameters.values()] == expected
    written = re.search(
        rf"megatron_random\.{name} = \(?\s*(lambda [^:]+):",
        (PACKAGE / "cpu_standins.py").read_text(),
    )[1]
    assert written == "lambda " + ", ".join(
        f"{p.name}" + (f"={p.default!r}".replace("'", '"') if p.default is not p.empty else "")
        for p in ours.parameters.values()
    )


def test_the_token_dispatcher_takes_our_stand_ins():
    """cpu_standins.use_cpu(): split sizes become numpy by one function that the dispatcher knows by
    name, and streams are made in its constructor.
    """
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


def test_a_layer_adds_to_its_residual_stream_where_the_norms_of_outputs_hang():
    """model/norm_placement.py wraps what these calls take."""
    layer = core("transformer.transformer_layer:TransformerLayer")
    for addition, method in (
        ("self_attn_bda", "_forward_attention"),
        ("mlp_bda", "_forward_post_mlp"),
    ):
        source = inspect.getsource(getattr(layer, method))
        assert f"self.{addition}(self.training, self.config.bias_dropout_fusion)(" in source
