"""The report of all results, as one table and as JSON. Needs no torch."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Case
from benchmarks.gpu.results import MEASURED, check

# ZeRO-3 computes the same as ZeRO-2; after a few optimizer steps, rounding makes a tenth of this.
SAME_LOSS = 1e-2
# First losses of a process, before any step, in bf16 and fp16 differ by the rounding of weights and sums to 8 bits.
SAME_IN_BOTH = 2e-2
# The loss scale of fp16 begins high, and a step that overflows halves it.
MAX_SKIPPED = {"bf16": 0, "fp16": 8}
PARTS = ("vision", "projections", "phi", "head", "backward", "optimizer", "rest")


class Report:
    """All results so far, written after every process, so that they survive a crash.

    Args:
        out: folder of `gpu.json` and `table.md`.
        about: further entries of the JSON.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self._out = out
        self._began = time.time()
        self._found: dict[str, Any] = {**about, "machine": None, "ceilings": None}
        self._lists: dict[str, list] = {kind: [] for kind in ("attention", "whole_model", "steps", "save", "check")}
        self._failed: list[dict[str, str]] = []
        self._left_out: list[dict[str, str]] = []

    def take(self, lines: list[dict[str, Any]]) -> None:
        """Add the results of a process."""
        for line in lines:
            if line["kind"] in self._lists:
                self._lists[line["kind"]].append(line["value"])
            else:
                self._found[line["kind"]] = line["value"]
        self.write()

    def running_file(self) -> Path:
        """Return the file for the results of the process that is started next: they survive whatever is cut off."""
        path = self._out / "running.jsonl"
        path.unlink(missing_ok=True)
        return path

    def failed(self, what: str, why: str) -> None:
        """Add a part that crashed or hung."""
        self._failed.append({"what": what, "why": why})
        self.write()

    def left_out(self, what: str, why: str) -> None:
        """Add a part that the time did not suffice for."""
        self._left_out.append({"what": what, "why": why})
        self.write()

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Return the checks of the processes, and the comparisons between cases."""
        return [*self._lists["check"], *step_checks(self._lists["steps"])]

    @property
    def is_good(self) -> bool:
        """Whether nothing failed and every check passed; what was left out does not count."""
        return not self._failed and all(each["passed"] for each in self.checks)

    def write(self) -> None:
        """JSON and table as far as they have come."""
        plain = {
            **self._found,
            **{kind: values for kind, values in self._lists.items() if kind != "check"},
            "checks": self.checks,
            "failed": self._failed,
            "left_out": self._left_out,
            "seconds": time.time() - self._began,
        }
        (self._out / "gpu.json").write_text(json.dumps(_finite(plain), indent=1) + "\n", encoding="utf-8")
        (self._out / "table.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return the report in Markdown."""
        parts = [
            self._machine(),
            *attention_table(self._lists["attention"]),
            "",
            *step_table(self._lists["steps"], self._found.get("gpus") or 1),
        ]
        parts += ["", *map(_saving, self._lists["save"]), *longest_kernels(self._lists["steps"])]
        checks = self.checks
        parts += ["", f"{sum(each['passed'] for each in checks)} of {len(checks)} checks passed"]
        parts += [f"- FAILED: {c['name']}: {c['value']:.3g}, allowed {c['limit']:g}" for c in checks if not c["passed"]]
        parts += [f"- FAILED: {each['what']}: {each['why']}" for each in self._failed]
        parts += [f"- left out: {each['what']} ({each['why']})" for each in self._left_out]
        return "\n".join(parts) + "\n"

    def _machine(self) -> str:
        machine, ceilings = self._found["machine"], self._found["ceilings"]
        if machine is None:
            return "(the machine is unknown)\n"
        names = ("device", "driver", "torch", "cuda", "deepspeed", "transformers", "flash-attn")
        described = [f"{name} {machine[name]}" for name in names if machine.get(name)]
        described.append(f"attention by {machine['attention'][0]}")
        if ceilings:
            described.append(
                f"bf16 products {ceilings['matmul_tflops']:.3g} TFLOP/s, copies {ceilings['copy_gb_s']:.3g} GB/s, "
                f"transfers {ceilings['transfer_gb_s']:.3g} GB/s"
            )
        return "; ".join(described) + "\n"


def step_checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check that losses are finite, few steps were skipped, and ZeRO-2 and ZeRO-3, bf16 and fp16 agree.

    Cases are compared if the same steps were made before them.
    """
    found: list[dict[str, Any]] = []
    twins: dict[Any, Any] = {}
    fresh: dict[Any, Any] = {}
    for row in rows:
        if row["status"] == MEASURED:
            case = Case(**row["case"])
            bad = sum(not _is_finite(loss) for loss in row["losses"])
            found.append(check(f"{case}: losses that are not finite", bad, 0))
            if case.original:
                continue
            found.append(check(f"{case}: skipped steps", row["skipped_steps"], MAX_SKIPPED[case.precision]))
            twins.setdefault((case.twin, row["steps_before"]), []).append((case, row["losses"]))
            if not row["steps_before"]:
                fresh.setdefault((case.stage, case.source, case.batch), []).append((case, row["losses"][:1]))
    for (first, losses), *others in twins.values():
        for case, theirs in others:
            name = f"{case}: difference of losses from those under ZeRO-{first.zero}"
            found.append(check(name, _largest_difference(losses, theirs), SAME_LOSS))
    for (first, losses), *others in fresh.values():
        for case, theirs in others:
            if case.precision != first.precision:
                name = f"{case}: difference of the first loss from that in {first.precision}"
                found.append(check(name, _largest_difference(losses, theirs), SAME_IN_BOTH))
    return found


def _largest_difference(losses: list[float], others: list[float]) -> float:
    pairs = list(zip(losses, others, strict=False))
    if not all(_is_finite(a) and _is_finite(b) for a, b in pairs):
        return math.nan
    return max(abs(a - b) / abs(a) for a, b in pairs)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def attention_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table with a row for every backend, shape and dtype."""
    head = ["| attention | | backend | largest error | ms forward | and backward |", f"|{'-|' * 6}"]
    lines = [
        f"| {row['shape']} | {row['precision']} | {row['backend']} | {max(row['errors'].values()):.1e} | "
        f"{1000 * row['forward']:.3f} | {1000 * row['both']:.3f} |"
        for row in rows
    ]
    return [*head, *lines]


def step_table(rows: list[dict[str, Any]], gpus: int = 1) -> list[str]:
    """Return a Markdown table with a row for every case: rates, their ratio to the original's, memory, and times.

    `x original` is the rate of one GPU divided by that of the original's procedure with the same stage and batch, the
    mean of its measurements before and after. `host` is the host's time for the forward passes in per cent of the
    device's.
    """
    columns = ["case", "samples/s", "x original", "target tokens/s", "MFU", "GiB", "held", "in use", "estimated"]
    columns += ["ms a step", "host", "kernels", "busy"]
    head = ["| " + " | ".join([*columns, *PARTS, "first loss"]) + " |", f"|{'-|' * (len(columns) + len(PARTS) + 1)}"]
    baselines = original_rates(rows)
    return [*head, *(_step_row(row, baselines, len(columns) + len(PARTS), gpus) for row in rows)]


def original_rates(rows: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """Return the original's samples/s by stage and batch, the mean of its measurements."""
    found: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        case = Case(**row["case"])
        if case.original and row["status"] == MEASURED:
            found.setdefault(case.baseline, []).append(row["rates"]["samples_s"])
    return {key: sum(rates) / len(rates) for key, rates in found.items()}


def _step_row(row: dict[str, Any], baselines: dict[tuple[int, int], float], cells_after: int, gpus: int) -> str:
    case = Case(**row["case"])
    ranks = 1 if case.original else gpus
    if row["status"] != MEASURED:
        return f"| {case} | {row['status']} |{' |' * (cells_after - 1)}"
    rates, memory, profile = row["rates"], row["memory_gib"], row.get("profile")
    original = baselines.get(case.baseline)
    parts = row.get("seconds_by_part", {})
    cells = [
        f"{rates['samples_s']:.4g}",
        f"{rates['samples_s'] / ranks / original:.2f}" if original else "-",
        f"{rates['target_tokens_s']:.4g}",
        f"{rates['mfu']:.1f} %" if "mfu" in rates else "-",
        *(f"{memory[name]:.1f}" if name in memory else "-" for name in ("allocated", "reserved", "in_use")),
        f"{row['estimated_gib']:.1f}" if "estimated_gib" in row else "-",
        f"{1000 * rates['step_seconds']:.1f}",
        f"{row['host_pct']:.0f} %" if "host_pct" in row else "-",
        *((f"{profile['kernels']:,.0f}", f"{profile['busy_pct']:.0f} %") if profile else ("-", "-")),
        *(f"{1000 * parts[part]:.1f}" if part in parts else "-" for part in PARTS),
        f"{row['losses'][0]:.4f}" if _is_finite(row["losses"][0]) else str(row["losses"][0]),
    ]
    return f"| {case} | {' | '.join(cells)} |"


def longest_kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of the kernels that take longest in the first case of each stage that was profiled."""
    lines, seen = [], set()
    for row in rows:
        case = Case(**row["case"])
        if "profile" in row and case.stage not in seen:
            seen.add(case.stage)
            lines += ["", f"| ms a step | times | kernels of {case} |", "|-|-|-|"]
            lines += [
                f"| {each['ms']:.3f} | {each['count']:g} | {each['name'][:90]} |" for each in row["profile"]["top"]
            ]
    return lines


def _saving(save: dict[str, Any]) -> str:
    waits = f"training waits {save['stall_seconds']:.2f} s (the first time {save['first_stall_seconds']:.2f} s)"
    writing, alone = (1000 * save[f"step_seconds_{name}"] for name in ("while_writing", "alone"))
    during = f"a step takes {writing:.0f} ms, alone {alone:.0f} ms"
    return (
        f"{save['group']}, checkpoint of {save['gb']:.2f} GB: {waits}; written in {save['write_seconds']:.2f} s, while "
        f"{during}"
    )


def _finite(value: Any) -> Any:
    """Return the value with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
