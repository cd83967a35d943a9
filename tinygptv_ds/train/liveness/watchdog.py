"""The watchdog: notices that a rank is lost or that a step does not end, reports which rank it is, and ends this one.

A thread of every rank sends rank 0 its status once a second and receives that of rank 0. It works while the main thread
is blocked in a collective, in CUDA or in a read; it reports what it finds in one message and leaves by `os._exit`,
because nothing else ends a process in such a state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType

from torch import distributed

from tinygptv_ds.errors import Stopped, TinyGPTVError, disk_problem
from tinygptv_ds.log import LOGGER, note
from tinygptv_ds.train.checkpoint.folders import FOLDER, complete_ones
from tinygptv_ds.train.liveness.channel import HELLO, Channel, Message
from tinygptv_ds.train.liveness.launchers import LOST
from tinygptv_ds.train.liveness.progress import START_UP, AwakeClock, Progress, RankStatus
from tinygptv_ds.train.liveness.stacks import Stacks
from tinygptv_ds.train.liveness.suspension import Suspension
from tinygptv_ds.train.setup.job import Job

_TIMES_SLOWER = 5.0  # a step is reported if it takes so many times the median of earlier steps
_GATHER = 0.1  # seconds: processes that end together are named together
_OWN_WAY = 5.0  # seconds that a rank gets to find the error itself that another one has reported
_LAST_WORD = 5.0  # seconds that a last message may take to be sent,
_ON_ITS_WAY = 0.3  # and that it is then given to arrive
_LEFT_OVER = 2.0  # seconds at most that rank 0 stays after it has asked the others to end
_WAY_OUT = 20.0  # seconds that a rank gets to end after an error of its own
_AT_WORK = 0.05  # of a CPU core: a rank that waits uses next to nothing
_NOW = 3.0  # intervals: what a rank was last seen doing in them it is still doing
_LAST_RESORT = 10.0  # seconds for a message to be written, in case the console is blocked


class Watchdog:
    """Watches over a run; a context manager that all ranks enter.

    Args:
        job: the recipe's limits, the run directory, and this process among the ranks.
        set_group_timeout: sets how long collectives may wait.

    Attributes:
        progress: the step and phase of this rank, which the training sets.
        stacks: writes the stacks of its threads.
    """

    def __init__(self, job: Job, set_group_timeout: Callable[[timedelta], None]) -> None:
        train, ranks = job.recipe.train, job.ranks
        self._job, self._rank = job, ranks.rank
        self._slow, self._lost_after = train.slow_step_seconds, train.lost_after_seconds
        self._interval = min(1.0, self._lost_after / 10) if self._lost_after else 1.0
        self._channel = Channel(ranks, self._on_message) if ranks.world_size > 1 and self._lost_after else None
        self._clock = AwakeClock(10 * self._interval)
        self.progress = Progress(ranks.rank, train, set_group_timeout, self._clock)
        self.stacks: Stacks
        self._suspension: Suspension
        self._statuses: dict[int, RankStatus] = {}
        self._received_at: dict[int, float] = {}
        self._excused: set[int] = set()  # ranks that have announced that they leave
        self._gone: set[int] = set()
        self._reported = -1  # the step whose slowness has been reported
        self._over = threading.Event()  # the run is
        self._ending = False  # this process is, by this thread
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # ---- called by the main thread

    def __enter__(self) -> Watchdog:
        self.stacks = Stacks(self._job.run_dir, self._rank)
        self._suspension = Suspension(self.stacks.disarm)
        if self._channel is not None:
            self._channel.open()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None and self._channel is not None and not isinstance(error, Stopped)
        if error is not None and failed:
            self._explain(error)
        self._over.set()
        self._thread.join(_LAST_RESORT)
        self._suspension.close()
        if failed:  # with collectives under way, Python does not always get to its end
            self.stacks.arm(_WAY_OUT, leave=True)
        else:
            self.stacks.close()

    def leave(self) -> None:
        """Announce that this rank has done its part and its end is no loss. Call before all ranks meet once more."""
        self.progress.last_phase("ending")
        self._send({"left": {"error": None}})

    def _explain(self, error: BaseException) -> None:
        """Report an error of this rank to the others."""
        if is_of_collectives(error):  # it follows from what the thread is about to find out and report itself
            time.sleep(self._lost_after + 10 * self._interval)
        if self._send({"left": _in_our_terms(error)}):
            sent = threading.Event()
            self._loop.call_soon_threadsafe(sent.set)
            sent.wait(_LAST_WORD)
            time.sleep(_ON_ITS_WAY)

    def _send(self, message: Message) -> bool:
        """Send from the main thread; returns False where there is no connection."""
        if self._channel is None:
            return False
        try:
            self._loop.call_soon_threadsafe(self._channel.send, message)
        except RuntimeError:  # the thread has ended
            return False
        return True

    # ---- called in the thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._watch())

    async def _watch(self) -> None:
        if self._channel is not None:
            peers = range(1, self._job.ranks.world_size) if self._rank == 0 else (0,)
            self._received_at = dict.fromkeys(peers, self._clock.now())
            await self._channel.start()
        self._suspension.listen(self._loop)
        while not self._over.is_set() or self._ending:
            if not self._ending:
                await self._check()
            await asyncio.sleep(self._interval)

    async def _check(self) -> None:
        self._clock.tick()
        self.progress.note_work(_AT_WORK * self._interval)
        self._statuses[self._rank] = self.progress.status()
        self.stacks.arm(self._may_be_silent, leave=self._channel is not None)
        if self._channel is not None:
            self._channel.send(self._own_status())
            self._check_silence()
        if self._rank == 0 or self._channel is None:
            await self._check_delay()

    @property
    def _may_be_silent(self) -> float:
        """Seconds without a message that are no loss. While a run starts up, code may keep this thread from running."""
        short = self._channel is not None and not self.progress.starting
        return self._lost_after if short else self.progress.limit(patient=True)

    def _own_status(self) -> Message:
        return {"status": asdict(self.progress.status())}

    def _on_message(self, rank: int, message: Message | None) -> None:
        self._received_at[rank] = self._clock.now()
        if message == HELLO:
            if self._channel is not None:
                self._channel.send(self._own_status(), to=rank)
        elif message is None:
            if rank not in self._excused:
                self._lose({rank}, "its process is gone")
        elif "status" in message:
            self._statuses[rank] = RankStatus(**message["status"])
        elif "left" in message:
            self._excused.add(rank)
            if message["left"]["error"] is not None:
                self._loop.call_later(_OWN_WAY, self._follow, rank, message["left"])
        elif "dump" in message:
            self.stacks.dump(message["dump"])
        elif "end" in message:
            self._end(message["end"])

    def _check_silence(self) -> None:
        """Check all ranks on rank 0, and rank 0 on the others."""
        limit = self._may_be_silent
        for rank, received in self._received_at.items():
            if rank not in self._excused and self._clock.now() - received > limit:
                self._lose({rank}, f"no sign of life for {limit:g} s: host or network down, or the process frozen")

    def _lose(self, ranks: set[int], how: str) -> None:
        if not self._gone:
            self._loop.call_later(_GATHER, self._end_without, how)
        self._gone |= ranks

    def _end_without(self, how: str) -> None:
        lost = [self._statuses.get(rank, RankStatus(rank, "unknown", 0)) for rank in sorted(self._gone)]
        step = self.progress.status().step
        hosts = ", ".join(sorted({status.host for status in lost}))
        self._end_all(
            f"{', '.join(map(str, lost))} {'was' if len(lost) == 1 else 'were'} lost {_in_step(step)} ({how}). Look "
            f"above for a message of its own, in {self.stacks.path.parent} for its stacks, and in the kernel log "
            f"(dmesg) of {hosts} for the OOM killer; then {self._how_to_resume()}"
        )

    async def _check_delay(self) -> None:
        """Report once a step that takes far too long, with the stacks of all ranks; at its limit end the run."""
        statuses = [status for status in self._statuses.values() if status.rank not in self._excused]
        behind = min(status.phases for status in statuses)
        awaited = [status for status in statuses if status.phases == behind]
        worst = max(awaited, key=lambda status: status.seconds)
        limit, usual = self.progress.limit(patient=worst.patient), self.progress.usual
        slow = bool(self._slow and usual) and worst.seconds > max(self._slow, _TIMES_SLOWER * usual)
        slow = slow and not worst.patient and self._reported != worst.step
        if worst.seconds <= limit and not slow:
            return
        self._reported = worst.step
        place = f" {_in_step(worst.step)}" if worst.step else ""  # before the first the phase says it
        found = f"{_describe(awaited, self._job.ranks.world_size)}{place} for {worst.seconds:.0f} s"
        where = f"the stacks of all ranks are in {self.stacks.path.parent}"
        if self._channel is not None:
            self._channel.send({"dump": found})
        self.stacks.dump(found)
        if worst.seconds <= limit:
            LOGGER.warning("%s, where a whole step takes %.1f s; %s", found, usual, where)
            return
        await asyncio.sleep(2 * self._interval)  # for the others to write theirs
        key = "startup_minutes" if worst.patient else "step_minutes"
        over = f"{found}, longer than train.{key} ({limit / 60:g}) allows; {where}"
        if worst.phase == START_UP and all(status.idle < _NOW * self._interval for status in awaited):
            # It would not be over in time the next time either: no restart mends this.
            self._end_all(
                f"{over}. It is still at work, not hanging: raise train.{key}; then {self._how_to_resume()}", 2
            )
        else:
            self._end_all(f"{over}. Raise train.{key} if it was only slow; then {self._how_to_resume()}")

    def _how_to_resume(self) -> str:
        found = complete_ones(self._job.run_dir / FOLDER)
        where = f"resumes from {found[-1]}" if found else "begins again, because there is no checkpoint yet"
        return f"start the same command again: it {where}"

    def _follow(self, rank: int, left: Message) -> None:
        """End after another rank's error; this rank would have found the same by now if it had it too."""
        above = "; its traceback is above" if left["code"] == 1 else ""
        message = f"{left['error']} (on rank {rank}, {_in_step(self.progress.status().step)}{above})"
        self._end_all(message, left["code"])

    def _end_all(self, message: str, code: int = LOST) -> None:
        end = {"message": message, "code": code}
        if self._rank == 0 and self._channel is not None and not self._ending:
            self._channel.send({"end": end})
        self._end(end)

    def _end(self, end: Message) -> None:
        """End the process. Rank 0 prints why, and without it rank 1 and the first rank of each host."""
        if self._ending:
            return
        self._ending = True
        self.stacks.arm(_LAST_RESORT, leave=True)
        if self._rank == 0 or (0 in self._gone and (self._rank == 1 or self._job.ranks.local_rank == 0)):
            note(end["message"])
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                os.write(2, f"error: {end['message']}\n".encode())
        # A closed connection may drop what is on its way, so rank 0 stays until the others have read it.
        until = time.monotonic() + (_LEFT_OVER if self._rank == 0 and self._channel is not None else 0.0)
        self._leave_at(until, end["code"])

    def _leave_at(self, until: float, code: int) -> None:
        if self._channel is not None and time.monotonic() < until and not self._channel.is_alone:
            self._loop.call_later(0.02, self._leave_at, until, code)
        else:
            os._exit(code)


def _in_our_terms(error: BaseException) -> Message:
    """Return what the other ranks are to print about an error of this one, and the exit code of all of them."""
    if isinstance(error, KeyboardInterrupt):
        return {"error": "interrupted by Ctrl-C", "code": 128 + signal.SIGINT}
    of_disk = disk_problem(error)
    if of_disk is not None or isinstance(error, TinyGPTVError):
        return {"error": of_disk or str(error), "code": 2}
    return {"error": f"{type(error).__name__}: {error}", "code": 1}


def _in_step(step: int) -> str:
    return f"in step {step}" if step else "while the run was starting up"


def _describe(awaited: list[RankStatus], ranks: int) -> str:
    """Return which ranks have been doing what."""
    phase = awaited[0].phase
    if len(awaited) == ranks > 1:
        return f"all ranks have been {phase}"
    named = ", ".join(map(str, awaited))
    waited = ", and the others waiting for it," if ranks > 1 else ""
    return f"{named} {'has' if len(awaited) == 1 else 'have'} been {phase}{waited}"


def is_of_collectives(error: BaseException) -> bool:
    """Return whether an error comes from the communication of ranks, as gloo and NCCL report a peer that is gone."""
    marks = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    found = isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    return found or isinstance(error, distributed.DistError)
