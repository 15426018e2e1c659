"""Rules about the parts and tools of a run that are not its method: outside code, the profiler."""

from collections.abc import Iterator

from megatron_slm.config.extension_points import unknown_parts
from megatron_slm.config.schema import Config


def tool_problems(config: Config, world_size: int) -> Iterator[str]:
    """One sentence for each broken rule."""
    yield from unknown_parts(config)
    if config.monitoring.validations and not config.data.validation:
        yield (
            f"monitoring.validations: got {config.monitoring.validations} with no corpus in "
            "data.validation, without which nothing is validated: give one, or remove them"
        )
    window = config.monitoring.profile_steps
    if window and (len(window) != 2 or window[0] > window[1]):
        yield (
            f"monitoring.profile_steps: got {window}; expected the first and the last step of a "
            "window, such as [20, 22]"
        )
    if config.monitoring.memory_snapshot and config.device.kind == "cpu":
        yield (
            "monitoring.memory_snapshot: got true with device.kind cpu; only CUDA's allocator "
            "records what it does: set it to false"
        )
