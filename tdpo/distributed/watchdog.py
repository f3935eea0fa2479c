"""Find out which rank died or hangs, which PyTorch does not tell when a collective fails.

A thread of each process writes heartbeats to the store at which the ranks met. A blocked collective does not stop this thread.
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

INTERVAL = 1.0  # seconds between heartbeats
PATIENCE = 45.0  # seconds without a heartbeat of the watched rank after which this process exits: a long write may delay a heartbeat
SILENCE = 6.0  # seconds without a heartbeat after which a rank counts as dead, once a collective has failed
ENDED = 2**62  # the last heartbeat of a process that has ended without failing
NO_STORE = "the rendezvous store is gone: rank 0 or the launcher, which held it, has ended"
GRACE = 20.0  # seconds that this process has to exit after another rank failed; then it prints its stacks and exits


class Watch:
    """A context that writes heartbeats, and ends this process if another rank has failed or the launcher has ended.

    An error that leaves the context is reported to the other ranks. The error of a collective is replaced by one that names the rank that
    caused it.
    """

    def __init__(self, world: World):
        self.world = world
        self._launcher = os.getppid()
        self._ended = threading.Event()
        self._store: Optional[dist.Store] = None

    def __enter__(self) -> "Watch":
        if self.world.size > 1:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # A separate connection, because the process group's may be blocked.
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
            raise RunError(f"rank {self.world.rank}: {NO_STORE}; saved checkpoints are kept") from error
        finally:
            self._ended.set()
            self._thread.join(5)  # if the interpreter ended the thread during a call into PyTorch, the process would abort

    def _explain(self, error: RuntimeError) -> None:
        """Raise PeerError if another rank failed and reported it, RunError if one is dead or behind; otherwise return."""
        before = self._signs()
        time.sleep(SILENCE)
        if self._failed() not in (None, self.world.rank):
            raise PeerError("another rank has failed") from error
        after = self._signs()
        gone = [rank for rank, (beat, _) in after.items() if beat == before[rank][0] != ENDED]
        behind = [rank for rank, (_, done) in after.items() if done < self.world.forward_passes]
        reason = (str(error).splitlines() or [""])[0][:200]
        for ranks, what in ((gone, "no heartbeat from"), (behind, "no progress from")):
            if ranks:
                self._store.set("failed", str(self.world.rank))
                names = ", ".join(f"rank {rank}" for rank in ranks)
                raise RunError(f"rank {self.world.rank}: {what} {names}; saved checkpoints are kept ({reason})") from error

    def _signs(self) -> dict[int, tuple[int, int]]:
        """Return each other rank's last heartbeat, and the number of forward passes it had begun by then."""
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
                self._end("the launcher has ended")
            try:
                self._show(beat)
                failed = self._failed()
                if beat % 5 == 0:  # each rank watches one other, which covers all of them at little load on the store
                    now, _ = self._sign(neighbour)
                    if now not in (last, 0) or now == ENDED:
                        last, since = now, time.monotonic()
            except RuntimeError:  # the store's process has ended
                failed = -1
            if time.monotonic() - since > PATIENCE:
                self._end(f"no heartbeat from rank {neighbour}")
            if failed is not None and failed != self.world.rank:
                deadline = deadline or time.monotonic() + GRACE
                if time.monotonic() > deadline:
                    self._end("another rank has failed" if failed >= 0 else NO_STORE, stacks=True)

    def _end(self, reason: str, stacks: bool = False) -> None:
        if self._ended.is_set():
            return
        log.error(f"rank {self.world.rank}: {reason}; saved checkpoints are kept")
        with suppress(RuntimeError):
            self._store.set("failed", str(self.world.rank))
        if stacks:
            faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
