"""Which rank is gone or hangs: what a process needs to know when its collectives fail, and PyTorch does not say.

Each process shows a sign of life in the store through which all met, from a thread of its own, which a blocked collective does not stop.
"""

import faulthandler
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Optional

import torch.distributed as dist

from tdpo.distributed.world import World, is_of_a_collective
from tdpo.utils import PeerError, RunError, Stopped, get_logger

log = get_logger(__name__)

INTERVAL = 1.0  # seconds between signs of life
PATIENCE = 45.0  # seconds without one, after which a process that waits for another ends by itself: a long write may hold up the thread
SILENCE = 6.0  # seconds without one, after which a process is taken for gone
ENDED = 2**62  # the last sign of life, of a process that has ended in good order
NO_STORE = "the rendezvous is gone: rank 0, or the launcher that had it"
GRACE = 20.0  # seconds to end in when another rank has failed; then the process shows where it hangs, and ends


class Watch:
    """While entered: signs of life, and an end for this process where the others have failed or its launcher is gone.

    Leaving with an error tells the others; an error of a collective is replaced by the name of the rank that caused it.
    """

    def __init__(self, world: World):
        self.world = world
        self._launcher = os.getppid()
        self._ended = threading.Event()
        self._store: Optional[dist.Store] = None

    def __enter__(self) -> "Watch":
        if self.world.size > 1:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # A connection of its own: the process group's may be blocked.
            store = dist.TCPStore(*address, None, False, timedelta(seconds=30), wait_for_workers=False)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"watch/{attempt}", store)
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Optional[type], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        if self._store is None:
            return
        try:
            if is_of_a_collective(error):
                self._explain(error)
            if error is not None and not isinstance(error, (PeerError, Stopped)):
                self._store.set("failed", str(self.world.rank))
            else:
                self._show(ENDED)
        except RuntimeError as lost:
            if not is_of_a_collective(lost):
                raise
            raise RunError(f"rank {self.world.rank}: {NO_STORE}; what was saved is kept") from error
        finally:
            self._ended.set()
            self._thread.join(5)  # a thread that the interpreter ends amid a call into PyTorch would abort it

    def _explain(self, error: RuntimeError) -> None:
        """Raises PeerError where another rank has failed and says so, RunError where one is gone or behind; else returns."""
        before = self._signs()
        time.sleep(SILENCE)
        if self._failed() not in (None, self.world.rank):
            raise PeerError("another rank has failed") from error
        after = self._signs()
        gone = [rank for rank, (beat, _) in after.items() if beat == before[rank][0] != ENDED]
        behind = [rank for rank, (_, done) in after.items() if done < self.world.forward_passes]
        reason = (str(error).splitlines() or [""])[0][:200]
        for ranks, what in ((gone, "no sign of life of"), (behind, "no progress of")):
            if ranks:
                self._store.set("failed", str(self.world.rank))
                names = ", ".join(f"rank {rank}" for rank in ranks)
                raise RunError(f"rank {self.world.rank}: {what} {names}; what was saved is kept ({reason})") from error

    def _signs(self) -> dict[int, tuple[int, int]]:
        """Of every other rank: its last sign of life, and how many forward passes it had begun."""
        return {rank: self._sign(rank) for rank in range(self.world.size) if rank != self.world.rank}

    def _sign(self, rank: int) -> tuple[int, int]:
        known = self._store.check([f"alive/{rank}"])
        beat, passes = self._store.get(f"alive/{rank}").split() if known else (0, 0)
        return int(beat), int(passes)

    def _show(self, beat: int) -> None:
        self._store.set(f"alive/{self.world.rank}", f"{beat} {self.world.forward_passes}")

    def _failed(self) -> Optional[int]:
        return int(self._store.get("failed")) if self._store.check(["failed"]) else None

    def _run(self) -> None:
        beat, deadline = 0, None
        neighbour, last, since = (self.world.rank + 1) % self.world.size, 0, time.monotonic()
        while not self._ended.wait(INTERVAL):
            beat += 1
            if os.getppid() != self._launcher:
                self._end("the launcher is gone")
            try:
                self._show(beat)
                failed = self._failed()
                if beat % 5 == 0:  # each watches one: enough to notice any, and little for the store to do
                    now, _ = self._sign(neighbour)
                    if now not in (last, 0) or now == ENDED:
                        last, since = now, time.monotonic()
            except RuntimeError:  # the store's process has ended
                failed = -1
            if time.monotonic() - since > PATIENCE:
                self._end(f"no sign of life of rank {neighbour}")
            if failed is not None and failed != self.world.rank:
                deadline = deadline or time.monotonic() + GRACE
                if time.monotonic() > deadline:
                    self._end("another rank has failed" if failed >= 0 else NO_STORE, stacks=True)

    def _end(self, reason: str, stacks: bool = False) -> None:
        if self._ended.is_set():
            return
        log.error(f"rank {self.world.rank}: {reason}; what was saved is kept")
        with suppress(RuntimeError):
            self._store.set("failed", str(self.world.rank))
        if stacks:
            faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
