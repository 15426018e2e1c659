"""Whether a finished output was made from the same inputs as a command has now; a second run then
has nothing to do.
"""

from collections.abc import Mapping
from typing import Any

FILE_CONTENT = frozenset({"files", "keep_if_sha256"})
"""Names under which programs note the content of files that their options name."""


class ChangedFile(ValueError):
    """A file is no longer what it was when something was made from it, or when it was made itself.

    A data file is at fault and not the command: programs end with exit code 3 instead of 2.
    """


def refuse_other_origin(
    output: object, before: Mapping[str, Any] | None, now: Mapping[str, Any], advice: str
) -> None:
    """ValueError unless `output`, which is finished, was made from `now`: inputs, options and their
    fingerprints by name. It is a ChangedFile where nothing but the content of files differs.

    before: what its manifest says it was made from; None = it does not say.
    """
    if before is None:
        raise ValueError(
            f"{output} exists already, and nothing says what it was made from. {advice}"
        )
    if before != now:
        raise origin_error(
            f"{output} exists already, made from other inputs or options:",
            before,
            now,
            "this command",
            advice,
        )


def origin_error(
    heading: str, before: Mapping[str, Any], now: Mapping[str, Any], asking: str, advice: str
) -> ValueError:
    """An error that lists in what `before` and `now` differ; a ChangedFile where nothing but the
    content of files does. `asking` is who has `now`.
    """
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    listed = [
        f"  {name}: it has {before.get(name)!r}, {asking} has {now.get(name)!r}" for name in names
    ]
    kind = ChangedFile if names and FILE_CONTENT.issuperset(names) else ValueError
    return kind("\n".join([heading, *listed, advice]))
