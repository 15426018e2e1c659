"""A user's optimizer inside megatron-core's mixed-precision and distributed wrappers.

It is a function(parameter_groups, settings) that returns a torch.optim.Optimizer, as in

    def lion(parameter_groups, settings):
        return Lion(parameter_groups, lr=settings.learning_rate, betas=(0.9, 0.99))

What it is given: fp32 parameters, flat slices of them with the distributed optimizer, so it has to
work element by element. Each group has its own lr and weight_decay, and lr is set before every
step. What it must keep to, because checkpoints store it by name in every layout: its state is
exp_avg and exp_avg_sq, of the parameter's shape, made where they are missing; steps are counted in
group["step"], or not at all.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from megatron_slm.config.schema import OptimizerConfig

MakeOptimizer = Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
STATE = ("exp_avg", "exp_avg_sq")


def put_inside(optimizer: Any, make: MakeOptimizer, settings: OptimizerConfig) -> None:
    """Replace the AdamW that megatron-core made in each part of its optimizer, before any step."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "optimizer", None) is not None:
            part.optimizer = _made_with(part.optimizer.param_groups, make, settings)


def _made_with(
    groups: list[dict[str, Any]], make: MakeOptimizer, settings: OptimizerConfig
) -> torch.optim.Optimizer:
    """An optimizer of exactly these groups and parameters.

    torch accepts leaf tensors only, but the distributed optimizer's parameters are views; they are
    put in after construction.
    """
    parameters = [group["params"] for group in groups]
    for group in groups:
        group["params"] = [parameter.detach().requires_grad_() for parameter in group["params"]]
    made = make(groups, settings)
    for group, originals in zip(groups, parameters, strict=True):
        group["params"] = originals
    made.param_groups = groups
    return made


def check_outside_optimizer(name: str, make: MakeOptimizer, settings: OptimizerConfig) -> None:
    """Try the optimizer on a few numbers: two steps, and the same two with a resume between them.

    Raises ValueError with the requirement that it does not meet.
    """
    try:
        whole = _Trial(make, settings)
        whole.step()
        problem = whole.problem()
        if not problem:
            resumed = _Trial(make, settings, after=whole)
            whole.step()
            resumed.step()
            if not torch.equal(whole.parameter, resumed.parameter):
                problem = (
                    "does not go on from exp_avg, exp_avg_sq and group['step'], which is all that "
                    "a checkpoint holds"
                )
    except Exception as error:  # the user's code: it may raise anything
        problem = f"fails on a parameter of 8 numbers: {type(error).__name__}: {error}"
    if problem:
        raise ValueError(f"optimizer.kind: {name} {problem}; see docs/extending.md")


class _Trial:
    """One flat parameter with a gradient, and an optimizer of it."""

    def __init__(
        self, make: MakeOptimizer, settings: OptimizerConfig, after: "_Trial | None" = None
    ):
        start: torch.Tensor = torch.linspace(-1, 1, 8)
        if after is not None:
            start = after.parameter.detach().clone()
        self.parameter: torch.nn.Parameter = torch.nn.Parameter(start)
        group = {
            "params": [self.parameter],
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        }
        self.optimizer = make([group], settings)
        if after is not None:  # as checkpoint/optimizer_state.py does it
            self.state.update(copy.deepcopy(dict(after.state)))
            for name in STATE:
                self.state.setdefault(name, torch.zeros_like(self.parameter))
            self.optimizer.param_groups[0]["step"] = after.optimizer.param_groups[0].get("step", 0)

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[self.parameter]

    def step(self) -> None:
        self.parameter.grad = torch.linspace(0.5, -0.25, 8)
        self.optimizer.step()

    def problem(self) -> str:
        """What is wrong with what it made; "" = nothing."""
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            return f"gives a {type(self.optimizer).__name__}, not a torch.optim.Optimizer"
        if other := sorted(set(self.state) - set(STATE)):
            return f"keeps {', '.join(other)} beside exp_avg and exp_avg_sq: it would be lost"
        if any(value.shape != self.parameter.shape for value in self.state.values()):
            return "keeps moments that have not the shape of their parameter"
        if not torch.isfinite(self.parameter).all():
            return "makes a parameter that is not finite"
        return ""
