"""What differs between the megatron-core versions that this library runs on.

0.16.1 and 0.19.2 are supported; everything that has to know which one is installed stands here, and
tests/test_megatron_core_surface.py lists what is relied on in each. This file imports neither
megatron-core nor torch, so that it can be imported before the CPU stand-ins are in place.
"""

import functools
import importlib.metadata
import logging
from typing import Any

SUPPORTED = ("0.16.1", "0.19.2")
# 0.19.2 logs these once in every process, whatever a program does: by logger, how they begin. They
# announce successors of what both versions have (docs/compatibility.md).
_NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided"
    ),
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def core_version() -> str:
    """The release of the installed megatron-core, without a local build's addition (`+...`).

    importlib.metadata.PackageNotFoundError when it is not installed.
    """
    return importlib.metadata.version("megatron-core").partition("+")[0]


def core_problem() -> str:
    """Why the installed megatron-core is not one that this library runs on; "" when it is.

    It relies on private names of megatron-core, which move between versions without notice.
    """
    try:
        found = core_version()
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found in SUPPORTED:
        return ""
    return (
        f"megatron-core is {found}; supported are {' and '.join(SUPPORTED)} "
        "(docs/compatibility.md): install one of them with pip install megatron-core==VERSION"
    )


def drop_notices() -> None:
    """Keep 0.19.2's notices for its own maintainers out of what a program prints."""
    for logger in _NOTICES:
        logging.getLogger(logger).addFilter(_is_no_notice)


def _is_no_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOTICES[record.name])


def mlp_parts(layer: Any) -> Any:
    """The MLPSubmodules in the spec of a transformer layer; MoESubmodules for a mixture of experts.

    0.16.1 describes it by a ModuleSpec, 0.19.2 by functools.partial(MLP or MoELayer, ...).
    """
    described = layer.submodules.mlp
    if isinstance(described, functools.partial):
        return described.keywords["submodules"]
    return described.submodules


def planned_save_arguments() -> tuple[str, ...]:
    """What TorchDistSaveShardedStrategy.async_save takes beside the state and the folder.

    0.19.2 has a second writer, in the package nvidia-resiliency-ext, and takes that one if it is
    not told otherwise; 0.16.1 has only its own.
    """
    return () if core_version() == "0.16.1" else ("mcore",)
