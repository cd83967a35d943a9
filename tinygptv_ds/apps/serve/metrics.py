"""Counters, gauges and histograms in the text format of Prometheus, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

from tinygptv_ds.processes import resident_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Counter:
    """A number that only grows, one for each value of its label if it has one."""

    def __init__(self, name: str, text: str, label: str = "") -> None:
        self._name, self._text, self._label = name, text, label
        self._values: dict[str, int] = {} if label else {"": 0}
        self._lock = Lock()

    def add(self, amount: int, value: str = "") -> None:
        """Add to the number of a label's value."""
        with self._lock:
            self._values[value] = self._values.get(value, 0) + amount

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        yield from _head(self._name, self._text, "counter")
        for value, number in sorted(self._values.items()):
            yield f"{self._name}{_labels(self._label, value)} {number}"


class Gauge:
    """A number that is asked for."""

    def __init__(self, name: str, text: str, read: Callable[[], int]) -> None:
        self._name, self._text, self._read = name, text, read

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        yield from _head(self._name, self._text, "gauge")
        yield f"{self._name} {self._read()}"


class Histogram:
    """How often a number was at most each of some bounds, with the sum of all numbers."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        self._lock = Lock()

    def observe(self, number: float) -> None:
        """Count a number."""
        with self._lock:
            self._counts[bisect_left(self._bounds, number)] += 1
            self._sum += number

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        yield from _head(self._name, self._text, "histogram")
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            below += count
            yield f"{self._name}_bucket{_labels('le', bound)} {below}"
        yield f"{self._name}_sum {total:.6g}"
        yield f"{self._name}_count {below}"


class ServerMetrics:
    """The metrics of a server.

    Attributes:
        requests: requests for an answer by the status of their response; 499: the client has left.
        refused: refused requests by the code of their error.
        prompt_tokens: tokens of the prompts that were read.
        generated_tokens: tokens of answers.
        batch: answers that each step of generation had.
        first_token: seconds from a request's arrival to the first text of its answer.
        duration: seconds from a request's arrival to the end of its answer.
    """

    def __init__(self) -> None:
        self.requests = Counter("tinygptv_requests_total", "Requests for an answer by status.", "code")
        self.refused = Counter("tinygptv_requests_refused_total", "Refused requests by error code.", "reason")
        self.prompt_tokens = Counter("tinygptv_prompt_tokens_total", "Tokens of prompts, images included.")
        self.generated_tokens = Counter("tinygptv_generated_tokens_total", "Tokens of answers.")
        self.batch = Histogram("tinygptv_batch_size", "Answers in each step of generation.", _ROWS)
        self.first_token = Histogram(
            "tinygptv_time_to_first_token_seconds", "From a request's arrival to the first text.", _SECONDS
        )
        self.duration = Histogram(
            "tinygptv_request_duration_seconds", "From a request's arrival to the end of its answer.", _SECONDS
        )

    def text(self, *gauges: Gauge) -> str:
        """Return everything in the text format, with numbers that are known elsewhere."""
        memory = Gauge("process_resident_memory_bytes", "Resident memory.", resident_bytes)
        return "".join(f"{line}\n" for each in (*vars(self).values(), *gauges, memory) for line in each.lines())


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(name: str, value: str) -> str:
    return f'{{{name}="{value}"}}' if name else ""
