"""Record sums and counts on the device; reduce them over ranks once per log interval.

A ratio is recorded as two sums and divided once, after the reduction: token selection makes the count differ in every
micro-batch and rank, so a mean of means would be wrong (docs/method.md#point-4).
Nothing here waits for the device before `reduce`.

Which ranks: the losses exist only on the last pipeline stage. Every rank may call `reduce(groups.dp_cp)`; the reduction
stays inside that stage's data x context parallel ranks (tensor ranks hold copies), and the last rank of the world,
which writes the sinks, is one of the last stage's. No value has to travel between stages.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Values = dict[str, float | list[float]]

MAXIMUM_SLOTS = 62
"""Most `add_max` metrics: the tensor of maxima has a fixed size, so that it can also carry the layout check."""


class Metrics:
    """Accumulates named metrics of one log interval.

    Equals, for each name, in one process that saw every rank's tokens: add -> sum(numerators) / sum(denominators);
    add_sum -> sum(values); add_max -> max(values). Accumulation is float64 on `device`. Names carry their unit
    (_nats, _fraction, _seconds, ...).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sums: dict[
            str, tuple[torch.Tensor, torch.Tensor | None]
        ] = {}  # name -> numerator [n], denominator [n] or None
        self._maxima: dict[str, torch.Tensor] = {}  # name -> 0-d
        self._folded: dict[
            str, tuple[torch.Tensor, torch.Tensor | None]
        ] = {}  # on the CPU, already summed over ranks
        self._folded_maxima: dict[str, float] = {}

    def declare(self, *names: str, length: int | None = None) -> None:
        """Announce ratios (scalars, or `length` values each) that this rank may leave out of an interval.

        A declared metric that no rank records is left out of the result. Ranks that disagree without declaring still
        reduce correctly, at the cost of one exchange of names.
        """
        for name in names:
            self._accumulators(name, () if length is None else (length,), ratio=True)

    def add(self, name: str, numerator, denominator=1) -> None:
        """Record a ratio as two sums: scalars (0-d tensors or numbers) or 1-D tensors (one ratio per element).

        A scalar denominator beside a 1-D numerator counts for every element. Tensors are detached, never synchronised.
        """
        shape = max(_shape(name, numerator), _shape(name, denominator))
        total, count = self._accumulators(name, shape, ratio=True)
        total.add_(self._value(numerator))
        count.add_(self._value(denominator))

    def add_all(self, measured: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Record many (numerator, denominator) pairs, such as those of `selection.diagnostics.describe`."""
        for name, (numerator, denominator) in measured.items():
            self.add(name, numerator, denominator)

    def add_sum(self, name: str, value) -> None:
        """Record a total over micro-batches, steps and ranks, such as a number of tokens (scalar or 1-D)."""
        total, _ = self._accumulators(name, _shape(name, value), ratio=False)
        total.add_(self._value(value))

    def add_max(self, name: str, value) -> None:
        """Record a scalar whose largest value over the interval and the ranks counts."""
        if _shape(name, value):
            raise ValueError(
                f"metric {name!r}: add_max takes a scalar, got a vector of shape {_shape(name, value)}"
            )
        if name not in self._maxima:
            if len(self._maxima) == MAXIMUM_SLOTS:
                raise ValueError(
                    f"metric {name!r} would be the {MAXIMUM_SLOTS + 1}th maximum; at most {MAXIMUM_SLOTS} fit"
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
        """The interval's values over the ranks of `group` (None = this rank alone); starts the next interval.

        Every rank of the group must call it. Two collectives: MAX of 64 float64, then SUM of one packed tensor. The only
        place that waits for the device. A metric nobody recorded is left out; an element with count 0 beside others is NaN.

        summarise: forms the values of the ratios from their reduced (sum, count) pairs, float64 on the CPU, in place of the
        plain division: `selection.diagnostics.summarise` turns its histograms into rates this way.
        """
        self.fold(group)
        ratios = {
            name: (total, count)
            for name, (total, count) in self._folded.items()
            if count is not None and count.any()
        }
        totals = {
            name: total.tolist() for name, (total, count) in self._folded.items() if count is None
        }
        values = (
            (summarise or divide)(ratios)
            | totals
            | {name: value for name, value in self._folded_maxima.items() if value > -math.inf}
        )
        self._folded, self._folded_maxima = {}, {}
        return values

    def fold(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum over the ranks what was recorded so far, without ending the interval; every rank of the group must call it."""
        maxima = self._reduce_maxima(group)
        packed = self._pack()
        if group is not None:
            dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
        for name, (total, count) in self._unpack(packed.cpu()).items():
            before = self._folded.get(name)
            self._folded[name] = (
                (total, count)
                if before is None
                else (before[0] + total, None if count is None else before[1] + count)
            )
        for name, value in maxima.items():
            self._folded_maxima[name] = max(value, self._folded_maxima.get(name, -math.inf))
        self._clear()

    def state_dict(self, group: dist.ProcessGroup | None = None) -> dict:
        """The interval so far, over all ranks, as plain numbers for a checkpoint taken between two log lines.

        Folds first, in every run that saves here, so that a resumed run adds the same numbers in the same order as an
        uninterrupted one and logs the same line.
        """
        self.fold(group)
        return {
            "sums": {
                name: [total.tolist(), None if count is None else count.tolist()]
                for name, (total, count) in self._folded.items()
            },
            "maxima": {
                name: value for name, value in self._folded_maxima.items() if value > -math.inf
            },
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continue the interval a checkpoint cut; what this recorder held is dropped. Every rank loads the same state."""
        self._clear()
        self._folded = {
            name: (_numbers(total), None if count is None else _numbers(count))
            for name, (total, count) in state["sums"].items()
        }
        self._folded_maxima = dict(state["maxima"])

    def _accumulators(
        self, name: str, shape: tuple[int, ...], ratio: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if name not in self._sums:
            zeros = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self._sums[name] = (zeros, torch.zeros_like(zeros) if ratio else None)
        total, count = self._sums[name]
        if total.shape != shape or (count is not None) != ratio:
            raise ValueError(
                f"metric {name!r} was first a {_kind(total.shape, count is not None)}, "
                f"now it is a {_kind(shape, ratio)}; give the two different names"
            )
        return total, count

    def _value(self, value):
        """Numbers stay numbers (a kernel argument: no copy, no wait); tensors become float64 on this device."""
        if torch.is_tensor(value):
            return value.detach().to(device=self.device, dtype=torch.float64, non_blocking=True)
        return float(value)

    def _layout(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        return {
            name: (tuple(total.shape), count is not None)
            for name, (total, count) in sorted(self._sums.items())
        }

    def _reduce_maxima(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """MAX over ranks; slots 0 and 1 tell whether all ranks pack the same layout, before the packed sizes meet."""
        if group is None:
            return {name: value.item() for name, value in self._maxima.items()}
        reduced = self._all_reduce_max(group)
        if (
            reduced[0] != -reduced[1]
        ):  # max(hash) != min(hash): some rank recorded a metric that another did not
            self._adopt_union(group)
            reduced = self._all_reduce_max(group)
        # Behind the last name there are unused slots.
        return dict(zip(sorted(self._maxima), reduced[2:], strict=False))

    def _all_reduce_max(self, group: dist.ProcessGroup) -> list[float]:
        names = sorted(self._maxima)
        slots = torch.full(
            (MAXIMUM_SLOTS + 2,), -torch.inf, dtype=torch.float64, device=self.device
        )
        layout_hash = _layout_hash(self._layout(), names)
        slots[0], slots[1] = layout_hash, -layout_hash
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

    def _pack(self) -> torch.Tensor:
        parts = [
            part.reshape(-1)
            for name in sorted(self._sums)
            for part in self._sums[name]
            if part is not None
        ]
        return (
            torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=self.device)
        )

    def _unpack(self, packed: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        sums: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        start = 0
        for name, (shape, ratio) in self._layout().items():
            size = math.prod(shape)
            total, start = packed[start : start + size].reshape(shape), start + size
            count = None
            if ratio:
                count, start = packed[start : start + size].reshape(shape), start + size
            sums[name] = (total, count)
        return sums

    def _clear(self) -> None:
        for parts in self._sums.values():
            for part in parts:
                if part is not None:
                    part.zero_()
        for value in self._maxima.values():
            value.fill_(-torch.inf)


def divide(ratios: Pairs) -> Values:
    """numerator / denominator of each pair; NaN where the denominator is 0."""
    return {
        name: torch.where(denominator == 0, torch.nan, numerator / denominator).tolist()
        for name, (numerator, denominator) in ratios.items()
    }


def _numbers(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _shape(name: str, value) -> tuple[int, ...]:
    if not torch.is_tensor(value):
        return ()
    if value.dim() > 1:
        raise ValueError(
            f"metric {name!r} got a tensor of shape {tuple(value.shape)}; record a scalar or a 1-D tensor"
        )
    return tuple(value.shape)


def _kind(shape: tuple[int, ...], ratio: bool) -> str:
    return f"{'ratio' if ratio else 'sum'} of {f'{shape[0]} values' if shape else 'one value'}"


def _layout_hash(layout: Mapping, maxima: Iterable[str]) -> int:
    """52 bits of the layout's hash: exact in float64."""
    return (
        int.from_bytes(hashlib.sha256(repr((layout, list(maxima))).encode()).digest()[:8], "big")
        >> 12
    )
