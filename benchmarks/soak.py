"""Interrupts runs of a tiny recipe again and again, and compares each with a run that was left alone.

Processes are killed, stopped and frozen at chosen points of start-up, step and save; ranks, ZeRO stage and dataloader
workers change between attempts; disks fill and clear; run directories are damaged. `python benchmarks/soak.py --minutes
60 --seed 1`, from the root. Exit code 1: something was lost, left over, or not as docs/train/resume.md has it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.soaking.attempt import Outcome, Place, run_attempt
from benchmarks.soaking.compare import Reference, compare, unsound
from benchmarks.soaking.damage import damage
from benchmarks.soaking.disk import Disk
from benchmarks.soaking.plan import DEEPSPEED, FULL, FULL_A_WHILE, INT, Injection, draw
from benchmarks.soaking.processes import MARK
from benchmarks.soaking.report import Result, Soaked

ROOT = Path(__file__).resolve().parents[1]
_PLAIN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
KINDS = {"vqa": 30, "text": 30, "chat": 20, "pair": 15}
STEPS, SAVED_EVERY, BATCH = 24, 3, 12
_MOST_TURNS = 16  # injections in one run


def main(argv: Sequence[str] | None = None) -> None:
    """Soak until the time is over; the run under way is finished and compared."""
    args = _parser().parse_args(argv)
    sys.path.insert(0, str(ROOT / "tests"))  # their tiny model, and their ways of starting ranks
    os.environ.update(_PLAIN, TOKENIZERS_PARALLELISM="false", PYTHONDONTWRITEBYTECODE="1")
    # A shell ignores SIGINT for what it starts in the background; every rank would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # with everything put away
    work = args.work or Path(tempfile.mkdtemp(prefix="soak-"))
    work.mkdir(parents=True, exist_ok=True)
    mark = os.environ[MARK] = uuid.uuid4().hex
    from helpers.forked import apart

    apart(os.getpid)  # the server that ranks are forked from is there before processes are counted
    with Disk(work / "disk") as disk:
        soak = Soak(Place(make_recipe(work), mark, disk), work, args.seed, args.launched)
        soak.run(args.episode, args.minutes, args.injections)
    lines = soak.done.table()
    print("\n".join(lines), flush=True)
    (work / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figures = soak.done.figures(seed=args.seed, minutes=soak.minutes(), real_disk=soak.place.disk.is_real)
    (args.json or work / "summary.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"in {work}: summary.md, and summary.json with every attempt")
    sys.exit(1 if soak.done.problems else 0)


def make_recipe(work: Path) -> Path:
    """Write a tiny model, four datasets, one of text alone and one of two images, and a recipe with dropout."""
    from helpers import tiny

    weights = tiny.save_weights(work / "weights")
    shards = {
        kind: tiny.write_shards(work / "data" / kind, tiny.samples(kind, count, seed))
        for seed, (kind, count) in enumerate(KINDS.items())
    }
    changes = {"steps_per_epoch": STEPS, "checkpoint_every": SAVED_EVERY, "batch_size": BATCH, "sample_count": 0}
    raw = tiny.recipe(weights, shards, model__resid_dropout=0.1, model__lora_dropout=0.05)
    raw["train"] |= changes
    raw["data"]["datasets"][1]["weight"] = 60  # text alone: some steps have no image at all
    return tiny.write_recipe(work / "recipe.yaml", raw)


class Soak:
    """Runs episodes: each is a run that is interrupted until it is finished.

    Args:
        place: recipe and disk.
        work: where records, and what is kept, are written.
        seed: of everything that is drawn.
        launched: share of attempts that real launchers start.

    Attributes:
        done: what has been done.
    """

    def __init__(self, place: Place, work: Path, seed: int, launched: float) -> None:
        self.place, self._work, self._seed, self._launched = place, work, seed, launched
        self.done = Soaked()
        self._began = time.monotonic()
        self._until, self._most = 0.0, 0

    def minutes(self) -> float:
        """Return how long it has taken so far."""
        return (time.monotonic() - self._began) / 60

    def run(self, only: int | None, minutes: float, injections: int) -> None:
        """Run one episode, or one after the other until the time is over or enough was injected."""
        self._until, self._most = time.monotonic() + 60 * minutes, injections
        reference = self._reference()
        numbers = [only] if only is not None else range(1_000_000)
        for number in numbers:
            self._episode(number, reference)
            if self._is_over():
                return

    def _is_over(self) -> bool:
        return time.monotonic() > self._until or (self._most > 0 and self.done.injections >= self._most)

    def _reference(self) -> Reference:
        run_dir, records = self._folders("reference")
        outcome = run_attempt(self.place, Injection(), run_dir, records)
        problems = judge(Injection(), outcome, run_dir)
        assert not problems, f"the run that was left alone: {problems}\n{outcome.output}"
        return Reference.of(run_dir, records)

    def _folders(self, name: str) -> tuple[Path, Path]:
        run_dir, records = self.place.disk.folder / name, self._work / name
        shutil.rmtree(records, ignore_errors=True)
        records.mkdir()
        return run_dir, records

    def _episode(self, number: int, reference: Reference) -> None:
        """Interrupt one run until it is finished; the first and every third keep ranks and ZeRO stage."""
        rng, exact = random.Random(f"{self._seed}/{number}"), number % 3 == 0
        run_dir, records = self._folders(f"episode-{number}")
        results: list[Result] = []
        struck_at: float | None = None
        for turn in range(2 * _MOST_TURNS):
            injection = draw(rng, exact=exact, launched=self._launched)
            if turn >= _MOST_TURNS or self._is_over():
                injection = Injection(setup=injection.setup)
            result, outcome = self._attempt(number, turn, injection, run_dir, records)
            if struck_at is not None and outcome.first_step is not None:
                results[-1].recovery_seconds = outcome.first_step - struck_at
            struck_at = outcome.struck
            results.append(result)
            if (run_dir / "model").exists() or outcome.hung:
                break
        if (run_dir / "model").exists():
            was_full = any(result.struck and result.injection.act in (FULL, FULL_A_WHILE) for result in results)
            found = compare(reference, run_dir, records, exact=exact, was_full=was_full)
            self.done.runs.append(found)
            for problem in found.problems:
                self._report(number, "at its end", problem)
        elif not results[-1].problems:
            results[-1].problems.append(f"not finished after {len(results)} attempts")
        if any(result.problems for result in results) or (self.done.runs and self.done.runs[-1].problems):
            kept = self._work / "kept" / f"episode-{number}"
            shutil.copytree(run_dir, kept, dirs_exist_ok=True)
            self.done.kept.append(str(kept))
        else:
            shutil.rmtree(records)
        shutil.rmtree(run_dir)

    def _attempt(
        self, number: int, turn: int, injection: Injection, run_dir: Path, records: Path
    ) -> tuple[Result, Outcome]:
        damaged = bool(injection.damage) and damage(run_dir, injection.damage)
        known = unsound(run_dir)
        outcome = run_attempt(self.place, injection, run_dir, records)
        struck = outcome.struck is not None
        result = Result(number, turn, injection, struck, damaged, outcome.codes, outcome.seconds)
        self.done.attempts.append(result)
        result.problems += [*judge(injection, outcome, run_dir), *sorted(unsound(run_dir) - known)]
        what = injection.kind if struck else f"not reached: {injection.kind}" if injection.act else "left alone"
        print(
            f"{self.minutes():6.1f} min {number}.{turn}: {injection.form}, {injection.setup.ranks} rank(s), "
            f"ZeRO-{injection.setup.zero}, {what}{f' at {injection.point}' if injection.point else ''}"
            f"{f', after {injection.damage}' if damaged else ''}: {outcome.codes}, {outcome.seconds:.1f} s",
            flush=True,
        )
        for problem in result.problems:
            self._report(number, f"attempt {turn}", problem)
        return result, outcome

    def _report(self, number: int, when: str, problem: str) -> None:
        print(
            f"PROBLEM in run {number}, {when}: {problem}\n  records and output: {self._work / f'episode-{number}'}; "
            f"again: python benchmarks/soak.py --seed {self._seed} --episode {number}",
            flush=True,
        )


def judge(injection: Injection, outcome: Outcome, run_dir: Path) -> list[str]:
    """Return what is not as documented about how an attempt ended."""
    problems = []
    finished = (run_dir / "model").exists()
    struck = outcome.struck is not None
    allowed = (injection if struck else Injection()).codes() | ({0} if finished else set())
    if outcome.hung:
        problems.append("it did not end, and was killed")
    elif not set(outcome.codes) <= allowed:
        problems.append(f"exit code(s) {outcome.codes}, documented are {sorted(allowed)}")
    elif set(outcome.codes) == {0} and not finished and injection.form != "deepspeed":
        problems.append("exit code 0, and there is no model/")
    if outcome.left:
        problems.append(f"processes were left: {outcome.left}")
    of_deepspeed = injection.form == DEEPSPEED and injection.act == INT  # its launcher ends in one
    if "Traceback" in outcome.output and not of_deepspeed:
        problems.append("its output holds a traceback")
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/soak.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of what is injected (default: %(default)s)")
    parser.add_argument("--episode", type=int, metavar="N", help="this run alone, to repeat it")
    parser.add_argument("--injections", type=int, default=0, metavar="N", help="end after so many; 0: by time alone")
    parser.add_argument(
        "--launched", type=float, default=0.25, metavar="SHARE", help="share of real launchers (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="where it works (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the figures (default: DIR/summary.json)")
    return parser


if __name__ == "__main__":
    main()
