"""What rank 0 finds out alone, known to all ranks; and a mistake that it finds, raised by all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from tinygptv_ds import errors
from tinygptv_ds.distributed import Ranks


def broadcast_from_rank0(ranks: Ranks, find: Callable[[], Any]) -> Any:
    """What `find` gives on rank 0, plain values as of JSON, on every rank. To be called on all ranks.

    Raises:
        TinyGPTVError: `find` raised one on rank 0; it is raised everywhere, so that the ranks end alike.
    """
    answer: dict[str, Any] = {}
    if ranks.is_main:
        try:
            answer = {"found": find()}
        except errors.TinyGPTVError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
    if ranks.world_size > 1:
        answer = json.loads(_from_rank_0(json.dumps(answer)))
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer["found"]


def _from_rank_0(text: str) -> str:
    """Its text, by a broadcast of its bytes."""
    on_gpu = distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(data), device=device)
    distributed.broadcast(size, 0)
    if distributed.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    distributed.broadcast(data, 0)
    return bytes(data.tolist()).decode()
