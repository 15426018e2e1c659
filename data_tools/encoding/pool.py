"""Worker processes that are fed through pipes; results come back in the order of the work.

Each worker has one pipe. When the parent dies, for whatever reason, the pipes close and the workers
end. When a worker dies, the parent sees its pipe close and raises WorkerDied. At most `window`
results wait for a slow one before them, which bounds memory.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerDied(Exception):
    """A worker process ended without an answer.

    It was killed, often because memory was short, or crashed in native code.
    """


def ordered_map(
    make_function: Callable[..., Callable[[Any], Any]],
    arguments: tuple,
    work: Iterable[Any],
    workers: int,
    window: int | None = None,
) -> Iterator[Any]:
    """`map(make_function(*arguments), work)` in `workers` spawned processes, in the order of
    `work`.

    A single worker runs in this process. Exceptions of a worker are raised here. `work` is consumed
    lazily.
    """
    if workers <= 1:
        yield from map(make_function(*arguments), work)
        return
    # spawn, not fork: a fork would copy locks held by this process's other threads (the progress
    # display, libraries of the caller).
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, make_function, arguments), daemon=True
            )
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        yield from _feed(connections, iter(work), window or 3 * workers)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.terminate()
                process.join()


def _feed(connections: list[Connection], work: Iterator[Any], window: int) -> Iterator[Any]:
    """Keep the workers busy; yield their results in order."""
    idle = list(connections)
    busy: dict[Connection, int] = {}
    """The number of the item that each busy worker has."""
    ready: dict[int, Any] = {}
    """Results by number that wait for an earlier one."""
    given = 0
    wanted = 0
    exhausted = False
    while True:
        while idle and not exhausted and given - wanted < window:
            try:
                item = next(work)
            except StopIteration:
                exhausted = True
                break
            connection = idle.pop()
            _send(connection, item)
            busy[connection] = given
            given += 1
        while wanted in ready:
            yield ready.pop(wanted)
            wanted += 1
        if exhausted and not busy and wanted == given:
            return
        if idle and not exhausted and given - wanted < window:
            continue
        answered = set(wait(list(busy)))
        for connection in [worker for worker in busy if worker in answered]:
            ready[busy.pop(connection)] = _receive(connection)
            idle.append(connection)


def _send(connection: Connection, item: Any) -> None:
    try:
        connection.send(item)
    except (BrokenPipeError, ConnectionResetError):
        _receive(connection)  # raises the exception that ended the worker, if it could send one
        raise WorkerDied("a worker process ended unexpectedly") from None


def _receive(connection: Connection) -> Any:
    try:
        succeeded, answer = connection.recv()
    except (EOFError, ConnectionResetError):
        raise WorkerDied(
            "a worker process ended unexpectedly (killed, perhaps for want of memory)"
        ) from None
    if not succeeded:
        raise answer
    return answer


def _serve(
    connection: Connection, make_function: Callable[..., Callable[[Any], Any]], arguments: tuple
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        function = make_function(*arguments)
        while True:
            connection.send((True, function(connection.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone or has finished
    except BaseException as error:
        try:
            connection.send((False, error))
        except Exception:  # an exception that cannot be pickled
            connection.send((False, RuntimeError(f"{type(error).__name__}: {error}")))
