"""How far a run has come and how far it goes: steps, tokens and samples are counted, for their size
may change between starts.
"""

from dataclasses import dataclass

from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import tokens_per_step


@dataclass(frozen=True)
class Done:
    """What a run has processed over all its starts."""

    steps: int = 0
    tokens: int = 0
    samples: int = 0


class RunLength:
    """The length of a run from `start`, what it had done when it was started, to its end.

    With schedule.train_steps the run ends after that many steps, whatever their size; with
    schedule.train_tokens it ends with the first step that reaches that many tokens.
    """

    def __init__(self, config: Config, start: Done | None = None):
        self.start = start = start or Done()
        self.step_tokens, self.step_samples = tokens_per_step(config), config.data.global_batch_size
        self.in_steps = config.schedule.train_steps > 0
        if self.in_steps:
            remaining_steps = config.schedule.train_steps - start.steps
        else:
            remaining_steps = -((start.tokens - config.schedule.train_tokens) // self.step_tokens)
        self.remaining_steps = max(0, remaining_steps)
        """Steps from `start` on."""
        self.steps = start.steps + self.remaining_steps
        """Number of the last step."""
        self.tokens = start.tokens + self.remaining_steps * self.step_tokens
        """Tokens processed at the end."""

    @property
    def remaining_samples(self) -> int:
        """Samples read from `start` on."""
        return self.remaining_steps * self.step_samples

    def after(self, done: Done) -> Done:
        """What is done one step later."""
        return Done(
            done.steps + 1, done.tokens + self.step_tokens, done.samples + self.step_samples
        )

    def clock(self, done: Done) -> tuple[float, float]:
        """(position, end): how much of the run is done, and its length, both in steps of the
        present size.

        In the unit of the run's length: a run of so many tokens is half through when half of them
        are processed, so a schedule continues from the same point when the batch size changes; a
        run of so many steps is half through after half of them.
        """
        if self.in_steps:
            return done.steps, self.steps
        return done.tokens / self.step_tokens, self.tokens / self.step_tokens


def shorter_than_done(config: Config, done: Done, step_tokens: int) -> str | None:
    """What is wrong with a configured end that lies before `done`, whose last step had
    `step_tokens` tokens; None when nothing is.
    """
    schedule = config.schedule
    if schedule.train_steps and schedule.train_steps < done.steps:
        wanted = f"schedule.train_steps: got {schedule.train_steps}"
    elif schedule.train_tokens and schedule.train_tokens <= done.tokens - step_tokens:
        wanted = f"schedule.train_tokens: got {schedule.train_tokens}"
    else:
        return None
    return (
        f"{wanted}, but the run in {config.run.folder} has done {done.steps} steps "
        f"({done.tokens:,} tokens); give more to go on, or the same to leave it as it is; for a "
        "shorter run give another run.folder"
    )
