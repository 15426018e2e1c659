"""The known name that a user probably meant."""

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known name that is nearest to a word, or None where none is near."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return near[0] if near else None


def did_you_mean(word: object, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean PREFIXname?` for the nearest of the known names; empty where none is near."""
    near = nearest(word, known)
    return f"did you mean {prefix}{near}?" if near else ""
