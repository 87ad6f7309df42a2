"""Asking the Hugging Face hub whether it is there, without waiting long."""

from __future__ import annotations

import threading

SECONDS = 8.0


class Unreachable(RuntimeError):
    """No answer from the hub; the text says why."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def status_of(url: str) -> int:
    """The status of one HEAD request. Looking up a name knows no timeout, so a thread does it."""
    from huggingface_hub.utils import get_session

    outcome: list[int | str] = []

    def ask() -> None:
        try:
            outcome.append(int(get_session().head(url, timeout=SECONDS / 2).status_code))
        except Exception as error:  # noqa: BLE001  whatever the reason, there is no hub
            outcome.append(first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    found = outcome[0] if outcome else f"no answer in {SECONDS:g} s"
    if isinstance(found, str):
        raise Unreachable(found)
    return found
