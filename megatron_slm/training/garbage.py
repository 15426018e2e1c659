"""Python's garbage collection at the same step on all ranks.

Python collects whenever a process has allocated enough objects. Ranks would collect at different
moments, and each time all the others would wait in their next collective.
"""

import gc


class GarbageCollection:
    """A context manager: within it, only `after_step` collects.

    Objects that exist when it is entered (the model, the settings, the modules) are frozen, so that
    a collection looks at newer ones alone and takes milliseconds.
    """

    def __init__(self, interval_steps: int):
        """interval_steps: 0 leaves everything to Python."""
        self.interval_steps = interval_steps
        self._was_enabled = False

    def __enter__(self) -> "GarbageCollection":
        self._was_enabled = gc.isenabled()
        if self.interval_steps:
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self.interval_steps:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def after_step(self, step: int) -> None:
        """Collect after every `interval_steps`-th step."""
        if self.interval_steps and step % self.interval_steps == 0:
            gc.collect()
