"""Which files are images: formats that are decoded, the largest size, file name endings, and first bytes of others."""

from __future__ import annotations

from tinygptv_ds.git_lfs import is_lfs_pointer

MAX_PIXELS = 100_000_000  # of an image that is decoded

# Pillow's readers that find their files by the first bytes. None of them starts a program, as the one for EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Tried next. HEIF is pillow-heif's; TGA, which has no first bytes of its own, is tried by `looks_like_tga` alone.
RARE_FORMATS = ("HEIF", "ICO", "ICNS", "PSD", "QOI", "DDS", "SGI", "PCX", "SUN", "FITS")

# File name endings of images, in lower case.
# fmt: off
IMAGE_SUFFIXES = frozenset([
    "jpg", "jpeg", "jpe", "jfif", "jif", "pjpeg", "pjp", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif",
    "tiff", "ppm", "pgm", "pbm", "pnm", "pfm", "jp2", "j2k", "jpx", "jpf", "jpc", "j2c", "avif", "avifs", "heic",
    "heif", "hif", "heics", "tga", "ico", "icns", "psd", "qoi", "dds", "sgi", "pcx", "ras", "fits", "img", "image",
])
# Endings of images and videos that are never decoded.
UNREAD_SUFFIXES = frozenset([
    "svg", "svgz", "jxl", "eps", "ps", "ai", "pdf", "exr", "hdr", "xcf", "emf", "wmf",
    "raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf",
    "mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "ogv",
])
# fmt: on

HEIC = "HEIC, which needs another package: pip install pillow-heif"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif")
_MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
_FOREIGN = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"%!PS", "PostScript"),
    (b"%PDF", "PDF"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"gimp xcf", "XCF"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"PK\x03\x04", "a ZIP archive"),
)


def looks_like_image(start: bytes) -> bool:
    """Return whether a file that begins with these bytes, 16 or more, is an image of a frequent format."""
    if start[4:8] == b"ftyp":
        return start[8:12] in (*_HEIF_BRANDS, b"avif", b"avis")
    return start.startswith(_MAGIC) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def foreign_format(data: bytes) -> str | None:
    """Return the name of the format that `data` has by its first bytes, if it is a known one that is not decoded."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return HEIC
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis"):
        return "a video"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "a video"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF or camera raw file whose pixel layout is not supported"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in start):
        return "SVG"
    return next((name for magic, name in _FOREIGN if data.startswith(magic)), None)


def no_image_because(data: bytes) -> str | None:
    """Return what a file that is not an image is, where that explains how it came about."""
    if not data:
        return "the file is empty"
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, as a failed download leaves it"
    if is_lfs_pointer(start):
        return "it is a Git LFS pointer: 'git lfs pull' fetches the image"
    return None


def looks_like_tga(data: bytes) -> bool:
    """Return whether `data` is a TGA file: by its last bytes, or by a header whose pixels fill the file."""
    if len(data) < 18:
        return False
    if data[-18:] == b"TRUEVISION-XFILE.\0":
        return True
    id_bytes, has_map, kind, map_bits, depth = data[0], data[1], data[2], data[7], data[16]
    if (has_map, kind) not in ((1, 1), (0, 2), (0, 3)) or depth not in (8, 16, 24, 32):
        return False
    map_length = int.from_bytes(data[5:7], "little") * (-(-map_bits // 8)) * has_map
    width, height = int.from_bytes(data[12:14], "little"), int.from_bytes(data[14:16], "little")
    return width * height > 0 and len(data) == 18 + id_bytes + map_length + width * height * depth // 8
