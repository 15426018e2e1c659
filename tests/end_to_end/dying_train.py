"""megatron_slm.train with one instruction: die by SIGKILL at a named place.
SLM_TEST_DEATH=PLACE:STEP:RANK, RANK may be "all".

step      in the optimizer step STEP, between backward and update
save      while the checkpoint of STEP is written: half of the weights file is on disk
rename    the checkpoint of STEP is written, and not yet renamed (rank 0 alone does that)
pointer   it is renamed, and `latest` does not name it yet (rank 0 alone does that)
"""

import os
import signal
import sys
import time
from pathlib import Path

from megatron_slm import train


def die(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def die_in_step(step: int) -> None:
    """Background saves are waited for, so that the newest checkpoint of a busy machine is known."""
    from megatron_slm.checkpoint.store import CheckpointStore
    from megatron_slm.training import step as step_module

    finish_pending = CheckpointStore.finish_pending
    CheckpointStore.finish_pending = lambda store, **_: finish_pending(store, wait=True)
    forward_backward = step_module.forward_backward
    steps = []

    def dying(*arguments, **named):
        result = forward_backward(*arguments, **named)
        steps.append(steps[-1] + 1 if steps else resumed_step() + 1)
        if steps[-1] == step:
            die(os.getpid())
        return result

    step_module.forward_backward = dying


def resumed_step() -> int:
    """The step this start resumed from, as the run folder says before it saves."""
    from megatron_slm.checkpoint.folder import complete_checkpoints, step_of

    folder = Path(sys.argv[sys.argv.index("--run.folder") + 1], "checkpoints")
    return max([step_of(path) for path in complete_checkpoints(folder)], default=0)


def die_in_save(step: int) -> None:
    """In the process that writes the file: kill the trainer with half of the file written, then die
    too.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    def dying(transforms, index, bucket, *arguments, **named):
        write(transforms, index, bucket, *arguments, **named)
        if f"step_{step:08d}" in bucket[0]:
            os.truncate(bucket[0], os.path.getsize(bucket[0]) // 2)
            time.sleep(0.3)  # so that an asynchronous save meets training that has gone on
            die(os.getppid())
            die(os.getpid())

    FileSystemWriterAsync.write_preloaded_data = staticmethod(dying)


def die_before(owner, name: str, step: int) -> None:
    function = getattr(owner, name)

    def dying(path, *arguments):
        if path.name.endswith(f"step_{step:08d}"):
            die(os.getpid())
        return function(path, *arguments)

    setattr(owner, name, dying)


def main() -> int:
    place, step, rank = os.environ["SLM_TEST_DEATH"].split(":")
    if rank in ("all", os.environ["RANK"]):
        from megatron_slm.device import choose_device

        choose_device("cpu")  # before megatron-core is imported
        from megatron_slm.checkpoint import folder

        {
            "step": die_in_step,
            "save": die_in_save,
            "rename": lambda step: die_before(Path, "rename", step),
            "pointer": lambda step: die_before(folder, "point_to", step),
        }[place](int(step))
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
