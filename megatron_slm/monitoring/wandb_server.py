"""Whether a Weights & Biases server can be used: an API key for it, and an answer from it."""

import contextlib
import netrc
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

ANSWER_SECONDS = 3.0
BAD_GATEWAYS = (502, 503, 504)
"""Status codes of a proxy that cannot reach the server behind it."""


def choose_mode(mode: str, environment: Mapping[str, str] | None = None) -> str:
    """auto = WANDB_MODE where it is set, else online when there is an API key (WANDB_API_KEY or
    netrc), else offline.
    """
    environment = os.environ if environment is None else environment
    if mode != "auto":
        return mode
    if environment.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return environment["WANDB_MODE"]
    return "online" if _has_api_key(environment) else "offline"


def _has_api_key(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    candidates = [Path.home() / ".netrc", Path.home() / "_netrc"]
    if named := environment.get("NETRC"):
        candidates = [Path(named)]
    for path in candidates:
        # Absent, unreadable or malformed: as good as no key.
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if host and netrc.netrc(str(path)).authenticators(host):
                return True
    return False


def unreachable(address: str, proxies: Mapping[str, str], seconds: float = ANSWER_SECONDS) -> str:
    """Why no server answers HTTP at `address` within `seconds`; "" when one does.

    wandb itself would try for 45 seconds, in which no step is trained. proxies: by scheme, in
    addition to those of the environment. Every answer except those in BAD_GATEWAYS counts, a
    refused certificate too: wandb has settings for certificates, and reports a wrong key itself.
    """
    answer = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(urllib.request.getproxies() | dict(proxies))
        )
        try:
            opener.open(address, timeout=seconds).close()
            answer[0] = ""
        except urllib.error.HTTPError as error:
            answer[0] = f"HTTP {error.code}" if error.code in BAD_GATEWAYS else ""
        except Exception as error:  # OSError, ValueError, or an exception of http.client
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                answer[0] = ""
            elif not isinstance(reason, TimeoutError):  # that is said above already
                answer[0] = str(reason) or type(reason).__name__

    # A thread, because a DNS lookup has no time limit, and each read has a limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answer[0]
