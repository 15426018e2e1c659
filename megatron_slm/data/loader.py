"""Global batches of samples, cut into each rank's micro-batches; resumed by seeking.

The samples of a step are n .. n + global_batch_size - 1 of the dataset, whatever the layout. Sample
g of the step goes to

    micro-batch m, data-parallel rank r, row j   with   g = (m x dp_size + r) x micro_batch_size + j

So micro-batch m of all ranks together is one contiguous slice of the global batch, and a change of
data-parallel size or of micro-batch size loses and repeats nothing. The state is one number:
samples consumed.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from megatron_slm.data.batch import Batch, collate, masked_sample
from megatron_slm.data.indexed import CorpusIndex

Step = list[Batch]


class SampleSource(Protocol):
    """What the loaders read: a ScoredDataset or a blend of several."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...
    def __len__(self) -> int: ...
    def pieces(self, index: int) -> tuple[int, list[tuple[int, int]]]: ...


def check_layout(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Micro-batches per step and rank; ValueError when the sizes do not divide."""
    if (
        micro_batch_size < 1
        or global_batch_size < 1
        or global_batch_size % (micro_batch_size * dp_size)
    ):
        raise ValueError(
            f"data.global_batch_size is {global_batch_size}; it must be a positive multiple of "
            f"micro_batch_size x data-parallel size = {micro_batch_size} x {dp_size} = "
            f"{micro_batch_size * dp_size}."
        )
    return global_batch_size // (micro_batch_size * dp_size)


def rank_indices(
    microbatches: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Indices in the global batch of each of this rank's micro-batches."""
    starts = [(m * dp_size + dp_rank) * micro_batch_size for m in range(microbatches)]
    return [list(range(start, start + micro_batch_size)) for start in starts]


class TrainingLoader:
    """This rank's micro-batches, one global batch per call of `next_step`; reads ahead in a thread.

    Reading ahead does not affect the state: `state_dict` counts only steps that were returned.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_sample: int = 0,
        prefetch_steps: int = 2,
    ):
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.prefetch_steps = prefetch_steps
        microbatches = check_layout(global_batch_size, micro_batch_size, dp_size)
        self.indices = rank_indices(microbatches, micro_batch_size, dp_rank, dp_size)
        self.consumed_samples = start_sample
        self._reader: _Reader | None = None

    def next_step(self) -> Step:
        step = self._reading().get()
        self.consumed_samples += self.global_batch_size
        return step

    def fault(self) -> ValueError | OSError | None:
        """Why the next step cannot be read; None = it can. Waits for the step, but does not return
        it.
        """
        step = self._reading().wait()
        return step if isinstance(step, (ValueError, OSError)) else None

    @property
    def ready_steps(self) -> int:
        """How many of the next steps are in memory, so that no fault of storage can affect them."""
        return self._reading().ready()

    def _reading(self) -> "_Reader":
        if self._reader is None:
            self._reader = _Reader(
                self.read_step, self.consumed_samples, self.global_batch_size, self.prefetch_steps
            )
        return self._reader

    def corpus_index(self, number: int) -> CorpusIndex:
        """The index of corpus `number` of the data."""
        return getattr(self.dataset, "datasets", [self.dataset])[number].corpus_index

    def state_dict(self) -> dict[str, int]:
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after `consumed_samples`, also under another layout or batch size."""
        self.close()
        self.consumed_samples = state["consumed_samples"]

    def close(self) -> None:
        """Stop reading ahead; the next `next_step` starts again where the last one ended."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def read_step(self, first_sample: int) -> Step:
        """This rank's micro-batches of the global batch that begins with a sample.

        The state of the loader stays.
        """
        step = []
        for rows in self.indices:
            samples = [self.dataset[first_sample + g] for g in rows]
            step.append(collate(samples, rows))
        return step


class ValidationLoader:
    """The same global batches at every validation: iterate to get this rank's micro-batches of
    each.

    global_batches = 0 reads the whole corpus; the last global batch is then filled up with samples
    in which no token counts, so that every rank runs the same number of micro-batches. A corpus
    smaller than the requested batches is read once.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        global_batches: int = 0,
    ):
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.indices = rank_indices(
            check_layout(global_batch_size, micro_batch_size, dp_size),
            micro_batch_size,
            dp_rank,
            dp_size,
        )
        whole = -(-len(dataset) // global_batch_size)
        self.global_batches = min(global_batches, whole) if global_batches else whole

    def __len__(self) -> int:
        return self.global_batches

    def __iter__(self) -> Iterator[Step]:
        filler = masked_sample(self.dataset[0])
        for first in range(0, self.global_batches * self.global_batch_size, self.global_batch_size):
            yield [self._micro_batch(first, rows, filler) for rows in self.indices]

    def _micro_batch(self, first: int, rows: list[int], filler: dict[str, np.ndarray]) -> Batch:
        end = len(self.dataset)
        samples = [self.dataset[first + g] if first + g < end else filler for g in rows]
        return collate(samples, rows)


class _Reader:
    """Calls `read(sample)` for sample = start, start + stride, ... in a thread.

    At most `depth` steps wait to be handed out, and one more is being read; the one that `wait`
    took from the queue is not among them.
    """

    def __init__(self, read: Callable[[int], Step], start: int, stride: int, depth: int):
        self._next: Step | BaseException | None = None
        self._queue: queue.Queue[Step | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(read, start, stride), name="read-ahead", daemon=True
        )
        self._thread.start()

    def wait(self) -> Step | BaseException:
        """The next step, or why there is none."""
        if self._next is None:
            self._next = self._queue.get()
        return self._next

    def ready(self) -> int:
        """Steps that `get` would hand out without waiting."""
        with self._queue.mutex:
            waiting = [self._next, *self._queue.queue]
        return sum(isinstance(step, list) for step in waiting)

    def get(self) -> Step:
        step = self.wait()
        if isinstance(step, BaseException):
            raise step  # every later call raises it again, instead of waiting for ever
        self._next = None
        return step

    def close(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # frees a slot, so that a waiting put returns
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _run(self, read: Callable[[int], Step], sample: int, stride: int) -> None:
        while not self._stopped.is_set():
            try:
                step = read(sample)
            except BaseException as error:
                self._queue.put(error)
                return
            self._queue.put(step)
            sample += stride
