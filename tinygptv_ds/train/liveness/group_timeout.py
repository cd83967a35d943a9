"""How long collectives may wait, changed while a run is under way."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed


def set_group_timeout(timeout: timedelta) -> None:
    """Set how long collectives that begin from now on may wait, those of DeepSpeed's own process groups included."""
    c10d = torch.distributed.distributed_c10d
    # Older releases of torch have it under the private name only. Remove the fallback with their support.
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):
        set_timeout(timeout, group)
