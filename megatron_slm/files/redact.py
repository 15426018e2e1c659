"""Text without the secrets that addresses, tokens and the environment may bring into it.

Messages of libraries quote addresses (a proxy's with its password, a repository's with a token),
and commands may name a token. Such text goes to logs, to versions.txt and to other services.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SECRET_NAMES = re.compile(
    r"(API_?KEY|ACCESS_?KEY|TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?)$", re.IGNORECASE
)
SHORTEST_SECRET = 8
"""Shorter values of such variables are words like "true" or "none", which stand in every text."""
IN_ADDRESSES = re.compile(r"(?<=://)[^\s/@'\"]+@")
IN_QUERIES = re.compile(r"([?&][\w.-]*(?:key|token|secret|password|signature)=)[^&\s'\"]+", re.I)
KNOWN_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})"
)


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with passwords in addresses, well-known tokens, and the values of variables of
    `environment` (default: the process's) that are named like a secret, as ***.
    """
    environment = os.environ if environment is None else environment
    text = IN_ADDRESSES.sub(HIDDEN + "@", text)
    text = IN_QUERIES.sub(rf"\1{HIDDEN}", text)
    text = KNOWN_TOKENS.sub(HIDDEN, text)
    for name, value in environment.items():
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return text


def redacted_values(value: Any) -> Any:
    """The same in every text of nested mappings and lists; other values as they are."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {name: redacted_values(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_values(part) for part in value]
    return value
