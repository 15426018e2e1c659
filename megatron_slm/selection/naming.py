"""The known name that a user probably meant, for the error messages of this package."""

import difflib
from collections.abc import Iterable


def meant(word: object, known: Iterable[str]) -> str:
    """`, did you mean 'NAME'?` for the nearest of the known names; empty where none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
