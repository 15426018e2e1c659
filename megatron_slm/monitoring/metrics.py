"""Record sums and counts on the device; reduce them over ranks once per log interval.

A ratio is recorded as two sums and divided once, after the reduction: token selection makes the
count differ in every micro-batch and rank, so a mean of means would be wrong
(docs/method.md#point-4). Nothing here waits for the device before `reduce`.

Which ranks: the losses exist only on the last pipeline stage. Every rank may call
`reduce(groups.dp_cp)`; the reduction stays inside that stage's data x context parallel ranks
(tensor ranks hold copies), and the last rank of the world, which writes the sinks, is one of the
last stage's. No value has to travel between stages.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.monitoring.sums import (
    Layout,
    Sums,
    describe_kind,
    hash_of_layout,
    shape_of,
)

Pairs = Mapping[str, tuple[Tensor, Tensor]]
Values = dict[str, float | list[float]]

MAXIMUM_SLOTS = 62
"""Most `add_max` metrics: the tensor of maxima has a fixed size, so that it can also carry the
layout check.
"""


class Metrics:
    """Accumulates named metrics of one log interval.

    Equals, for each name, in one process that saw every rank's tokens: add -> sum(numerators) /
    sum(denominators); add_sum -> sum(values); add_max -> max(values). Accumulation is float64 on
    `device`. Names carry their unit (_nats, _fraction, _seconds, ...).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sums: dict[str, Sums] = {}
        """Since the last fold, on the device, each element [n] or 0-d."""
        self._maxima: dict[str, Tensor] = {}
        """The same for maxima, 0-d."""
        self._folded: dict[str, Sums] = {}
        """Summed over the ranks already, on the CPU."""
        self._folded_maxima: dict[str, float] = {}

    def add(self, name: str, numerator: Any, denominator: Any = 1) -> None:
        """Record a ratio as two sums: scalars (0-d tensors, numbers) or 1-D tensors of ratios.

        A scalar denominator beside a 1-D numerator counts for every element. Tensors are detached,
        never synchronised.
        """
        shape = max(shape_of(name, numerator), shape_of(name, denominator))
        total, divisor = self._accumulators(name, shape, ratio=True)
        assert divisor is not None  # a ratio has one
        total.add_(self._value(numerator))
        divisor.add_(self._value(denominator))

    def add_all(self, measured: Pairs) -> None:
        """Record many (numerator, denominator) pairs, as `selection.diagnostics.describe` gives."""
        for name, (numerator, denominator) in measured.items():
            self.add(name, numerator, denominator)

    def add_sum(self, name: str, value: Any) -> None:
        """Record a total over micro-batches, steps and ranks, such as a number of tokens.

        A scalar, or a 1-D tensor of totals.
        """
        sums = self._accumulators(name, shape_of(name, value), ratio=False)
        sums.total.add_(self._value(value))

    def add_max(self, name: str, value: Any) -> None:
        """Record a scalar whose largest value over the interval and the ranks counts."""
        if shape := shape_of(name, value):
            raise ValueError(
                f"metric {name!r}: add_max takes a scalar, got a vector of shape {shape}"
            )
        if name not in self._maxima:
            if len(self._maxima) == MAXIMUM_SLOTS:
                raise ValueError(
                    f"metric {name!r} would be the {MAXIMUM_SLOTS + 1}th maximum; "
                    f"at most {MAXIMUM_SLOTS} fit"
                )
            self._maxima[name] = torch.full((), -torch.inf, dtype=torch.float64, device=self.device)
        value = self._value(value)
        if not torch.is_tensor(value):
            value = torch.full((), value, dtype=torch.float64, device=self.device)
        torch.maximum(self._maxima[name], value, out=self._maxima[name])

    def reduce(
        self,
        group: dist.ProcessGroup | None = None,
        summarise: Callable[[Pairs], Values] | None = None,
    ) -> Values:
        """The interval's values over the ranks of `group`; starts the next interval.

        group: None = this rank alone. Every rank of it must call this. Two collectives: MAX of 64
        float64, then SUM of one packed tensor. It is the only place that waits for the device. A
        metric that no rank recorded is left out; an element with count 0 beside others is NaN.

        summarise: forms the values of the ratios from their reduced (sum, count) pairs, float64 on
        the CPU, in place of the plain division: `selection.diagnostics.summarise` turns its
        histograms into rates this way.
        """
        self.fold(group)
        ratios: dict[str, tuple[Tensor, Tensor]] = {}
        totals: Values = {}
        for name, (total, divisor) in self._folded.items():
            if divisor is None:
                totals[name] = total.tolist()
            elif divisor.any():
                ratios[name] = (total, divisor)
        values = (summarise or divide)(ratios) | totals | self._known_maxima()
        self._folded = {}
        self._folded_maxima = {}
        return values

    def fold(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum over the ranks what was recorded so far, without ending the interval.

        Every rank of the group must call it.
        """
        maxima = self._reduce_maxima(group)
        packed = self._pack()
        if group is not None:
            dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
        for name, sums in self._unpack(packed.cpu()).items():
            before = self._folded.get(name)
            self._folded[name] = sums if before is None else before.plus(sums)
        for name, value in maxima.items():
            self._folded_maxima[name] = max(value, self._folded_maxima.get(name, -math.inf))
        self._clear()

    def state_dict(self, group: dist.ProcessGroup | None = None) -> dict:
        """The interval so far, over all ranks, as plain numbers for a checkpoint in its middle.

        Folds first, in every run that saves here, so that a resumed run adds the same numbers in
        the same order as an uninterrupted one and logs the same line.
        """
        self.fold(group)
        return {
            "sums": {
                name: [total.tolist(), None if divisor is None else divisor.tolist()]
                for name, (total, divisor) in self._folded.items()
            },
            "maxima": self._known_maxima(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continue the interval a checkpoint cut; what this recorder held is dropped.

        Every rank loads the same state.
        """
        self._clear()
        self._folded = {
            name: Sums(_numbers(total), None if divisor is None else _numbers(divisor))
            for name, (total, divisor) in state["sums"].items()
        }
        self._folded_maxima = dict(state["maxima"])

    def _known_maxima(self) -> dict[str, float]:
        return {name: value for name, value in self._folded_maxima.items() if value > -math.inf}

    def _accumulators(self, name: str, shape: tuple[int, ...], ratio: bool) -> Sums:
        if name not in self._sums:
            zeros = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self._sums[name] = Sums(zeros, torch.zeros_like(zeros) if ratio else None)
        sums = self._sums[name]
        if sums.layout != (shape, ratio):
            raise ValueError(
                f"metric {name!r} was first a {describe_kind(*sums.layout)}, "
                f"now it is a {describe_kind(shape, ratio)}; give the two different names"
            )
        return sums

    def _value(self, value: Any) -> Tensor | float:
        """A Python number is returned as it is (a kernel argument needs no copy and no
        synchronisation); a tensor as float64 on this device.
        """
        if torch.is_tensor(value):
            return value.detach().to(device=self.device, dtype=torch.float64, non_blocking=True)
        return float(value)

    def _layout(self) -> Layout:
        return {name: sums.layout for name, sums in sorted(self._sums.items())}

    def _reduce_maxima(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """MAX over ranks.

        Slots 0 and 1 show whether all ranks pack the same layout, before the packed tensors are
        summed.
        """
        if group is None:
            return {name: value.item() for name, value in self._maxima.items()}
        reduced = self._all_reduce_max(group)
        # max(hash) != min(hash): some rank recorded a metric that another did not.
        if reduced[0] != -reduced[1]:
            self._adopt_union(group)
            reduced = self._all_reduce_max(group)
        # Behind the last name there are unused slots.
        return dict(zip(sorted(self._maxima), reduced[2:], strict=False))

    def _all_reduce_max(self, group: dist.ProcessGroup) -> list[float]:
        names = sorted(self._maxima)
        slots = torch.full(
            (MAXIMUM_SLOTS + 2,), -torch.inf, dtype=torch.float64, device=self.device
        )
        layout_hash = hash_of_layout(self._layout(), names)
        slots[0] = layout_hash
        slots[1] = -layout_hash
        if names:
            slots[2 : 2 + len(names)] = torch.stack([self._maxima[name] for name in names])
        dist.all_reduce(slots, op=dist.ReduceOp.MAX, group=group)
        return slots.tolist()

    def _adopt_union(self, group: dist.ProcessGroup) -> None:
        """Take over the names that other ranks recorded, so that this and later intervals agree."""
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (self._layout(), sorted(self._maxima)), group=group)
        for layout, maxima in gathered:
            for name, (shape, ratio) in layout.items():
                self._accumulators(name, shape, ratio)
            for name in maxima:
                self.add_max(name, -torch.inf)

    def _pack(self) -> Tensor:
        parts = []
        for name in sorted(self._sums):
            parts += [part.reshape(-1) for part in self._sums[name].parts]
        if not parts:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        return torch.cat(parts)

    def _unpack(self, packed: Tensor) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}
        start = 0
        for name, (shape, ratio) in self._layout().items():
            size = math.prod(shape)
            parts = []
            for _ in range(1 + ratio):
                parts.append(packed[start : start + size].reshape(shape))
                start += size
            sums[name] = Sums(*parts)
        return sums

    def _clear(self) -> None:
        for sums in self._sums.values():
            for part in sums.parts:
                part.zero_()
        for value in self._maxima.values():
            value.fill_(-torch.inf)


def divide(ratios: Pairs) -> Values:
    """numerator / denominator of each pair; NaN where the denominator is 0."""
    return {
        name: torch.where(denominator == 0, torch.nan, numerator / denominator).tolist()
        for name, (numerator, denominator) in ratios.items()
    }


def _numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
