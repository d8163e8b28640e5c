"""Flower's pool of Ray actors, with a new actor for one that died and an end for one that hangs.

Flower's own puts a dead actor back, which then fails every message at once, and waits for ever for one that hangs. Importing
this file puts this pool in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.ray_transport.ray_actor import BasicActorPool

from fedtune.federation.engines.ray import GRACE_S, LOADING_S, TIMEOUT

App = Any
"""What an actor runs: a ClientApp that has, beside its call, `load(message, context)`."""


class LastingPool(BasicActorPool):
    """A pool that is as large at the end of a run as at its start."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._jobs: dict[Any, tuple[Any, Any, Message, Context]] = {}

    def submit(self, actor_fn: Any, job: tuple[Callable[[], App], Message, str, Context]) -> Any:
        """Give a free actor a message; the base is loaded first, in a call of its own, as that is not the client's time."""
        actor: Any = self.pool.pop()
        app_fn, message, partition, context = job
        loaded = actor.run.remote(partial(_loader, app_fn), None, partition, context)
        future = actor_fn(actor, *job)
        self._future_to_actor[future] = actor
        self._jobs[future] = actor, loaded, message, context
        return future

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> tuple[Message, Context]:
        """Wait for the reply; a client whose process ends or does not answer in time gets one that says so."""
        actor, loaded, message, context = self._jobs.pop(future)
        timeout_s = float(context.run_config[TIMEOUT])
        try:
            ray.get(loaded, timeout=LOADING_S)
            _, reply, context = ray.get(future, timeout=timeout_s + GRACE_S)
        except ray.exceptions.GetTimeoutError:
            reason = f"no reply within {timeout_s:g} s"
        except ray.exceptions.RayTaskError:
            raise  # from the ClientApp: the actor is well, and Flower puts it back
        except ray.exceptions.RayError:
            reason = "its process ended: killed, or out of memory"
        else:
            self.add_actor_back_to_pool(future)
            return reply, context
        ray.kill(actor)
        self._future_to_actor[future] = self.create_actor_fn()  # type: ignore[no-untyped-call]
        self.add_actor_back_to_pool(future)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message), context


def _loader(app_fn: Callable[[], App]) -> Callable[..., None]:
    load: Callable[..., None] = app_fn().load
    return load


# RayBackend looks its pool up under this name when a run starts, which is after it has loaded the run's ClientApp.
raybackend.BasicActorPool = LastingPool  # type: ignore[attr-defined]
