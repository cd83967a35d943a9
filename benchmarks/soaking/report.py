"""The table of a soak test, and its figures as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.soaking.compare import Comparison
from benchmarks.soaking.plan import Injection

_HEAD = "| injected | times | launched | exit codes | longest until all was gone | longest recovery | problems |"


@dataclass
class Result:
    """One attempt, judged.

    Attributes:
        episode: the run it belongs to.
        turn: its number within that.
        injection: what was planned.
        struck: whether it came to that.
        damaged: whether the run directory was damaged before.
        codes: exit codes.
        gone_seconds: from the strike until no process was left.
        recovery_seconds: from the strike until a step was fed again; None: none was, or the attempt survived.
        problems: what must not be.
    """

    episode: int
    turn: int
    injection: Injection
    struck: bool
    damaged: bool
    codes: list[int]
    gone_seconds: float
    recovery_seconds: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Soaked:
    """Everything that a soak test has done.

    Attributes:
        attempts: of all runs, in order.
        runs: those that were finished, compared with the reference.
        kept: folders of runs with problems.
    """

    attempts: list[Result] = field(default_factory=list)
    runs: list[Comparison] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def injections(self) -> int:
        """How many injections there were."""
        return sum(int(result.struck) + int(result.damaged) for result in self.attempts)

    @property
    def problems(self) -> int:
        """How many problems there were."""
        of_attempts = sum(len(result.problems) for result in self.attempts)
        return of_attempts + sum(len(run.problems) for run in self.runs)

    def figures(self, **more: Any) -> dict[str, Any]:
        """Return all figures, as JSON holds them."""
        return {
            **more,
            "injections": self.injections,
            "problems": self.problems,
            "totals": totals(self.runs),
            "attempts": [asdict(result) for result in self.attempts],
            "runs": [asdict(run) for run in self.runs],
            "kept": self.kept,
        }

    def table(self) -> list[str]:
        """Return the lines of the summary."""
        rows: dict[str, list[Result]] = defaultdict(list)
        for result in self.attempts:
            if result.struck:
                rows[result.injection.kind].append(result)
            if result.damaged:
                rows[result.injection.damage].append(result)
        lines = [_HEAD, "|-|-|-|-|-|-|-|", *(_row(kind, rows[kind]) for kind in sorted(rows))]
        points = Counter(result.injection.point for result in self.attempts if result.struck)
        forms = Counter(result.injection.form for result in self.attempts)
        summed = totals(self.runs)
        return [
            *lines,
            "",
            f"points of the run: {_counts(points)}",
            f"attempts by form: {_counts(forms)}",
            f"{self.injections} injections in {len(self.attempts)} attempts of {len(self.runs)} runs: "
            f"{summed['samples']} samples, {summed['lost']} lost, {summed['wrong']} wrong; largest difference of a "
            f"loss {summed['loss']:.1e} (relative), of a weight {summed['weight']:.1e} ({summed['odd_weights']} "
            f"beyond 1e-6); {summed['bit_equal']} runs equal the reference bit for bit; {self.problems} problem(s)",
        ]


def totals(runs: Sequence[Comparison]) -> dict[str, Any]:
    """Return sums and maxima over finished runs."""
    sums = {
        name: sum(getattr(run, name) for run in runs)
        for name in ("samples", "lost", "wrong", "odd_weights", "bit_equal")
    }
    return sums | {name: max((getattr(run, name) for run in runs), default=0.0) for name in ("loss", "weight")}


def _row(kind: str, results: list[Result]) -> str:
    codes = Counter(code for result in results for code in result.codes)
    launched = sum(result.injection.form != "forked" for result in results)
    recovery = [result.recovery_seconds for result in results if result.recovery_seconds is not None]
    longest = f"{max(recovery):.0f} s" if recovery else "-"
    problems = sum(len(result.problems) for result in results)
    gone = max(result.gone_seconds for result in results)
    return f"| {kind} | {len(results)} | {launched} | {_codes(codes)} | {gone:.0f} s | {longest} | {problems} |"


def _codes(codes: Counter[int]) -> str:
    return ", ".join(f"{code} ({times})" for code, times in sorted(codes.items()))


def _counts(counted: Counter[str]) -> str:
    return ", ".join(f"{name} {times}" for name, times in _sorted(counted.items()))


def _sorted(items: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(items, key=lambda item: (-item[1], item[0]))
