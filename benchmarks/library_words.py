"""Real text for benchmarks that is on every machine: the words of Python's standard library."""

import re
import sysconfig
from pathlib import Path

import numpy as np


def library_tokens(limit: int, vocabulary: int = 32_000) -> np.ndarray:
    """int64 ids of at most `limit` words, spaces and signs, in the order of the files.

    An id is the rank by frequency; all words beyond the `vocabulary` - 1 most frequent share the
    last one.
    """
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and len(words) < limit:
            words += re.findall(
                r"\w+|\s+|[^\w\s]", path.read_text(encoding="utf-8", errors="ignore")
            )
    _, ids, counts = np.unique(
        np.array(words[:limit], dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.minimum(rank[ids], vocabulary - 1)
