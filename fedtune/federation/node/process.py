"""Flower's SuperNode as `fedtune node` runs it: prompt, ends with its parent, and forgets a message whose run ended as it came.

Flower 1.41 creates a message's task before it has the whole message. When the run ends in between, task and message stay; what
answers them is then taken for the answer to the next run's first message, whose own answer waits for the message after
that: for ever, since a server waits for all answers before it sends more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from fedtune.federation.flower.compat import (
    Status,
    SubStatus,
    flower_supernode,
    start_client_internal,
    start_parent_process_monitor,
)

_POLL_S = 0.3
_BUSY_S = 60.0
"""For so long after a message the next one is asked for every `_POLL_S` seconds."""


def forgetting(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return Flower's `_pull_and_store_message`, cleaning up where it has pulled nothing.

    Messages come one at a time, and each is answered before the next: what is unfinished then belongs to no message.
    """

    def pull_and_forget(*, state: Any, **rest: Any) -> int | None:
        run_id = pull(state=state, **rest)
        if run_id is None:
            for task in state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
                state.finish_task(task.task_id, SubStatus.FAILED, "The run has ended.")
            state.delete_messages()
        return run_id

    return pull_and_forget


def prompt(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return `pull`, which asks again soon where the last message came a short while ago; Flower's loop waits 3 s each time.

    Where rounds take seconds, so would most of each be waiting; where they take minutes, nobody asks more often than Flower does.
    """
    last = -_BUSY_S

    def pull_promptly(**rest: Any) -> int | None:
        nonlocal last
        while (run_id := pull(**rest)) is None and time.monotonic() - last < _BUSY_S:
            time.sleep(_POLL_S)
        if run_id is not None:
            last = time.monotonic()
        return run_id

    return pull_promptly


if __name__ == "__main__":
    start_parent_process_monitor(int(sys.argv.pop(1)))
    start_client_internal._pull_and_store_message = prompt(forgetting(start_client_internal._pull_and_store_message))
    flower_supernode()
