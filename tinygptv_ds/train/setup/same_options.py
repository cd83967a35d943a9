"""The check that every rank has the options that were typed: a remote shell on the way may have changed them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tinygptv_ds.distributed import Ranks, gather
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import fingerprint_differences
from tinygptv_ds.processes import command_line, own_processes

_OUTER = ("deepspeed", "deepspeed.launcher.runner")
_REMEDY = (
    "start the run with 'bash launch/stageN.sh --hostfile FILE' or 'tinygptv-ds train stageN --hostfile FILE', which "
    "protect options from the shells of the other nodes"
)


def check_typed_options(options: Sequence[str]) -> None:
    """Compare this rank's options with those of the `deepspeed` command, where that runs on this host.

    pdsh joins the words with blanks, and a shell on each node reads the line: quotes, `$`, `#` and `&` are lost.

    Args:
        options: this process's command line as it came.

    Raises:
        ConfigError: they are not the ones that were typed.
    """
    if "CROSS_RANK" not in os.environ:  # not under DeepSpeed's launcher
        return
    ours = [word for word in options if not word.startswith(("--local_rank", "--local-rank"))]
    script, port = Path(sys.argv[0]).stem, os.environ.get("MASTER_PORT", "")
    typed = [tail for tail in (_after_script(words, script, port) for words in _commands()) if tail is not None]
    if typed and ours not in typed:
        raise ConfigError(
            f"these options are not those that were typed: {' '.join(ours)!r}, not {' '.join(typed[0])!r}; {_REMEDY}"
        )


def check_same_options(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Compare what the options of all ranks come to. Call on all ranks.

    Args:
        ranks: this process among the ranks.
        settings: plain values by name (`Job.settings`).

    Raises:
        ConfigError: on every rank, if one of them differs from rank 0.
    """
    outcomes = gather(ranks, settings)
    for rank, other in enumerate(outcomes):
        differing = list(fingerprint_differences(outcomes[0], other, recorded_in="on rank 0", current_in="").values())
        if differing:
            listed = "\n".join(f"  - {line.rstrip()} on rank {rank}" for line in differing)
            raise ConfigError(f"rank {rank} has other options or another recipe than rank 0:\n{listed}\n{_REMEDY}")


def _commands() -> list[list[str]]:
    """Return the command lines of this user's processes that are DeepSpeed's outer launcher."""
    commands = map(command_line, own_processes())
    return [words for words in commands if any(Path(word).name in _OUTER for word in words[:4])]


def _after_script(words: Sequence[str], script: str, port: str) -> list[str] | None:
    """Return the words after the script, `launch/stageN.sh` or its .py, of a launch with this port; None: another."""
    places = [number for number, word in enumerate(words) if Path(word).stem == script]
    if not places:
        return None
    before = " ".join(words[: places[0]]).replace("=", " ").split()
    ports = [after for word, after in pairwise(before) if word == "--master_port"]
    return list(words[places[0] + 1 :]) if (ports or ["29500"])[-1] == port else None
