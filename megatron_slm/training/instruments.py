"""What a run is timed and guarded by, made from its settings."""

from megatron_slm.monitoring import Throughput, model_flops_per_token
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.tools import TrainingTools
from megatron_slm.training.watchdog import Watchdog


def make_throughput(run: RunParts) -> Throughput:
    """The timer of the run's steps."""
    flops = model_flops_per_token(
        run.config.model, run.config.data.sequence_length, run.run_inputs.vocabulary_size
    )
    return Throughput(
        total_tokens=run.length.tokens,
        flops_per_token=flops.training,
        world_size=run.groups.world_size,
        peak_flops_per_second=run.reporter.peak_flops_per_second,
    )


def make_watchdog(run: RunParts) -> Watchdog:
    """What ends the run when it hangs."""
    return Watchdog(
        run.folder,
        rank=run.groups.world_rank,
        world_size=run.groups.world_size,
        step_seconds=run.config.monitoring.hang_seconds,
        other_seconds=60 * run.config.device.timeout_minutes,
    )


def make_tools(run: RunParts) -> TrainingTools:
    """Profiler, garbage collection, timeouts, and the user's function after each step."""
    return TrainingTools(
        run.config,
        run.groups,
        done_steps=run.step,
        report=run.reporter.message,
        hook=run.parts.after_step,
    )
