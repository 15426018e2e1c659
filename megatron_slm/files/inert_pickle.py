"""Read a pickle without making what it names: its objects come back as records of what they were
made from.

No torch.

A pickle is a program: it may name any function of any module and call it. Here a name has to be on
the reader's list, and what it gets is not the class of that name but a fresh `Record` type, so
nothing that a pickle names is ever called, and no class of the program can be changed by it. The
reader builds the real objects from the records, field by field.
"""

import io
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_slm.files.plain import shown


class UnsafeFile(ValueError):
    """A file names something that could run code."""


class Record:
    """An object that a pickle describes: `name` is its class (or function), `args` it was called
    with, `state` it was given.
    """

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        made = object.__new__(cls)
        made.args = args
        made.state = None
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def __init__(
        self, data: bytes, names: Collection[str], known: Mapping[str, Any], path: str | Path
    ):
        super().__init__(io.BytesIO(data))
        self._names = names
        self._known = known
        self._path = path
        self._types: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in self._known:
            return self._known[full_name]
        refuse_names({full_name} - set(self._names), self._path)
        return self._types.setdefault(full_name, type("Record", (Record,), {"name": full_name}))

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside the file")


def load_inert(
    data: bytes, names: Collection[str], path: str | Path, *, known: Mapping[str, Any] = {}
) -> Any:
    """Plain Python values and Records, from a pickle that names nothing but `names` and `known`.

    `known` maps names to immutable values that are handed out as they are (dtypes, say). UnsafeFile
    names any other name in the pickle, ValueError is raised if it is no pickle; both name `path`.
    """
    try:
        return _Reader(data, names, known, path).load()
    except UnsafeFile:
        raise
    except Exception as error:  # a damaged pickle raises whatever its next byte happens to mean
        raise ValueError(
            f"{path}: not readable ({type(error).__name__}: {shown(error)}); copy the file again"
        ) from None


def refuse_names(refused: Collection[str], path: str | Path) -> None:
    """UnsafeFile unless `refused`, the names in a file that are not allowed there, is empty."""
    if refused:
        names = [shown(name) for name in sorted(refused)]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UnsafeFile(
            f"{path}: refused, because it names {listed}: loading it could run code, and a "
            "checkpoint holds plain data only. Use a checkpoint from a source that you trust"
        )
