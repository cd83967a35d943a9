"""Any bytes give pixels or a DataError, quickly, and in little memory if a header claims a huge image."""

import io
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import open_image, read_image_size, read_traits, to_pixels
from tinygptv_ds.processing.image_limits import check_scans

MUTATIONS = 6000
KINDS = {
    "JPEG": [{}, {"progressive": True}, {"subsampling": "4:2:0", "quality": 50}],
    "PNG": [{}, {"optimize": True}],
    "GIF": [{}, {"interlace": 1}],
    "WEBP": [{}, {"lossless": True}],
    "TIFF": [{}, {"compression": "tiff_lzw"}],
}


def drawing(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    ImageDraw.Draw(image).ellipse((5, 5, 30, 25), fill=(10, 220, 40), outline=(255, 255, 255))
    return image.convert(mode)


def originals() -> dict[str, list[bytes]]:
    """Return small images of every format, in color, gray, and with a palette if the format has one."""
    made: dict[str, list[bytes]] = {}
    for kind, variants in KINDS.items():
        for mode in ("RGB", "L") if kind in ("JPEG", "WEBP") else ("RGB", "L", "P"):
            for options in variants:
                out = io.BytesIO()
                drawing(mode).save(out, kind, **options)
                made.setdefault(kind, []).append(out.getvalue())
    return made


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Flip bits, set bytes (mostly in the header), truncate, omit or double a part, or append another file's end."""
    way, changed = rng.randrange(6), bytearray(data)
    at, to = sorted(rng.randrange(len(data)) for _ in range(2))
    if way == 0:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(min(len(data), 64))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    elif way == 2:
        del changed[at:]
    elif way == 3:
        del changed[at : min(to, at + 16)]
    elif way == 4:
        changed[at:at] = data[at:to]
    else:
        changed[at:] = other[rng.randrange(len(other)) :]
    return bytes(changed)


def with_right_sums(png: bytes) -> bytes:
    """Correct the chunks' checksums, so that the decoder reads what was changed."""
    made, at = bytearray(png), 8
    while at + 12 <= len(made):
        end = at + 8 + int.from_bytes(made[at : at + 4], "big")
        if end + 4 > len(made):
            break
        made[end : end + 4] = struct.pack(">I", zlib.crc32(made[at + 4 : end]))
        at = end + 4
    return bytes(made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(120)
def test_mutated_images() -> None:
    rng = random.Random(0)
    files = originals()
    everything = [data for kind in files.values() for data in kind]
    decoded = dict.fromkeys(files, 0)
    refused = dict.fromkeys(files, 0)
    for number in range(MUTATIONS):
        kind = list(files)[number % len(files)]
        data = mutated(rng.choice(files[kind]), rng.choice(everything), rng)
        if kind == "PNG":
            data = with_right_sums(data)
        try:
            pixels = to_pixels(data, 14, rng.choice(["exact", "fast"]))
        except DataError as error:
            refused[kind] += 1
            assert "\n" not in str(error)
        else:
            decoded[kind] += 1
            assert (pixels.shape, pixels.dtype) == ((3, 14, 14), np.uint8)
    # were nearly all refused at once, or nearly all unharmed, not much would have been tried
    for kind in files:
        assert min(decoded[kind], refused[kind]) > MUTATIONS / len(files) / 25, (decoded, refused)


# ---- what a header claims --------------------------------------------------------------------------------------------

CHILD = """
import sys, warnings
from pathlib import Path
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import open_image, to_pixels

warnings.simplefilter("ignore")

def peak():  # kB
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

names = sorted(Path(sys.argv[1]).iterdir())
for path in names:
    if path.name.startswith("small"):  # everything is imported and warm
        to_pixels(path, 28)
for path in names:
    if path.name.startswith("small"):
        continue
    for function in (open_image, lambda source: to_pixels(source, 28), lambda source: to_pixels(source, 28, "fast")):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = peak()
        try:
            function(path.read_bytes())
            outcome = "decoded"
        except DataError as error:
            outcome = str(error)
        print(path.name, (peak() - before) // 1024, outcome, sep="|")
"""


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    drawing(mode).save(out, kind, **options)
    return out.getvalue()


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_with(chunks: bytes, width: int = 40, height: int = 30) -> bytes:
    """Return a complete PNG with other sizes in its header and further bytes after it."""
    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[33:33] = chunks
    return with_right_sums(bytes(data))


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def gif_of(width: int, height: int) -> bytes:
    """Return a GIF whose single frame is as large as its screen."""
    data = bytearray(encoded("GIF", "P"))
    data[6:10] = size = struct.pack("<HH", width, height)
    frame = data.index(struct.pack("<HH", 40, 30)) - 4
    data[frame + 4 : frame + 8] = size
    return bytes(data)


def webp_of(width: int, height: int) -> bytes:
    data = bytearray(encoded("WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    data[at : at + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def tiff_of(width: int, height: int) -> bytes:
    data = bytearray(encoded("TIFF"))
    for tag, value in ((256, width), (257, height)):
        at = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
        data[at : at + 4] = struct.pack("<I", value)
    return bytes(data)


def claims(width: int, height: int) -> dict[str, bytes]:
    """Return small files of every format whose headers claim these sizes."""
    bmp = encoded("BMP")
    return {
        f"{width}.png": png_with(b"", width, height),
        f"{width}.jpg": jpeg_of(width, height),
        f"{width}.gif": gif_of(width, height),
        f"{width}.webp": webp_of(min(width, 16_383), min(height, 16_383)),
        f"{width}.tif": tiff_of(width, height),
        f"{width}.bmp": bmp[:18] + struct.pack("<ii", width, height) + bmp[26:],
        f"{width}.ppm": f"P6 {width} {height} 255\n".encode() + bytes(100),
    }


# 200 MB of zeros each, once unpacked
PACKED = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 1))
PROFILE = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200_000_000), 1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux reports it")
def test_claims_take_no_memory(tmp_path: Path) -> None:
    """Such files are refused by their header, before memory of that size is allocated."""
    files = claims(12_000, 10_000) | claims(50_000, 50_000)  # above our limit, and above Pillow's
    files |= {"text.png": png_with(PACKED), "profile.png": png_with(PROFILE)}
    small = {"small.jpg": encoded("JPEG"), "small.png": encoded("PNG"), "small.webp": encoded("WEBP")}
    for name, data in (files | small).items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 3 * len(files)
    assert {name: rise for name, rise, _ in lines if int(rise) >= 50} == {}
    too_large = r"is refused \(limit|exceeds limit of|too large for PngImagePlugin.MAX_TEXT_CHUNK"
    assert [line for line in lines if not re.search(too_large, line[2])] == []


# ---- files of very many blocks ---------------------------------------------------------------------------------------


def of_many_blocks(kind: str) -> bytes:
    """Return 4 MB and more of what Pillow reads piece by piece."""
    if kind == "ICO":
        png = encoded("PNG")
        return (
            b"\0\0\1\0\xff\xff" + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(png), 6 + 16 * 65535) * 65535 + png
        )
    if kind.startswith("GIF"):
        gif = encoded("GIF")
        start = 13 + 3 * (2 << (gif[10] & 7))
        comments = b"!\xfe" + (b"\xff" + b"a" * 255) * 16_000 + b"\0" if kind == "GIF" else b"!\xfe\1a\0" * 800_000
        return gif[:start] + comments + gif[start:]
    if kind == "JPEG":
        jpeg = encoded("JPEG")
        return jpeg[:2] + b"\xff\xe9\0\2" * 1_000_000 + jpeg[2:]
    png = encoded("PNG")
    return png[:33] + chunk(b"IDAT" if kind == "PNG data" else b"abCd") * 350_000 + png[33:]


@pytest.mark.parametrize("kind", ["ICO", "GIF", "GIF comments", "JPEG", "PNG", "PNG data"])
def test_many_blocks_are_refused_at_once(kind: str) -> None:
    data = of_many_blocks(kind)
    start = time.process_time()
    with pytest.raises(DataError, match="too many small blocks"):
        open_image(data)
    assert time.process_time() - start < 1


def test_comments_and_scans_without_end_are_refused_at_once() -> None:
    """Pillow skips comments in quadratic time, and every scan of a JPEG takes as long as all pixels."""
    plain = b"P3\n" + b"# a comment\n" * 100_000 + b"1 1\n255\n1 2 3\n"
    file = io.BytesIO()
    drawing().save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    last = whole.rindex(b"\xff\xda")
    scans = whole[:-2] + whole[last:-2] * 200 + b"\xff\xd9"
    text = b"P3 2000 2000 255\n" + b"1 " * 2_000_000
    for encoded, reason in (
        (plain, "over 1,000 comments"),
        (text, "text of over 4,000,000 bytes"),
        (scans, "a JPEG of 2[0-9][0-9] scans"),
    ):
        with pytest.raises(DataError, match=reason):
            to_pixels(encoded, 28)
    few = plain.replace(b"# a comment\n" * 100_000, b"# a comment\n")
    assert to_pixels(few, 28).shape == to_pixels(whole, 28).shape == (3, 28, 28)


def test_scans_count_by_their_pixels() -> None:
    """A photo may have its ten scans at the largest size; as many as a small image may have, it may not."""
    ten = b"\xff\xda" * 10
    check_scans(ten, 10_000, 10_000)
    check_scans(ten * 9, 2_000, 1_500)
    with pytest.raises(DataError, match="a JPEG of 90 scans for 6300 x 6300 pixels"):
        check_scans(ten * 9, 6_300, 6_300)


def directory(count: int, order: str, *, big: bool = False) -> bytes:
    """Return a TIFF of one row for each of its strips, which all are the same byte."""
    start, number, entry = (16, "Q", "HHQQ") if big else (8, "I", "HHII")
    tags = ((256, 4, 1, 1), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, count, 300))
    tags += ((277, 3, 1, 1), (278, 4, 1, 1), (279, 4, count, 300))
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HHQ", 8, 0, start) if big else struct.pack(order + "I", start)
    entries = b"".join(struct.pack(order + entry, *tag) for tag in tags)
    text = head + struct.pack(order + ("Q" if big else "H"), len(tags)) + entries + struct.pack(order + number, 0)
    return text.ljust(300, b"\0") + struct.pack(order + "I", 1) * count


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_many_strips_are_refused_at_once(order: str, big: bool) -> None:
    start = time.process_time()
    for read in (open_image, read_traits, read_image_size):
        with pytest.raises(DataError, match="a TIFF of 1,000,000 strips or other values"):
            read(directory(1_000_000, order, big=big))
    assert time.process_time() - start < 1
    assert read_image_size(directory(30_000, "<")) == (1, 30_000)


def test_large_exif_is_not_searched() -> None:
    """The orientation of such a file does not count, but its pixels are read."""
    exif = b"MM\0*\0\0\0\x08\0\2" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    png = encoded("PNG")
    for count, turned in ((4, True), (2_000_000, False)):
        whole = exif + struct.pack(">HHII", 0x9999, 4, count, 40) + bytes(6 + 4 * count)
        file = png[:33] + chunk(b"eXIf", whole) + png[33:]
        start = time.process_time()
        assert (read_traits(file).orientation == 6) == turned
        assert open_image(file, background=(255, 255, 255)).size == ((30, 40) if turned else (40, 30))
        assert time.process_time() - start < 1


def test_only_the_first_frame_is_decoded() -> None:
    frames = [Image.new("L", (3000, 3000), shade) for shade in range(0, 250, 50)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:] * 5)
    start = time.process_time()
    assert open_image(out.getvalue()).getpixel((5, 5)) == (0, 0, 0) and read_traits(out.getvalue()).animated
    assert time.process_time() - start < 1


def test_comments_before_the_second_frame() -> None:
    out = io.BytesIO()
    drawing().save(out, "GIF", save_all=True, append_images=[drawing("L")])
    gif = out.getvalue()
    late = gif[:-1] + b"!\xfe\1a\0" * 800_000 + gif[-1:]
    assert read_traits(late).animated
    single = encoded("GIF")
    start = time.process_time()
    assert not read_traits(single[:-1] + b"!\xfe\1a\0" * 800_000 + gif[-1:]).animated
    assert time.process_time() - start < 1
