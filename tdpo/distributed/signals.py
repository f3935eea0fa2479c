"""Signals that ask a run to end: noted here, acted on at the next step boundary."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Optional

from tdpo.distributed.world import World
from tdpo.utils import Stopped

# What schedulers send before they take a machine away, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """While entered, STOP_SIGNALS are noted in `received` (0 for none); a second Ctrl-C interrupts at once.

    Args:
        world: the processes that end together.
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
        """Raise Stopped on all ranks together, if one of them was sent a signal."""
        (signum,) = self.world.maximum(self.received)
        if signum:
            raise Stopped(signum)

    def _note(self, signum: int, frame: Optional[FrameType]) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum


@contextmanager
def forwarded(send: Callable[[int], None]) -> Iterator[list[int]]:
    """While entered, STOP_SIGNALS go on to the processes that this one waits for, which save and end.

    Args:
        send: sends a signal to them.

    Yields:
        the signals that came.
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
