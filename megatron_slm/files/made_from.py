"""Whether something finished was made from what a command would make it from: then a second run has
nothing to do.
"""

from collections.abc import Mapping
from typing import Any


def refuse_other_origin(
    output: object, before: Mapping[str, Any] | None, now: Mapping[str, Any], advice: str
) -> None:
    """ValueError unless `output`, which is finished, was made from `now`: inputs, options and their
    fingerprints by name.

    before: what its manifest says it was made from; None = it does not say.
    """
    if before is None:
        raise ValueError(
            f"{output} exists already, and nothing says what it was made from. {advice}"
        )
    different = [
        f"  {name}: it has {before.get(name)!r}, this command has {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if different:
        listed = "\n".join(different)
        raise ValueError(
            f"{output} exists already, made from other inputs or options:\n{listed}\n{advice}"
        )
