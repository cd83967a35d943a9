"""Damaged and hostile tars and indexes: a sample, a SampleError or a DataError, nothing else, and in little memory."""

import io
import json
import logging
import random
import resource
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinygptv_ds.data.shards.index import HEADER_BYTES, build_index, load_index
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import render

MUTATIONS = 5000
BLOCK = 512
SPARE_MEMORY = 256 << 20
SIZES = (-1, 0, 1, 511, 513, 10_000, 2**31, 2**33 - 1, 2**63 - 1, 2**63, 2**80)
PAX = (b"size=%d", b"path=../../etc/x.json", b"GNU.sparse.major=1", b"GNU.sparse.size=%d", b"GNU.sparse.map=0,%d")
WORDS = (b"\\ud800", b"[" * 400, b"9" * 5000, b"\xff", b"NaN", b"\x00", b"{", b'"caption": "a",', b"null")

ANSWERS = (b'"answer": [11] ', b'"answer": [   ]', b'"reply" : "yes"')  # in the place of "answer": "yes"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A header that claims exabytes must not be believed."""
    logging.disable(logging.WARNING)
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    logging.disable(logging.NOTSET)


def shard(dialect: int) -> bytes:
    """Three samples, members that are no files, and a name that is too long for a plain header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dialect) as tar:
        long = "n" * (150 if dialect != tarfile.USTAR_FORMAT else 90)
        for name in ("a", "b/c.d/e", long):
            record = json.dumps({"pool": "vqa", "answer": "yes", "text": name[:20], "bbox": [1, 2.5]}).encode()
            for suffix, data in (("json", record), ("jpg", b"image" * 90)):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("x.json")
            info.type, info.linkname = kind, "a.json"
            tar.addfile(info)
    return out.getvalue()


def flip(tar: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        tar[rng.randrange(len(tar))] = rng.randrange(256)


def truncate(tar: bytearray, rng: random.Random) -> None:
    del tar[rng.randrange(len(tar)) :]


def splice(tar: bytearray, rng: random.Random) -> None:
    """Blocks taken out, doubled or moved."""
    unit = rng.choice((BLOCK, BLOCK, 100))
    start = rng.randrange(len(tar) // unit) * unit
    piece = tar[start : start + unit * rng.randint(1, 4)]
    if rng.random() < 0.7:
        del tar[start : start + len(piece)]
    if rng.random() < 0.7:
        at = rng.randrange(len(tar) // unit + 1) * unit
        tar[at:at] = piece


def edit_header(tar: bytearray, rng: random.Random) -> None:
    """A header with another size, type or name and the right checksum."""
    at = rng.choice(headers(tar))
    for _ in range(rng.randint(1, 2)):
        field = rng.choice(("size", "size", "type", "name", "magic"))
        if field == "size":
            tar[at + 124 : at + 136] = number(rng.choice(SIZES), rng)
        elif field == "type":
            tar[at + 156] = rng.choice(b"01234567xXgLKSVDNMA\0")
        elif field == "name":
            start = at + rng.randrange(100)
            tar[start] = rng.choice(b"./\0\xff\xc3a")
        else:
            tar[at + 257 : at + 265] = rng.choice((b"ustar  \0", b"ustar\x0000", b"\0" * 8))
    fix_checksum(tar, at)


def insert_pax(tar: bytearray, rng: random.Random) -> None:
    """One or many extended headers before a member, also nested ones."""
    records = b""
    for _ in range(rng.randint(1, 3)):
        record = rng.choice(PAX)
        record = b" " + (record % rng.choice(SIZES) if b"%" in record else record) + b"\n"
        length = len(record) + 2
        records += b"%d" % (length if rng.random() < 0.8 else rng.choice(SIZES)) + record
    header = bytearray(BLOCK)
    header[:5] = b"x.pax"
    header[124:136] = number(len(records), rng)
    header[156] = rng.choice(b"xxgLKS")
    header[257:265] = b"ustar\x0000"
    fix_checksum(header, 0)
    at = rng.choice(headers(tar))
    tar[at:at] = (header + records.ljust(BLOCK, b"\0")) * rng.choice((*[1] * 30, 3, 1200))


def edit_record(tar: bytearray, rng: random.Random) -> None:
    """Another text within a .json member, whose length stays."""
    start = tar.find(b'{"pool"', rng.randrange(len(tar) // 2))
    at, word = start + rng.randrange(80), rng.choice(WORDS)
    if rng.random() < 0.3:
        at, word = tar.find(b'"answer"', start), rng.choice(ANSWERS)
    tar[at : at + len(word)] = word


def headers(tar: bytearray) -> list[int]:
    """Where plausible headers stand."""
    return [at for at in range(0, len(tar) - BLOCK + 1, BLOCK) if tar[at + 257 : at + 262] == b"ustar"] or [0]


def number(value: int, rng: random.Random) -> bytes:
    """A header's number field of 12 bytes, in octal or base 256."""
    if 0 <= value < 8**11 and rng.random() < 0.7:
        return b"%011o\0" % value
    return (b"\x80" if value >= 0 else b"\xff") + (value % 2**88).to_bytes(11, "big")


def fix_checksum(tar: bytearray, at: int) -> None:
    header = tar[at : at + BLOCK]
    header[148:156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(header)


MUTATORS: list[Callable[[bytearray, random.Random], None]] = [
    *(flip, truncate, splice, edit_header, edit_header, insert_pax, edit_record)
]


def read_all(tar: Path) -> Iterator[str]:
    """What becomes of each sample."""
    reader = ShardReader()
    try:
        count = len(load_index(tar))
    except DataError:
        yield "no shard"
        return
    for index in range(count):
        try:
            sample = reader.read(tar, index)
        except SampleError as error:
            yield error.reason
            continue
        assert sum(map(len, sample.images)) <= tar.stat().st_size
        try:
            turns = render(sample.record, len(sample.images), lambda n: n - 1).turns
        except DataError:
            yield "bad_record"
            continue
        "".join(text for turn in turns for text in turn if text).encode()  # no tokenizer takes half a surrogate pair
        yield "read"


def test_mutated_tars(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = [shard(dialect) for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]
    seen: Counter[str] = Counter()
    for number in range(MUTATIONS):
        tar = tmp_path / f"{number}.tar"  # each under a new name: file systems take their time to replace a file
        data = bytearray(whole[number % 3])
        for _ in range(rng.choice((1, 1, 2, 3))):
            if len(data) >= BLOCK:
                rng.choice(MUTATORS)(data, rng)
        tar.write_bytes(data)
        try:
            seen.update(read_all(tar))
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error
        assert {path.name for path in tmp_path.iterdir()} <= {tar.name, f"{tar.name}.idx"}
        tar.unlink()
        tar.with_name(f"{tar.name}.idx").unlink(missing_ok=True)
    # All of it is reached, and most samples survive damage elsewhere.
    assert seen["read"] > MUTATIONS
    for outcome in ("no shard", "bad_json", "bad_record", "missing_record"):
        assert seen[outcome] > MUTATIONS // 500, seen


def test_mutated_indexes(tmp_path: Path) -> None:
    """Damage is noticed and the index built again; one forged with right checksums gives errors at most."""
    rng = random.Random(1)
    tar, index = tmp_path / "0.tar", tmp_path / "0.tar.idx"
    tar.write_bytes(shard(tarfile.GNU_FORMAT))
    true = build_index(tar)
    good, expected = index.read_bytes(), [true.members(i) for i in range(3)]
    for number in range(900):
        data = bytearray(good)
        forged = number % 3 == 0
        rng.choice((flip, truncate, splice_bytes))(data, rng)
        if forged and len(data) >= HEADER_BYTES:
            forge(data, good)
        index.unlink()
        index.write_bytes(data)
        try:
            if forged:
                list(read_all(tar))
            else:
                found = load_index(tar)
                assert [found.members(i) for i in range(len(found))] == expected
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error


def splice_bytes(data: bytearray, rng: random.Random) -> None:
    start, length, at = (rng.randrange(n) for n in (len(data), 20, len(data)))
    data[at:at] = data[start : start + length]


def forge(data: bytearray, good: bytes) -> None:
    """Both checksums right, and the tar named that lies there."""
    data[:24] = good[:24]
    body = bytes(data[HEADER_BYTES:])
    data[32:44] = struct.pack("<QI", len(body), zlib.crc32(body))
    data[44:48] = struct.pack("<I", zlib.crc32(bytes(data[:44])))
