"""Steps of a frontier in threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from torchreach.work.frontier import Frontier


class Threads:
    """Runs steps of a frontier: on the CPU in as many threads as torch has, one operation per thread.

    Operations here are too small to be worth splitting: torch's own threads would spend their time waiting
    for each other. Chunks are independent, so threads take one each; only this object touches the frontier.
    """

    def __init__(self, frontier: Frontier) -> None:
        self.frontier = frontier
        self.running: dict[Future[list[Any]], Any] = {}
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Threads:
        self.threads = torch.get_num_threads()
        if self.frontier.workers > 1:
            torch.set_num_threads(1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        if self.frontier.workers > 1:
            torch.set_num_threads(self.threads)

    def start(self, step: Callable[..., list[Any]], *args: Any) -> bool:
        """Give every free thread a chunk, and put back what has been done since.

        Returns False if there was no memory to start a step and none is running.
        """
        frontier = self.frontier
        if frontier.workers == 1:
            chunk = frontier.begin()
            if chunk is None:
                return False
            frontier.settle(chunk, step(chunk, *args))
            return True
        if self.pool is None:
            self.pool = ThreadPoolExecutor(frontier.workers, initializer=torch.set_num_threads, initargs=(1,))
        while frontier.open and len(self.running) < frontier.workers:
            chunk = frontier.begin(frontier.workers - len(self.running))
            if chunk is None:
                break
            self.running[self.pool.submit(torch.no_grad()(step), chunk, *args)] = chunk
        if not self.running:
            return False
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        for future in done:
            frontier.settle(self.running.pop(future), future.result())
        return True

    def finish(self) -> None:
        """Wait for what is running, and put it back."""
        while self.running:
            future, chunk = self.running.popitem()
            self.frontier.settle(chunk, future.result())

    def stop(self) -> None:
        """Finish, and end the threads; `start` starts them again."""
        self.finish()
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None
