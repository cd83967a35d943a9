"""torch's flight recorder: the last collectives of every rank, with the lines that called them.

NCCL's watchdog writes it when a collective fails or takes too long. Ours ends a run before that, so it is written with
the stacks as well. Read it with `tinygptv-ds doctor RUN` or with torch's own `torchfrtrace`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch import distributed

from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.liveness.stack_files import COLLECTIVES, FOLDER

# Variables by their present name and the one before torch 2.9, which torch also reads.
_ENTRIES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_PREFIX = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_ON_TIMEOUT = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)
_KEPT = 2000  # collectives of a rank: a few hundred steps, in less than 2 MB
_SECONDS = 5.0  # it asks CUDA how far collectives are, which may not answer


def enable_flight_recorder(run_dir: Path) -> None:
    """Let torch record collectives, and NCCL write them to a run directory; what the user has set stays.

    Call it before the process group is made, which reads these variables.
    """
    where = str(run_dir.absolute() / FOLDER / COLLECTIVES)
    for names, value in ((_ENTRIES, str(_KEPT)), (_PREFIX, where), (_ON_TIMEOUT, "1")):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def write_flight_record(path: Path) -> None:
    """Write what is recorded, as NCCL does; gives up after some seconds."""
    thread = threading.Thread(target=_write, args=(path,), name="flight recorder", daemon=True)
    thread.start()
    thread.join(_SECONDS)


def _write(path: Path) -> None:
    try:
        path.write_bytes(_recorded())
    except (OSError, AttributeError, RuntimeError) as error:
        LOGGER.warning("%s cannot be written (%s)", path, error)


def _recorded() -> bytes:
    """Return the record as a pickle of plain values.

    These functions have private names. Remove when torch writes the record on request by a public one.
    """
    uses_nccl = distributed.is_initialized() and "nccl" in distributed.get_backend()
    record: bytes = getattr(torch._C._distributed_c10d, "_dump_nccl_trace" if uses_nccl else "_dump_fr_trace")()
    return record
