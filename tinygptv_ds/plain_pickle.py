"""Pickles that hold plain values, read without running any code: lists, dictionaries, texts and numbers."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

from tinygptv_ds.errors import DataError


def load_plain(data: bytes, encoding: str = "utf-8") -> Any:
    """Return what a pickle holds.

    Args:
        data: the pickle.
        encoding: of byte strings of Python 2.

    Raises:
        DataError: it names something to import or call, or would take more memory than its size explains.
        Exception: it is no whole pickle; nearly any kind.
    """
    _check_memo(data)
    return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()


def _check_memo(data: bytes) -> None:
    """Refuse a pickle that numbers a value beyond its own length: the unpickler takes 16 bytes for each below.

    Seven bytes could thus take 64 GB. A text may look like such a number; only then is every opcode looked at.
    """
    binary = re.finditer(rb"r(?=(.{4}))", data, re.DOTALL)  # LONG_BINPUT; the number of PUT is written out
    suspicious = any(int.from_bytes(match[1], "little") > len(data) for match in binary)
    if not suspicious and not re.search(rb"p\d{%d}" % len(str(len(data))), data):
        return
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("LONG_BINPUT", "PUT") and argument is not None and argument > len(data):
            raise DataError(f"refused: it numbers a value {argument}, more than its {len(data)} bytes can hold")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise DataError(f"refused: it names {module_name}.{global_name}")
