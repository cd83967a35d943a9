"""PyTorch files, opened without reading their tensors and without executing what a pickle asks for.

A file may be hostile: what it claims is compared with its size before memory is taken for it, and the time and memory
for the pickle itself are bounded.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, in_memory, read_values
from tinygptv_ds.weights.other_files import other_text

# A checkpoint of the published size has a pickle of about 1 MB with 100,000 values, nested less than 10 deep.
_LEAST = 64  # bytes; no file of weights is smaller
_MAX_PICKLE = 64_000_000
_MAX_VALUES = 500_000
_MAX_DEPTH = 64


def open_torch(path: Path, known: Sequence[tuple[Any, str]] = ()) -> Any:
    """Return what a PyTorch file holds, with a `Stored` for every tensor.

    Args:
        path: the file.
        known: (stand-in, "module.name") of harmless classes that may occur next to tensors and plain containers; the
            stand-in replaces them, so that no foreign code is imported.

    Raises:
        WeightsError: the file is damaged, holds other Python objects, or claims more than it holds.
    """
    with path.open("rb") as file:
        head = file.read(2)
    if path.stat().st_size < _LEAST:
        raise WeightsError(f"{path}: damaged or cut short after {path.stat().st_size} bytes; download or copy it again")
    if head != b"PK" and not head.startswith(b"\x80"):  # an archive, or a pickle
        raise WeightsError(
            f"{path}: neither a safetensors nor a PyTorch file, for {other_text(path)}; name a .safetensors, .pth or "
            ".bin file of the model"
        )
    if head != b"PK":  # before torch 1.6: nothing is known without reading all
        return _map_tensors(load_torch(path, known), in_memory, path)
    with FakeTensorMode():
        content = load_torch(path, known)
    return _map_tensors(content, partial(_in_file, path), path)


def load_torch(path: Path, known: Sequence[tuple[Any, str]] = ()) -> Any:
    """Read a whole PyTorch file with the restricted unpickler; `known` as in `open_torch`.

    Raises:
        WeightsError: the file is damaged, or holds Python objects other than tensors and plain containers.
    """
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(list(known)), _quiet():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:Unsupported \w+: |unsupported )(?:GLOBAL )?([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise WeightsError(
            f"{path}: holds more than tensors and plain values{what}, or is damaged; it is not opened because "
            "unpickling could run code. Take a safetensors version, or one saved with torch.save of a plain state dict"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything, RecursionError and MemoryError included
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(
            f"{path}: damaged, cut short or not a PyTorch file ({reason or type(error).__name__}); download or copy "
            "it again, and compare its size with the source's"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging tracebacks and warnings about what a file holds; the error says it in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.disabled = before


def _check_archive(path: Path) -> None:
    """Check an archive of torch.save before torch reads it; older files, a bare pickle, have no such index."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                return
        raise WeightsError(
            f"{path}: cut short: an archive of torch.save without its end, after {path.stat().st_size:,} bytes; its "
            "download or copy has not finished, run it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path}: a damaged archive ({error}); download or copy it again") from None
    names = {Path(entry.filename).name for entry in entries}
    if "constants.pkl" in names:
        raise WeightsError(
            f"{path}: a TorchScript program, not weights; take the model's state dict, "
            "torch.save(torch.jit.load(FILE).state_dict(), OUT)"
        )
    pickles = [entry.file_size for entry in entries if Path(entry.filename).name == "data.pkl"]
    if not pickles:
        raise WeightsError(
            f"{path}: a zip archive that torch.save has not written; unpack it and name the weights in it"
        )
    if max(pickles) > _MAX_PICKLE:
        raise WeightsError(
            f"{path}: its pickle takes {max(pickles):,} bytes, more than the {_MAX_PICKLE:,} that weights need; it is "
            "not opened. Save the tensors alone, as safetensors or with torch.save of a plain state dict"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise WeightsError(
            f"{path}: a compressed archive, which torch.save does not write; save the state dict again with torch.save"
        )


def _map_tensors(content: Any, stored: Callable[[Tensor], Stored], path: Path) -> Any:
    """Return the same content with every tensor replaced.

    Raises:
        WeightsError: it is nested deeper, or holds more values, than any weights: a pickle of a few bytes can refer to
            the same list again and again.
    """
    left = _MAX_VALUES

    def mapped(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > _MAX_DEPTH or left < 0:
            what = f"nested more than {_MAX_DEPTH} deep" if left >= 0 else f"of more than {_MAX_VALUES:,} values"
            raise WeightsError(f"{path}: its content is {what}, so it is no file of weights, or a malicious one")
        if type(value) in (list, tuple):
            return type(value)([mapped(item, depth + 1) for item in value])
        if isinstance(value, dict):
            return {key: mapped(item, depth + 1) for key, item in value.items()}
        return stored(value) if isinstance(value, Tensor) else value

    return mapped(content, 0)


def _in_file(path: Path, fake: Tensor) -> Stored:
    """Find the place of a tensor in a PyTorch file, which `torch.load` notes under `FakeTensorMode`."""
    item = fake.element_size()
    # A private attribute. Remove when torch.load has a public way to read single tensors of a file.
    storage_begin: Any = fake.untyped_storage()._checkpoint_offset
    offset = storage_begin + int(fake.storage_offset()) * item
    shape, stride = tuple(fake.shape), fake.stride()
    count = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if fake.numel() else 0
    size = path.stat().st_size
    if offset < 0 or max(count, fake.numel()) * item > size - min(offset, size) or min(stride, default=0) < 0:
        raise WeightsError(
            f"{path}: a tensor of shape {list(shape)} in {str(fake.dtype).removeprefix('torch.')} claims "
            f"{fake.numel() * item:,} bytes from position {offset:,}, but the file has {size:,}; it is cut short or "
            "malicious: download or copy it again"
        )
    values = partial(read_values, path, offset, fake.dtype)
    flat = values if fake.is_contiguous() else None
    return Stored(shape, fake.dtype, lambda: values(0, count).as_strided(shape, stride), flat)
