"""Batches on their way to the device, next to the computing that is still under way there."""

from __future__ import annotations

import torch

from tinygptv_ds.data.loader.batch import Batch


def model_inputs(batch: Batch) -> dict:
    """Return the keyword arguments of the model's packed forward."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "pixel_values": batch.pixel_values,
        "image_features": batch.image_features,
        "image_rows": batch.image_rows,
        "image_index": batch.image_index,
        "target_rows": batch.target_rows,
        "targets": batch.targets,
        "dropout_keys": batch.dropout_keys,
    }


class Transfer:
    """Copies batches to a device; on a GPU in a stream of its own, so that a copy overlaps with the step before it.

    The host runs ahead of the GPU: when it asks for the next batch, most of the last step is still queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, to be used in the current stream."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        # The memory was taken in the copying stream: it must not be given out again before the computing is done.
        return moved.record_stream(computing)
