"""What we rely on in one of the supported megatron-core versions and not in the other.

What both have in common is in test_megatron_core_surface.py.
"""

import inspect

import pytest

from megatron_slm.core_versions import SUPPORTED
from tests.megatron_core import INSTALLED, core

# (object below megatron.core, text of its source that says it), with what rests on it.
FACTS_OF_ONE_VERSION = {
    "0.16.1": [
        # The reason for a rule in config/layout_rules.py (parallel.expert_tensor).
        (
            "tensor_parallel.layers:ColumnParallelLinear",
            "not (self.is_expert and self.expert_parallel)",
        ),
        # checkpoint/writing.py puts a queue there, so that none is made.
        (
            "dist_checkpointing.strategies.filesystem_async:_get_write_results_queue",
            "if _results_queue is None:",
        ),
        # core_versions.mlp_parts.
        (
            "models.gpt.moe_module_specs:get_moe_module_spec_for_backend",
            "moe_module_spec = ModuleSpec( module=MoELayer, submodules=MoESubmodules(",
        ),
        # core_versions.planned_save_arguments.
        (
            "dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.async_save",
            "async_save( self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path )",
        ),
        # checkpoint/writing.py writes what these two write.
        (
            "dist_checkpointing.strategies.common:TorchCommonSaveStrategy.save_common",
            "torch.save(common_state_dict, path)",
        ),
        ("dist_checkpointing.core:save_config", "json.dump(asdict(config), f)"),
    ],
    "0.19.2": [
        (
            "tensor_parallel.layers:ColumnParallelLinear",
            "self.is_expert and ( self.expert_parallel or "
            "self.config.expert_tensor_parallel_size != self.config.tensor_model_parallel_size )",
        ),
        (
            "dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
            "if _results_queue is None:",
        ),
        (
            "models.gpt.moe_module_specs:get_moe_module_spec_for_backend",
            "return partial( MoELayer, submodules=MoESubmodules(",
        ),
        (
            "dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.async_save",
            'checkpoint_dir: Path, async_strategy: str = "nvrx"',
        ),
        # It still reads the common.pt and the four names in metadata.json that we write.
        (
            "dist_checkpointing.serialization:load_common_state_dict",
            "if _legacy_common_state_exists(checkpoint_dir): return load_common(checkpoint_dir)",
        ),
        (
            "dist_checkpointing.core:maybe_load_config",
            "for k, v in config_dict.items() if k in known_fields",
        ),
        # core_versions.drop_notices.
        ("models.gpt.gpt_model:GPTModel.__init__", '"GPTModel IS DEPRECATED.'),
        (
            "distributed.distributed_data_parallel:DistributedDataParallel.__init__",
            '"DistributedDataParallel: full_param_layout not provided with',
        ),
        (
            "dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.async_save",
            "\"MCore's async save is deprecated",
        ),
        # checkpoint/extra_state.py accepts this name in a pickle of a tensor.
        (
            "safe_globals:safe_load_from_bytes",
            "return torch.load(io.BytesIO(b), weights_only=True)",
        ),
        # model/build.py marks weights that have no mark yet.
        (
            "tensor_parallel.layers:RowParallelLinear",
            "else: set_tensor_model_parallel_attributes( tensor=self.weight, is_parallel=True, "
            "dim=1, stride=stride )",
        ),
    ],
}


def test_there_is_a_list_for_every_supported_version():
    assert tuple(FACTS_OF_ONE_VERSION) == SUPPORTED


@pytest.mark.parametrize(
    "owner, text",
    FACTS_OF_ONE_VERSION[INSTALLED],
    ids=[owner.split(":")[1] for owner, _ in FACTS_OF_ONE_VERSION[INSTALLED]],
)
def test_what_holds_in_the_installed_version(owner, text):
    assert text in " ".join(inspect.getsource(core(owner)).split())
