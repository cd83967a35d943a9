"""Files and folders that are met in place of weights, each with what it is and what to do."""

from __future__ import annotations

import re
from pathlib import Path

from tinygptv_ds.git_lfs import is_lfs_pointer

_HEAD = 512
_UNPACK = "unpack it and name the weights in it"
_CONVERT = "take the model's safetensors or PyTorch files instead"
# What a file begins with, what it is, and the remedy.
_BY_HEAD: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "weights quantized for llama.cpp (GGUF)", _CONVERT),
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write it", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
)
_PARTIAL = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")


def other_file(path: Path) -> str | None:
    """Return what a file is that is not weights, with the remedy; None for one that may be weights or their JSON.

    Only the first bytes are read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if is_lfs_pointer(head):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        of = f" to a file of {int(size[1]):,} bytes" if size and len(size[1]) < 20 else ""
        return (
            f"a Git LFS pointer{of}, not the file itself: run `git lfs pull` in its repository, or download it with "
            "`hf download REPOSITORY`"
        )
    if path.suffix in _PARTIAL:
        return "a download that has not finished: run it again to its end, e.g. with `hf download REPOSITORY`"
    if not head.strip(b"\0"):
        return "cut short: empty, or zeros alone; its download or copy has not finished, run it again"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "a web page, e.g. of a login or an error, saved in place of the file: download it with "
            "`hf download REPOSITORY`, after `hf auth login` if access is restricted"
        )
    found = next(((what, remedy) for magic, what, remedy in _BY_HEAD if head.startswith(magic)), None)
    if found is None and head[257:262] == b"ustar":
        found = ("a tar archive", _UNPACK)
    return None if found is None else f"{found[0]}: {found[1]}"


def other_text(path: Path) -> str:
    """Return what a file with unknown content seems to be, for an error that says what was expected."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    text = head.decode("utf-8", errors="replace")
    printable = sum(character.isprintable() or character.isspace() for character in text)
    if "\ufffd" in text or printable < len(text):
        return f"it begins with the bytes {head[:8].hex(' ')}"
    return f"it is text that begins {text[:60].strip()!r}"


def not_there(path: Path) -> str:
    """Return what to do about a path at which there is nothing."""
    if path.is_symlink():
        return f"a link to {path.readlink()}, which does not exist; download or copy the file that it points to"
    name = str(path)
    if not path.is_absolute() and name.count("/") == 1 and not path.parent.exists() and not path.suffix:
        return (
            "no such file or folder; for the model of this name on the Hub run "
            f"`hf download {name} --local-dir weights/{path.name}` and name weights/{path.name}"
        )
    return "no such file or folder; correct the path, or put the weights there"


def nothing_in(folder: Path) -> str:
    """Return why a folder may have no weights where they were expected, with the remedy."""
    if folder.name == "blobs" and folder.parent.name.startswith("models--"):
        return "it holds the blobs of the Hub cache, which have no names: name the folder snapshots/HASH next to it"
    if folder.name.startswith("models--"):
        snapshots = sorted(path.name for path in folder.glob("snapshots/*"))
        if snapshots:
            return f"it is a folder of the Hub cache with several snapshots: name one, e.g. snapshots/{snapshots[-1]}"
        return "it is a folder of the Hub cache without a snapshot: download the model again with `hf download`"
    broken = sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists())
    if broken:
        return f"{broken[0]} links to a file that is missing: download the model again with `hf download REPOSITORY`"
    if partial := unfinished(folder):
        return partial
    if any(folder.glob("*.distcp")):
        return (
            "it is a distributed checkpoint of torch: convert it with "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth`"
        )
    named = [*sorted(folder.glob("*.pth")), *sorted(folder.glob("*.pt")), *sorted(folder.glob("*.bin"))]
    if named:
        return f"name the file itself: {named[0]}"
    for kind in ("*.gguf", "*.h5", "*.msgpack", "*.onnx"):
        if any(folder.glob(kind)):
            return f"there is only {next(folder.glob(kind)).name}: take the model's safetensors or PyTorch files"
    return "put the weights there, or correct the path"


def unfinished(folder: Path) -> str:
    """Return that a download into a folder has not finished, with the remedy; "" where nothing shows it."""
    below = folder / ".cache" / "huggingface" / "download"  # where `hf download --local-dir` keeps what is not whole
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else below
    for place in (folder, below, blobs):
        partial = sorted(file.name for file in place.glob("*") if file.suffix in _PARTIAL) if place.is_dir() else []
        if partial:
            return f"a download has not finished ({partial[0]}): run `hf download` again to its end"
    return ""
