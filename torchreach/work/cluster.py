"""Work on the machines of a Ray cluster: which tasks are under way, what comes back, and what is to be done without.

Tasks are Ray's: it places them, carries what they need and, where a worker or a machine is lost, runs its task again;
a task is a function of its arguments alone, so that this is the same as if nothing had happened. Here are only the
bounds on it: so many tasks are in flight, and at the end of the time, or at Ctrl-C, those are told to stop and given a
moment to hand in what is certified so far.

Ray carries arguments and results between its own processes in its own way, pickled; nothing of that is kept.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from torchreach.core.clock import Clock
from torchreach.core.errors import OptionError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between two looks at the clock
GRACE = 5.0  # seconds for tasks to hand in what they have
IN_FLIGHT = 2  # tasks for each worker, so that none waits for the next one
RETRIES = 3  # of a task whose worker died


class Cluster:
    """The cluster that this process is a driver of. gpus: of each task; workers: tasks that run at once."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        resources = ray.cluster_resources()
        self.gpus = 1 if resources.get("GPU", 0) >= 1 else 0
        self.workers = max(int(resources.get("GPU" if self.gpus else "CPU", 1)), 1)

    @staticmethod
    def of(address: str | None) -> Cluster | None:
        """The cluster at an address: "auto" (the one that this machine is part of), "local" (processes of this machine
        alone), or "host:port"; the one that this process is connected to already, whatever the address. None: None.

        Raises: OptionError: Ray is not installed, or no cluster is there.
        """
        if address is None:
            return None
        if importlib.util.find_spec("ray") is None:
            raise OptionError(f"ray={address!r} needs Ray: pip install 'torchreach[ray]'")
        # Workers have this installation; where a script is started by `uv run` Ray would make another one for each.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray = importlib.import_module("ray")
        if not ray.is_initialized():
            try:
                ray.init(address, include_dashboard=False if address == "local" else None, logging_level="WARNING")
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise OptionError(f"ray={address!r}: no cluster there: {reason}") from None
        return Cluster(ray)

    def shared(self, value: Any) -> Any:
        """What many tasks are given, sent to each machine once."""
        return self.ray.put(value)

    def done(
        self, task: Callable[..., Any], take: Callable[[], tuple[Any, tuple[Any, ...]] | None], clock: Clock
    ) -> Iterator[tuple[Any, Any]]:
        """(key, result) of tasks as they come, in any order; `take` gives the next one's (key, arguments), or None.

        It is asked again after each result, and no more once the clock is over. A result is None of a task that did
        not end in time. A worker that dies costs the task that it had. Raises: what a task raises by itself.
        """
        ray = self.ray
        remote = ray.remote(num_cpus=0 if self.gpus else 1, num_gpus=self.gpus, max_retries=RETRIES)(task)
        flying: dict[Any, Any] = {}
        stopped: Clock | None = None
        try:
            while True:
                while stopped is None and len(flying) < IN_FLIGHT * self.workers:
                    one = take()
                    if one is None:
                        break
                    flying[remote.remote(*one[1])] = one[0]
                if not flying or (stopped is not None and stopped.over):
                    break
                ready, _ = ray.wait(list(flying), num_returns=1, timeout=POLL_SECONDS)
                for ref in ready:
                    yield flying.pop(ref), self._result(ref)
                if clock.over and stopped is None:
                    stopped = clock.grace(GRACE)
                    for ref in flying:
                        ray.cancel(ref, force=False, recursive=False)
            for key in flying.values():
                yield key, None
        finally:
            for ref in flying:
                ray.cancel(ref, force=True)

    def _result(self, ref: Any) -> Any:
        errors = self.ray.exceptions
        lost = errors.TaskCancelledError, errors.WorkerCrashedError, errors.OutOfMemoryError
        try:
            return self.ray.get(ref)
        except errors.RayTaskError as error:
            if not isinstance(error.cause, (*lost, KeyboardInterrupt)):
                raise error.cause from None  # as if it had been raised here
            cause: BaseException = error.cause
        except lost as error:
            cause = error
        log.warning("a unit has no result: %s", type(cause).__name__)
        return None
