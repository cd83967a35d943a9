"""What is counted in an encoded image before and while Pillow reads it, so that a small file cannot take long.

Pillow itself bounds the pixels. It does not bound blocks, comments, scans and strips, of which a few megabytes may hold
millions.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from tinygptv_ds.errors import DataError

_MOST_READS = 10_000  # by Pillow of a header; photos need fewer than 500
_MOST_SCANS = 100  # of a JPEG; progressive ones have about ten
_MOST_SCANNED = 1_200_000_000  # pixels times scans; a second is about 600 million
_MOST_COMMENTS = 1_000  # of a plain PBM, PGM or PPM, which Pillow skips in quadratic time
_LONGEST_PLAIN = 4_000_000  # bytes of such a file, whose numbers are text; Pillow reads them in a second
# Values of one entry of a TIFF, or of EXIF, which is in the same form: of strips of one row, the largest images have
# 30,000. Pillow takes a second for 130,000.
_MOST_TIFF_VALUES = 65_536
_TIFF_BYTES = (1, 2, 6, 7)  # types of entries that Pillow takes as one value, e.g. texts and color profiles
_EXIF_START = b"Exif\0\0"


class ImageError(DataError):
    """An image that cannot be used.

    Attributes:
        reason: one word for counting: "corrupt_image" (damaged, cut short, too large or no image),
            "unsupported_image" (an image or video in a format that is not decoded), or "unsupported_depth" (pixels of
            more than 8 bits that cannot be scaled).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, str(self))


class EncodedImage(io.BytesIO):
    """An encoded image that Pillow reads in a bounded number of pieces.

    A few megabytes can be millions of empty blocks, or comments that Pillow joins in quadratic time.
    """

    def __init__(self, encoded: bytes) -> None:
        super().__init__(encoded)
        self.reads_left = _MOST_READS

    def allow_data(self, format: str | None) -> None:
        """Allow as many reads as the pixels need after the header, and those that look for a second frame."""
        size = len(self.getbuffer())
        # GIF's decoder reads 64 KiB at a time, PNG's a block; those of QOI and RLE a byte.
        self.reads_left = _MOST_READS + {"GIF": 0, "PNG": size // 200}.get(format or "", 4 * size)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file does; raise ImageError where there have been too many reads."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise _refusal("it consists of too many small blocks")
        return super().read(size)


def check_before_opening(encoded: bytes) -> None:
    """Check what Pillow reads before it knows the size of an image.

    Raises:
        ImageError: it would take long.
    """
    if encoded.startswith((b"P1", b"P2", b"P3")):
        if len(encoded) > _LONGEST_PLAIN:
            raise _refusal(f"its pixels are text of over {_LONGEST_PLAIN:,} bytes; save it as PNG")
        if encoded.count(b"#") > _MOST_COMMENTS:
            raise _refusal(f"it has over {_MOST_COMMENTS:,} comments")
    most = max(_tiff_counts(encoded), default=0)
    if most > _MOST_TIFF_VALUES:
        raise _refusal(f"it is a TIFF of {most:,} strips or other values; at most {_MOST_TIFF_VALUES:,} are read")


def check_scans(encoded: bytes, width: int, height: int) -> None:
    """Check the number of scans of a progressive JPEG, each of which takes as long as all pixels.

    Raises:
        ImageError: there are too many.
    """
    scans = encoded.count(b"\xff\xda")
    if scans > min(_MOST_SCANS, _MOST_SCANNED // max(width * height, 1)):
        raise _refusal(f"it is a JPEG of {scans:,} scans for {width} x {height} pixels")


def exif_is_small(exif: object) -> bool:
    """Return whether Pillow reads these bytes of EXIF at once; anything else than bytes is."""
    if not isinstance(exif, bytes):
        return True
    return max(_tiff_counts(exif.removeprefix(_EXIF_START)), default=0) <= _MOST_TIFF_VALUES


def _tiff_counts(data: bytes) -> Iterator[int]:
    """Yield the number of values of each entry in the first directory of a TIFF; none of other files."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43  # BigTIFF, whose sizes take eight bytes
    offset, length, entry = ("Q", 8, "HHQ8x") if big else ("I", 2, "HHI4x")
    (start,) = struct.unpack_from(f"{order}{offset}", data, 8 if big else 4)
    if start + length > len(data):
        return
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    end = min(start + length + entries * struct.calcsize(order + entry), len(data))
    whole = (end - start - length) // struct.calcsize(order + entry) * struct.calcsize(order + entry)
    for _, kind, count in struct.iter_unpack(order + entry, data[start + length : start + length + whole]):
        if kind not in _TIFF_BYTES:
            yield count


def _refusal(why: str) -> ImageError:
    return ImageError("corrupt_image", f"the image cannot be decoded: {why}")
