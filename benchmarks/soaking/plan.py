"""What is injected, drawn from a seed, and the exit codes that docs/train/resume.md allows after it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from benchmarks.soaking.damage import DAMAGES
from benchmarks.soaking.inside import LOAD, MID_FILE, START, STEP

FORKED, TRAIN, RESTARTED, DEEPSPEED = "forked", "train", "train --restarts", "deepspeed"
RANK, WORKER, NODE, OUTER, FRONT = "rank", "worker", "per-node launcher", "outer launcher", "verb train"
KILL, FREEZE, PAUSE = "SIGKILL", "SIGSTOP, then SIGKILL", "SIGSTOP, then SIGCONT"
TERM, INT, USR1 = "SIGTERM", "SIGINT", "SIGUSR1"
FULL, FULL_A_WHILE = "disk full", "disk full for a while"
_SAVING = ("save", MID_FILE, MID_FILE, "state", "rename", "prune", "removal")
_STOPS = {TERM: 15, INT: 2, USR1: 10}
_VICTIMS = {
    FORKED: (RANK, RANK, RANK, RANK, WORKER),
    TRAIN: (RANK, RANK, RANK, WORKER, NODE, NODE, OUTER, FRONT, FRONT),
    RESTARTED: (RANK, NODE),
    DEEPSPEED: (RANK, NODE, OUTER),
}


@dataclass(frozen=True)
class Setup:
    """How an attempt computes, which must not change any sample."""

    ranks: int = 2
    zero: int = 2
    workers: int = 1
    micro_batch: int = 2
    deepspeed_checkpoints: bool = False

    def options(self) -> list[str]:
        """Return the options of the stage."""
        changes = {
            "data.num_workers": self.workers,
            "train.micro_batch_size": self.micro_batch,
            "train.deepspeed_checkpoints": str(self.deepspeed_checkpoints).lower(),
        }
        zero = "stage: 3, stage3_param_persistence_threshold: 0" if self.zero == 3 else f"stage: {self.zero}"
        sets = [f"--set={key}={value}" for key, value in changes.items()]
        return [*sets, f"--set=deepspeed.zero_optimization={{{zero}}}"]


@dataclass(frozen=True)
class Injection:
    """One attempt of a run and what happens to it.

    Attributes:
        form: how it is started.
        setup: how it computes.
        act: what is done; empty: nothing.
        victim: the kind of process that it is done to; empty for the disk.
        point: of the run at which it is done, where `rank` waits for it at the `count`-th time.
        rank: that rank; also the victim where it is a rank.
        count: at which time that the rank comes there.
        room: bytes that a full disk has left.
        damage: what is done to the run directory before; empty: nothing.
    """

    form: str = FORKED
    setup: Setup = Setup()
    act: str = ""
    victim: str = ""
    point: str = ""
    rank: int = 0
    count: int = 1
    room: int = 0
    damage: str = ""

    @property
    def kind(self) -> str:
        """Its row of the table."""
        return f"{self.act} of a {self.victim}" if self.victim else self.act

    @property
    def spares_the_run(self) -> bool:
        """Whether training goes on afterwards."""
        return not self.act or self.victim == WORKER or self.act in (PAUSE, FULL_A_WHILE) or self.form == RESTARTED

    def codes(self) -> set[int]:
        """Return the documented exit codes of what was started, or of the ranks where those were."""
        allowed = {0} if self.spares_the_run else set()
        if self.act in (FULL, FULL_A_WHILE):
            return {0, 2}
        if not self.act or self.victim == WORKER or self.act == PAUSE:
            return allowed
        number = _STOPS.get(self.act, 9)
        code = 75 if number == 9 else 128 + number
        if self.form == FORKED:  # a rank before its handlers dies of the signal, and the others lose it
            return allowed | {code, 75, -number}
        if self.victim == FRONT and number == 9:
            return {-9}
        if self.form == DEEPSPEED:
            return allowed | _of_deepspeed(self.victim, number, code)
        # A launcher's process that is not the one that the user has started is lost, whatever has ended it.
        return allowed | {code} | ({75} if self.victim in (NODE, OUTER) else set())


def _of_deepspeed(victim: str, number: int, code: int) -> set[int]:
    """Return the codes of DeepSpeed's own launcher."""
    if victim == OUTER:
        return {-number}
    if victim == NODE:  # where its own handler comes before the end of a rank, it exits with 1
        return {0 if number == 9 else 1, code, 256 - number}
    return {code, 256 - number}


def draw(rng: Random, *, exact: bool, launched: float) -> Injection:
    """Return the next injection.

    Args:
        rng: all of it depends on this.
        exact: keep the number of ranks and the ZeRO stage, so that every bit must stay the same.
        launched: share of attempts that real launchers start; ranks are forked in the others.
    """
    others = [TRAIN, TRAIN, TRAIN, RESTARTED, DEEPSPEED, DEEPSPEED]
    form = rng.choice(others) if rng.random() < launched else FORKED
    ranks = 2 if exact else rng.choice((1, 2, 2, 3))
    setup = Setup(
        ranks=ranks,
        zero=2 if exact else rng.choice((1, 2, 2, 3)),
        workers=rng.choice((0, 1)),
        micro_batch=2 if exact else rng.choice((1, 2, 2 if ranks == 2 else 4)),  # 12 samples must divide
        deepspeed_checkpoints=rng.random() < 0.15,
    )
    damage = rng.choice(DAMAGES) if rng.random() < 0.2 else ""
    act, victim = _act(rng, form)
    point = _point(rng, form, act, victim, setup)
    if victim == WORKER:
        setup = Setup(setup.ranks, setup.zero, 1, setup.micro_batch, setup.deepspeed_checkpoints)
    on_rank_0 = point in (*_SAVING, "latest", "model")
    rank = 0 if on_rank_0 else rng.randrange(setup.ranks)
    room = rng.choice((0, 4096, 24 << 10, 200 << 10))
    most = {STEP: 6, MID_FILE: 20}.get(point, 2 if point in _SAVING else 1)
    return Injection(form, setup, act, victim, point, rank, rng.randint(1, most), room, damage)


def _act(rng: Random, form: str) -> tuple[str, str]:
    """Return what is done, and to which kind of process."""
    if form in (FORKED, TRAIN) and rng.random() < 0.15:
        return rng.choice((FULL, FULL_A_WHILE)), ""
    victim = rng.choice(_VICTIMS[form])
    if victim == WORKER or form == RESTARTED:
        return KILL, victim
    if victim == RANK and rng.random() < 0.2:
        return rng.choice((FREEZE, PAUSE)), victim
    return rng.choice((KILL, KILL, KILL, TERM, INT, USR1 if victim in (RANK, FRONT) else KILL)), victim


def _point(rng: Random, form: str, act: str, victim: str, setup: Setup) -> str:
    if victim == WORKER or act == FULL_A_WHILE:
        return STEP
    if setup.deepspeed_checkpoints and rng.random() < 0.3:
        return "latest"
    share = rng.random()
    if share < 0.15:
        # A forked rank has imported torch, and no launcher ends the others before the ranks have met.
        return LOAD if form == FORKED else rng.choice((START, "check", LOAD))
    if share < 0.5:
        return STEP
    return rng.choice(_SAVING) if share < 0.93 else "model"
