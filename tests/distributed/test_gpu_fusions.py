"""What a GPU's runs compute in fewer passes, on the CPU: gradients added to main_grad by the head,
Transformer Engine's SwiGLU in megatron-core's MLP.
"""

import torch

from megatron_slm.testing.spawn import run_layouts_on_cpu, run_on_cpu
from tests.distributed import test_layouts
from tests.distributed.bench import SyntheticSamples, local_steps, make_trainer, train

LAYOUTS = {
    "one": {},
    "tp2": dict(tp=2, sequence_parallel=True),
    "pp2": dict(pp=2),
    "dp2_overlap": dict(dp=2, distributed_optimizer=True, overlap=True),
}
CASES = ("data_parallel", "sequence", "global_batch")
"""The second has tied embeddings, and the head of the third computes the selected rows only."""


def gradients(groups, name) -> dict:
    """The gradients of the second step, by the name of the parameter: (plain, added in place)."""
    from megatron.core.utils import unwrap_model

    from megatron_slm.model.decoder import head_weight
    from megatron_slm.model.optimizer import accumulate_in_products

    layout = LAYOUTS[name]
    found = {}
    for case in CASES:
        both = []
        for in_place in (False, True):
            config = test_layouts.make_config(case, layout)
            config.optimizer.clip_grad_norm = 0.0
            config.optimizer.learning_rate = 0.0
            config.schedule.style = "constant"
            trainer = make_trainer(groups, config)
            if in_place:
                for model in trainer.models:
                    accumulate_in_products(model)
            samples = SyntheticSamples(2 * test_layouts.SEQUENCES)
            list(train(trainer, config, local_steps(groups, config, samples, 2), rate=0.0))
            (chunk,) = unwrap_model(trainer.models)
            both.append({name: p.main_grad.clone() for name, p in chunk.named_parameters()})
            if chunk.post_process:
                assert head_weight(chunk).grad_added_to_main_grad is in_place
        found[case] = {name: (both[0][name], both[1][name]) for name in both[0]}
    return found


def test_the_head_adds_the_gradient_that_autograd_would_have_added():
    for name, ranks in run_layouts_on_cpu(gradients, LAYOUTS).items():
        for rank in ranks:
            for case in CASES:
                for parameter, (plain, in_place) in rank[case].items():
                    torch.testing.assert_close(
                        in_place, plain, rtol=2e-5, atol=1e-7, msg=f"{name} {case} {parameter}"
                    )


class Operation(torch.nn.Module):
    """Stands in for transformer_engine.pytorch.ops.SwiGLU, which has state of its own."""

    def forward(self, both_halves):
        gate, value = both_halves.chunk(2, -1)
        return torch.nn.functional.silu(gate) * value

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state): ...


def mlps(groups) -> dict:
    """Output and names in a checkpoint of megatron-core's MLP, with and without the operation."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    from megatron_slm.config.schema import Config
    from megatron_slm.model import layers
    from megatron_slm.model.transformer_config import transformer_config

    layers.transformer_engine_swiglu = lambda: Operation
    found = {}
    for engine in (False, True):
        config = transformer_config(Config(), on_gpu=False)
        config.use_te_activation_func = engine
        activation = {"activation_func": layers.EngineSwiGLU} if engine else {}
        parts = MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, **activation
        )
        mlp = MLP(config, parts, ffn_hidden_size=config.ffn_hidden_size)
        generator = torch.Generator().manual_seed(0)
        for parameter in mlp.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
        hidden = torch.randn(4, 2, config.hidden_size, generator=generator)
        sharded = mlp.sharded_state_dict("mlp.", metadata={"dp_cp_group": groups.dp_cp})
        names = (sorted(mlp.state_dict()), sorted(sharded))
        found[engine] = (mlp(hidden)[0].detach(), names)
    return found


def test_an_mlp_with_transformer_engines_swiglu_has_the_same_checkpoint():
    (found,) = run_on_cpu(mlps)
    (plain, names), (engine, engine_names) = found[False], found[True]
    assert engine_names == names
    torch.testing.assert_close(engine, plain)


def test_layers_that_can_add_to_main_grad_are_told_to():
    from types import SimpleNamespace

    from megatron_slm.model.optimizer import accumulate_in_products

    layer = torch.nn.Linear(2, 2)
    layer.fuse_wgrad_accumulation = False  # as Transformer Engine's linear layers have it
    decoder = torch.nn.Sequential(layer, torch.nn.Linear(2, 2))
    decoder.post_process = True
    accumulate_in_products(SimpleNamespace(module=decoder))
    assert decoder.accumulates_head_gradient
    assert layer.fuse_wgrad_accumulation
    assert not hasattr(decoder[1], "fuse_wgrad_accumulation")
