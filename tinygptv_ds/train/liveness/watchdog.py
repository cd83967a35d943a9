"""Notices that a rank is lost or that a step does not end, says which rank it is, and ends this one.

A thread of every rank tells rank 0 once a second where its rank stands, and hears the same of rank 0. It works while
the main thread is blocked in a collective, in CUDA or in a read; what it finds it says in one message, and leaves by
`os._exit`, since nothing else ends a process in such a state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType

from torch import distributed

from tinygptv_ds.errors import Stopped, TinyGPTVError
from tinygptv_ds.log import LOGGER, note
from tinygptv_ds.train.checkpoint.storage import FOLDER, complete_ones
from tinygptv_ds.train.liveness.channel import HELLO, Line, Message
from tinygptv_ds.train.liveness.progress import AwakeClock, Beat, Progress
from tinygptv_ds.train.liveness.stacks import Stacks
from tinygptv_ds.train.setup.job import Job

LOST = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
_TIMES_SLOWER = 5.0  # than the median of the steps before, for a step to be reported
_GATHER = 0.1  # seconds: processes that end together are named together
_OWN_WAY = 5.0  # seconds that a rank gets to find by itself the mistake that another one has told of
_LAST_WORD = 5.0  # seconds that a last message may take to be sent,
_ON_ITS_WAY = 0.3  # and that it is then given to arrive
_LEFT_OVER = 2.0  # seconds at most that rank 0 stays after it has told the others to end
_WAY_OUT = 20.0  # seconds that a rank gets to end after an error of its own
_LAST_RESORT = 10.0  # seconds for a message to be written, on a console that takes nothing any more


class Watchdog:
    """Watches over a run, as a context that all ranks enter.

    Args:
        job: the recipe's limits, the run directory, and who this process is.
        set_group_timeout: sets how long collectives may wait.

    Attributes:
        progress: where this rank stands; to be told.
        stacks: writes where its threads stand.
    """

    def __init__(self, job: Job, set_group_timeout: Callable[[timedelta], None]) -> None:
        train, ranks = job.recipe.train, job.ranks
        self._job, self._rank = job, ranks.rank
        self._slow, self._lost_after = train.slow_step_seconds, train.lost_after_seconds
        self._interval = min(1.0, self._lost_after / 10) if self._lost_after else 1.0
        self._line = Line(ranks, self._heard) if ranks.world_size > 1 and self._lost_after else None
        self._clock = AwakeClock(10 * self._interval)
        self.progress = Progress(ranks.rank, train, set_group_timeout, self._clock)
        self.stacks: Stacks
        self._beats: dict[int, Beat] = {}
        self._heard_at: dict[int, float] = {}
        self._excused: set[int] = set()  # ranks that have said that they leave
        self._gone: set[int] = set()
        self._reported = -1  # the step whose slowness has been reported
        self._over = threading.Event()  # the run is
        self._ending = False  # this process is, by this thread
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # ---- called by the main thread

    def __enter__(self) -> Watchdog:
        self.stacks = Stacks(self._job.run_dir, self._rank)
        if self._line is not None:
            self._line.open()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None and self._line is not None and not isinstance(error, Stopped)
        if failed:
            self._explain(error)
        self._over.set()
        self._thread.join(_LAST_RESORT)
        if failed:  # with collectives under way, Python does not always get to its end
            self.stacks.arm(_WAY_OUT, leave=True)
        else:
            self.stacks.close()

    def leave(self) -> None:
        """This rank has done its part, its end is no loss from now on. To be called before all ranks meet once more."""
        self.progress.last_phase("ending")
        self._say({"left": {"error": None}})

    def _explain(self, error: BaseException) -> None:
        """A collective fails in consequence of what the thread is about to find out; the rest is told to the others."""
        if is_of_collectives(error):
            time.sleep(self._lost_after + 10 * self._interval)
        code = 2 if isinstance(error, TinyGPTVError) else 1
        said = str(error) if code == 2 else f"{type(error).__name__}: {error}"
        if self._say({"left": {"error": said, "code": code}}):
            sent = threading.Event()
            self._loop.call_soon_threadsafe(sent.set)
            sent.wait(_LAST_WORD)
            time.sleep(_ON_ITS_WAY)

    def _say(self, message: Message) -> bool:
        """False where nobody can be told."""
        if self._line is None:
            return False
        try:
            self._loop.call_soon_threadsafe(self._line.say, message)
        except RuntimeError:  # the thread has ended
            return False
        return True

    # ---- called in the thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._watch())

    async def _watch(self) -> None:
        if self._line is not None:
            await self._line.start()
        while not self._over.is_set() or self._ending:
            if not self._ending:
                await self._look()
            await asyncio.sleep(self._interval)

    async def _look(self) -> None:
        self._clock.tick()
        self._beats[self._rank] = self.progress.beat()
        self.stacks.arm(self._may_be_silent, leave=self._line is not None)
        if self._line is not None:
            self._line.say(self._own_beat())
            self._look_for_silence()
        if self._rank == 0 or self._line is None:
            await self._look_for_delay()

    @property
    def _may_be_silent(self) -> float:
        """Seconds. While a run starts up, code may well keep this thread from running."""
        short = self._line is not None and not self.progress.starting
        return self._lost_after if short else self.progress.limit(patient=True)

    def _own_beat(self) -> Message:
        return {"beat": asdict(self.progress.beat())}

    def _heard(self, rank: int, message: Message | None) -> None:
        self._heard_at[rank] = self._clock.now()
        if message == HELLO:
            self._line.say(self._own_beat(), to=rank)
        elif message is None:
            if rank not in self._excused:
                self._lose({rank}, "its process is gone")
        elif "beat" in message:
            self._beats[rank] = Beat(**message["beat"])
        elif "left" in message:
            self._excused.add(rank)
            if message["left"]["error"] is not None:
                self._loop.call_later(_OWN_WAY, self._follow, rank, message["left"])
        elif "dump" in message:
            self.stacks.dump(message["dump"])
        elif "end" in message:
            self._end(message["end"])

    def _look_for_silence(self) -> None:
        """Of all ranks on rank 0; of rank 0 on the others."""
        limit = self._may_be_silent
        for rank, heard in self._heard_at.items():
            if rank not in self._excused and self._clock.now() - heard > limit:
                self._lose({rank}, f"no sign of life for {limit:g} s: host or network down, or the process frozen")

    def _lose(self, ranks: set[int], how: str) -> None:
        if not self._gone:
            self._loop.call_later(_GATHER, self._end_without, how)
        self._gone |= ranks

    def _end_without(self, how: str) -> None:
        lost = [self._beats.get(rank, Beat(rank, "unknown", 0)) for rank in sorted(self._gone)]
        step = self.progress.beat().step
        self._end_all(
            f"{', '.join(map(str, lost))} {'was' if len(lost) == 1 else 'were'} lost {_in_step(step)} ({how}). Look "
            f"above for a message of its own, in {self.stacks.path.parent} for its stacks, and in the kernel log "
            f"(dmesg) of {', '.join(sorted({beat.host for beat in lost}))} for the OOM killer; then {self._going_on()}"
        )

    async def _look_for_delay(self) -> None:
        """A step that takes far too long is reported once, with the stacks of all ranks; at its limit the run ends."""
        beats = [beat for beat in self._beats.values() if beat.rank not in self._excused]
        behind = min(beat.moves for beat in beats)
        awaited = [beat for beat in beats if beat.moves == behind]
        worst = max(awaited, key=lambda beat: beat.seconds)
        limit, usual = self.progress.limit(patient=worst.patient), self.progress.usual
        slow = bool(self._slow and usual) and worst.seconds > max(self._slow, _TIMES_SLOWER * usual)
        slow = slow and not worst.patient and self._reported != worst.step
        if worst.seconds <= limit and not slow:
            return
        self._reported = worst.step
        found = f"{_said(awaited, self._job.ranks.world_size)} {_in_step(worst.step)} for {worst.seconds:.0f} s"
        where = f"the stacks of all ranks are in {self.stacks.path.parent}"
        if self._line is not None:
            self._line.say({"dump": found})
        self.stacks.dump(found)
        if worst.seconds <= limit:
            LOGGER.warning("%s, where a whole step takes %.1f s; %s", found, usual, where)
            return
        await asyncio.sleep(2 * self._interval)  # for the others to write theirs
        key = "startup_minutes" if worst.patient else "step_minutes"
        self._end_all(
            f"{found}, longer than train.{key} ({limit / 60:g}) allows; {where}. Raise train.{key} if it was only "
            f"slow; then {self._going_on()}"
        )

    def _going_on(self) -> str:
        found = complete_ones(self._job.run_dir / FOLDER)
        where = f"goes on from {found[-1]}" if found else "begins again, there being no checkpoint yet"
        return f"start the same command again: it {where}"

    def _follow(self, rank: int, left: Message) -> None:
        """Another rank has ended with an error; this one would have found the same by now if it had it too."""
        above = "" if left["code"] == 2 else "; its traceback is above"
        message = f"{left['error']} (on rank {rank}, {_in_step(self.progress.beat().step)}{above})"
        self._end_all(message, left["code"])

    def _end_all(self, message: str, code: int = LOST) -> None:
        end = {"message": message, "code": code}
        if self._rank == 0 and self._line is not None and not self._ending:
            self._line.say({"end": end})
        self._end(end)

    def _end(self, end: Message) -> None:
        """Leave. Rank 0 prints why, and without it rank 1 and the first rank of each host."""
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
        until = time.monotonic() + (_LEFT_OVER if self._rank == 0 and self._line is not None else 0.0)
        self._leave_at(until, end["code"])

    def _leave_at(self, until: float, code: int) -> None:
        if time.monotonic() < until and not self._line.is_alone:
            self._loop.call_later(0.02, self._leave_at, until, code)
        else:
            os._exit(code)


def _in_step(step: int) -> str:
    return f"in step {step}" if step else "while the run was starting up"


def _said(awaited: list[Beat], ranks: int) -> str:
    """Who does what."""
    phase = awaited[0].phase
    if len(awaited) == ranks > 1:
        return f"all ranks have been {phase}"
    named = ", ".join(map(str, awaited))
    waited = ", and the others waiting for it," if ranks > 1 else ""
    return f"{named} {'has' if len(awaited) == 1 else 'have'} been {phase}{waited}"


def is_of_collectives(error: BaseException) -> bool:
    """Whether it comes from the processes' communication, as gloo and NCCL tell of a peer that is gone."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    found = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return found or isinstance(error, distributed.DistError)
