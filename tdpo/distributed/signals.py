"""Signals that ask a run to stop: recorded when they arrive, acted on at the next check, for example between steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Optional

from tdpo.distributed.world import World
from tdpo.utils import Stopped

# Schedulers send the first two before they take a machine away; Ctrl-C sends the third.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """A context that records STOP_SIGNALS in `received` (0: none yet) instead of ending the process; a second Ctrl-C interrupts at once.

    Args:
        world: the processes that stop together.
    """

    def __init__(self, world: World):
        self.world, self.received = world, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.signal(signum, self._note) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise Stopped on all ranks if any of them received a signal. Called by all ranks."""
        (signum,) = self.world.maximum(self.received)
        if signum:
            raise Stopped(signum)

    def _note(self, signum: int, frame: Optional[FrameType]) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum


@contextmanager
def forwarded(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Within the context, forward STOP_SIGNALS to the processes that this one waits for, so that they save and exit.

    Args:
        send: sends a signal, given by its number, to those processes.

    Yields:
        a list to which each received signal is appended.
    """
    received: list[int] = []

    def forward(signum: int, frame: Optional[FrameType]) -> None:
        received.append(signum)
        send(signum)

    before = {signum: signal.signal(signum, forward) for signum in STOP_SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
