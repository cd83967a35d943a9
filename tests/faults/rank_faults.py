"""Faults for `forked.started` that stop a rank or let it wait; the ranks themselves import them."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from helpers.patience import PATIENCE

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.train import loop
from tinygptv_ds.train.liveness.channel import Channel
from tinygptv_ds.train.run import Run
from tinygptv_ds.weights import assemble


def watched(at: int = -1, number: int = 0, rank: int = 0, after: str = "", pause: str = "") -> None:
    """Note what every step is fed, and in step `at` send one rank a signal, or let it wait.

    Args:
        at: the step, from 0.
        number: the signal.
        rank: which rank.
        after: the checkpoint that has to be there before the signal is sent.
        pause: wait until a file of this name is in the run directory.
    """
    optimizer_step = loop.optimizer_step

    def noted(training: Run, step: int, loaded: list[MicroBatch], *rest: object) -> None:
        run, mine = training.job.run_dir, training.ranks.rank
        with (run / f"fed-{mine}.jsonl").open("a") as file:
            ids = [[list(vars(ref).values()) for ref in item.batch.sample_ids] for item in loaded]
            file.write(json.dumps([step, ids]) + "\n")
        optimizer_step(training, step, loaded, *rest)
        if step == at and mine == rank:
            (run / "reached").touch()
            for name in filter(None, (after and f"checkpoints/{after}", pause)):
                wait_for(run / name)
            if number:
                os.kill(os.getpid(), number)

    loop.optimizer_step = noted


def interrupted(rank: int) -> None:
    """Let Ctrl-C reach one rank, and no other, when it begins to load and is connected to the others."""
    build_model, add, connected = assemble.build_model, Channel._add, threading.Event()

    def adding(*args: Any) -> None:
        add(*args)
        connected.set()

    def interrupting(*args: object, **more: object) -> object:
        if int(os.environ["RANK"]) == rank:
            assert connected.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGINT)
        return build_model(*args, **more)

    assemble.build_model, Channel._add = interrupting, adding


def killed_before_its_first_word(rank: int) -> None:
    """Let one rank die of SIGKILL when it is connected to rank 0 and its watchdog has not begun."""
    start = Channel.start

    async def dying(channel: Channel) -> None:
        if int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        await start(channel)

    Channel.start = dying


def wait_for(path: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.002)


def steps_fed(run: Path, rank: int) -> list[tuple[int, list]]:
    """Return the steps that a rank was fed, one after the other, and the samples of each."""
    path = run / f"fed-{rank}.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def fed(run: Path, ranks: int) -> dict[int, list[list]]:
    """Return, by step, the samples that all ranks together were fed last, in the order of the stream."""
    steps: dict[int, dict[int, list]] = {}
    for rank in range(ranks):
        for step, micro_batches in steps_fed(run, rank):
            steps.setdefault(step, {})[rank] = [ref for micro in micro_batches for ref in micro]
    return {step: sorted(ref for refs in by_rank.values() for ref in refs) for step, by_rank in steps.items()}
