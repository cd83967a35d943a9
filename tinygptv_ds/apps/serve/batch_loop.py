"""The thread that generates all answers: waiting requests join its batch in order of arrival, between two steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from typing import TypeAlias

from tinygptv_ds.apps.serve.metrics import ServerMetrics
from tinygptv_ds.generate.decoding import Decoder
from tinygptv_ds.generate.logprobs import TokenLogprob
from tinygptv_ds.generate.row import Row

log = logging.getLogger(__name__)
_IMAGES_AT_ONCE = 8  # read in one pass when several requests join together


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: its text, and the log-probabilities of its tokens if the request asks for them."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer: the reason, "stop" or "length", and the number of its tokens."""

    reason: str
    tokens: int


_NOTHING = Piece("")
Message: TypeAlias = Piece | Finish | BaseException


@dataclass(eq=False)
class Job:
    """An answer to generate.

    Attributes:
        row: the answer; `row.closed` ends it.
        send: takes its pieces and its end, or the error that ended it; called in the thread.
        left: called, in the thread, when nothing of it is left there.
    """

    row: Row
    send: Callable[[Message], None]
    left: Callable[[], None]


class BatchLoop:
    """Generates answers together, in a thread of its own that sleeps while there is nothing to do.

    Args:
        decoder: the batch, used by no one else.
        max_batch: the most answers that are generated at a time.
        context: the most prompt tokens, padding included, that are read at once when several requests join together.
        metrics: counts steps and tokens.
    """

    def __init__(self, decoder: Decoder, max_batch: int, context: int, metrics: ServerMetrics) -> None:
        self._decoder, self._max_batch, self._context, self._metrics = decoder, max_batch, context, metrics
        self._changed = Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closed = False
        self._thread = Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of answers that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of answers in the batch."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Queue an answer."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def discard(self, job: Job) -> bool:
        """Remove an answer that has not begun; return whether it was one."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                return True
            return False

    def close(self) -> None:
        """End all answers and the thread."""
        with self._changed:
            self._closed = True
            for job in [*self._running, *self._waiting]:
                job.row.closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._wait():
            self._join(self._newcomers())
            self._step()
        self._fail([*self._running, *self._waiting], RuntimeError("the server has ended"))

    def _wait(self) -> bool:
        """Sleep until there is something to do; return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _newcomers(self) -> list[Job]:
        """Take from the queue what has room in the batch and can be read in one pass."""
        found: list[Job] = []
        with self._changed:
            while self._waiting and len(self._running) + len(found) < self._max_batch:
                if found and not self._fit_together([*found, self._waiting[0]]):
                    break
                found.append(self._waiting.popleft())
            self._running += found
        return found

    def _fit_together(self, jobs: Sequence[Job]) -> bool:
        longest = max(len(job.row.prompt_ids) for job in jobs)
        images = sum(len(each) for job in jobs for each in job.row.images.values())
        one_by_one = jobs[0].row.generation.num_beams > 1  # beam search runs to its end
        return not one_by_one and longest * len(jobs) <= self._context and images <= _IMAGES_AT_ONCE

    def _join(self, jobs: Sequence[Job]) -> None:
        """Add answers to the batch; if they cannot be read together, each by itself."""
        if not jobs:
            return
        try:
            self._decoder.add([job.row for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs, error)
            for job in jobs if len(jobs) > 1 else ():
                self._join([job])
            return
        for job in jobs:
            self._metrics.prompt_tokens.add(len(job.row.prompt_ids))
        self._report(jobs)

    def _step(self) -> None:
        """Generate one more token of each answer."""
        jobs = list(self._running)
        if not jobs:
            return
        try:
            self._decoder.step()
        except Exception as error:
            self._decoder.clear()
            self._fail(jobs, error)
            return
        self._report(jobs)

    def _report(self, jobs: Sequence[Job]) -> None:
        """Send what is new of each answer, and remove those that have ended."""
        self._metrics.batch.observe(len(jobs))
        for job in jobs:
            row = job.row
            if not row.closed:
                self._metrics.generated_tokens.add(1)
                piece = Piece(row.piece(), tuple(row.new_logprobs()))
                if piece != _NOTHING:
                    job.send(piece)
                if row.ended:
                    job.send(Finish(row.finish, len(row.ids)))
            if row.ended or row.closed:
                self._remove(job)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            job.row.closed = True
            job.send(error)
            self._remove(job)

    def _remove(self, job: Job) -> None:
        if job in self._running:
            self._running.remove(job)
        job.left()
