"""Asks the hub within a deadline, with patience where it is busy, and says what its refusals mean."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fedtune.errors import MissingError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

DEADLINE_S = 8.0
"""Longest wait for an answer; `HF_HUB_ETAG_TIMEOUT`, the hub client's own variable, sets another."""

WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Waits between the tries of one call, where the hub names none itself."""
LONGEST_WAIT_S = 300.0
"""A hub that asks for more patience than this is taken for one that refuses."""
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
"""Statuses worth another try; 409 and 412 say that another commit came first."""
LOG_IN = "Log in with `hf auth login`."

T = TypeVar("T")


class UnreachableError(Exception):
    """The hub gave no usable answer; the text says why, to follow "and"."""


def ask(question: Callable[[], T]) -> T:
    """Return `question()`, a call to the hub.

    Raises:
        UnreachableError: no answer before the deadline, no network, or no hub at the address.
        HfHubHTTPError: the hub answered with an error.
        HFValidationError: the question holds what cannot be the name of a repository.
    """
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    answers: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(question())
        except Exception as error:
            answers.put(error)

    # A thread, because neither name resolution nor a slow trickle of bytes minds the HTTP client's timeouts; a daemon,
    # so that a hanging one does not keep the process alive.
    threading.Thread(target=work, name="hub-question", daemon=True).start()
    hub = constants.ENDPOINT
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if os.environ.get("HF_HUB_ETAG_TIMEOUT") else DEADLINE_S
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise UnreachableError(f"{hub} did not answer within {seconds:g} s") from None
    if isinstance(answer, RevisionResolutionError) and isinstance(answer.__cause__, HfHubHTTPError):
        raise answer.__cause__
    if isinstance(answer, HfHubHTTPError | HFValidationError):
        raise answer
    if isinstance(answer, Exception):
        if constants.is_offline_mode():
            raise UnreachableError("HF_HUB_OFFLINE keeps the hub out") from answer
        if isinstance(answer, RevisionResolutionError | httpx.HTTPError | OSError):
            raise UnreachableError(f"{hub} cannot be reached") from answer
        raise UnreachableError(f"what answers at {hub} is no hub ({type(answer).__name__})") from answer
    return answer


def ask_about(kind: str, name: str, question: Callable[[], T], revision: str | None = None) -> T:
    """Return `question()`, a call to the hub about `name`, which is a `kind`: "base model", "adapter" or "data set".

    Raises:
        UnreachableError: as `ask` does, and for an error of the hub's own.
        MissingError: there is no such repository or revision, it is gated, or the token is refused.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return ask(question)
    except HFValidationError:
        raise MissingError(
            f"{name!r} is neither a folder nor a name on the hub.", hint="What is on the hub is named owner/name."
        ) from None
    except HfHubHTTPError as error:
        raise _meaning(error, kind, name, revision) from error


def _meaning(error: HfHubHTTPError, kind: str, name: str, revision: str | None) -> MissingError | UnreachableError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"at {constants.ENDPOINT}"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):  # before its parent, RepositoryNotFoundError
        return MissingError(
            f"The {kind} {name} {where} is gated: its owner must let you in.",
            hint=f"Ask for access at {page}, then log in with `hf auth login`.",
        )
    if isinstance(error, RevisionNotFoundError):
        return MissingError(f"The {kind} {name} {where} has no revision {revision}.", hint=f"See {page}/commits/main.")
    # Without a token the hub answers 401 for what does not exist and for what is private alike.
    bad_token = "credentials" in error.response.headers.get("X-Error-Message", "")
    if isinstance(error, RepositoryNotFoundError) or status == 404 or (status == 401 and not bad_token):
        return MissingError(
            f"There is no {kind} {name} {where}, or it is private.",
            hint=f"Check the name. {LOG_IN[:-1]} if it is private.",
        )
    if status in (401, 403):
        return MissingError(f"The hub {where} refuses your token for the {kind} {name} ({status}).", hint=LOG_IN)
    return UnreachableError(f"{constants.ENDPOINT} answers with status {status}")


def patiently(call: Callable[[], T]) -> T:
    """Return `call()`, tried again where the hub was busy or the line broke; raise what the last try raised."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    for wait_s in WAITS_S:
        try:
            return call()
        except (HfHubHTTPError, httpx.TransportError, UnreachableError) as error:
            pause_s = _pause_s(error, wait_s)
            if pause_s is None:
                raise
            time.sleep(pause_s)
    return call()


def _pause_s(error: Exception, wait_s: float) -> float | None:
    """Return how long to wait before another try, None where none is worth while."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    cause = error.__cause__ if isinstance(error, UnreachableError) else error
    if isinstance(cause, HfHubHTTPError):
        if cause.response.status_code not in PASSING:
            return None
        headers = cause.response.headers
        limit = parse_ratelimit_headers(headers)
        if limit is not None and limit.remaining == 0:
            wait_s = limit.reset_in_seconds + 1.0
        elif headers.get("Retry-After", "").isdigit():
            wait_s = float(headers["Retry-After"])
    elif isinstance(error, UnreachableError):
        return None  # no answer within the deadline: another one would be as long
    return wait_s if wait_s <= LONGEST_WAIT_S else None
