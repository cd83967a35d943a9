"""The images of an entry of a user's own data: which keys name them, and what their values may be."""

import base64
import binascii
import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from tinygptv_ds.data.sets.common import SkipEntry, inside
from tinygptv_ds.processing.image_formats import IMAGE_SUFFIXES

# In order of preference: of these keys, the first that has a value names the images.
IMAGE_KEYS = (
    *("image", "images", "img", "imgs", "photo", "photos", "pic", "picture", "pictures"),  # codespell:ignore
    *(f"{noun}_{part}" for noun in ("image", "img") for part in ("path", "paths", "file", "files", "name", "names")),
    *("image_filename", "image_file_name", "image_filepath", "imagepath", "imagefile", "imagename"),
    *("file_name", "filename", "file_names", "filepath", "file_path", "file", "files", "path", "paths"),
    *("jpg", "jpeg", "png", "webp"),
    *("image_url", "image_urls", "img_url", "url", "urls"),
)
# Words so general that their value must look like an image, unless the entry is a caption, which always has one.
_GENERAL_KEYS = {"file", "files", "filepath", "file_path", "path", "paths", "url", "urls"}
MEDIA_KEYS = {"video", "videos", "video_path", "video_file", "audio", "audios", "audio_path", "frames"}
_LOOKS_LIKE_A_PATH = re.compile(
    rf"[^\n]+\.(?:{'|'.join(sorted(IMAGE_SUFFIXES | {'svg', 'jxl'}))})(?:\?[^\s]*)?", re.IGNORECASE
)
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|https?:", re.IGNORECASE)
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how JPEG, PNG, GIF and WebP begin
_DEPTH = 4  # of nested values that are searched


def image_values(value: Any) -> list[Any]:
    """Return the single values of a field that names images: a path, bytes, a dict of both, or a list of these.

    A dict has "bytes", "path" or "url" (Hugging Face, OpenAI), or marks as keys (MiniCPM: ``{"<image_00>": path}``).
    """
    if value is None or value != value or value in ("", b"", [], {}):
        return []
    if isinstance(value, list | tuple):
        return [one for item in value for one in image_values(item)]
    if isinstance(value, dict):
        known = next((key for key in ("bytes", "path", "url", "image", "file_name") if value.get(key)), None)
        if known:
            return image_values(value[known])
        if all(str(key).startswith("<") for key in value):
            return [one for item in value.values() for one in image_values(item)]
        raise SkipEntry(
            "bad_record", f"an image with the keys {', '.join(map(str, value))}: none is bytes, path or url"
        )
    return [value]


def find_images(fields: Mapping[str, Any], named_in_texts: list[Any], *, needed: bool) -> list[Any]:
    """Return the values of the images of an entry, whose keys are in lower case; `needed`: it must have one.

    Raises SkipEntry for media that are not read, and where two keys, or a key and the texts, name different images.
    """
    for key in MEDIA_KEYS & fields.keys():
        if image_values(fields[key]):
            raise SkipEntry("unsupported_media", f"{key!r} is not read, images are")
    found, source = list(named_in_texts), "the texts"
    for key in IMAGE_KEYS:
        values = image_values(fields.get(key))
        if key in _GENERAL_KEYS and not needed:
            values = list(_image_like(values))
        if not values or (found and _is_link(key, values)):
            continue
        if not found:
            found, source = values, repr(key)
        elif list(map(_base_name, values)) != list(map(_base_name, found)):
            raise SkipEntry(
                "ambiguous_images", f"{source} and {key!r} name different images; ignore one with --columns {key}="
            )
        elif source == "the texts":
            found, source = values, repr(key)
    return found


def check_other_keys(fields: Mapping[str, Any], read: set[str], images: list[Any], folder: Path) -> None:
    """Raise SkipEntry if a key that is not `read` names an image that is not among `images`.

    Where there are images, only a further file that is in `folder` counts: annotations often say where an image came
    from.
    """
    used = {_base_name(image) for image in images}
    for key, value in fields.items():
        if key in read or key in IMAGE_KEYS:
            continue
        for path in _image_like(value):
            if not images or (_base_name(path) not in used and isinstance(path, str) and _is_file(folder, path)):
                near = next(iter(difflib.get_close_matches(key, IMAGE_KEYS[:9], 1, 0.5)), "image")
                shown = path if isinstance(path, str) else "bytes"
                raise SkipEntry(
                    "unknown_image_key",
                    f"unknown key {key!r} holds {shown[:100]!r}, which looks like an image; did you mean {near!r}? "
                    f"Read it with --columns {key}={near}, or ignore it with --columns {key}=",
                )


def resolve_image(value: Any, folder: Path) -> Path | bytes:
    """Return the file of an image below `folder`, or its bytes where the entry holds them.

    Raises SkipEntry for URLs, and for paths that lead out of `folder`.
    """
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise SkipEntry("bad_record", f"TypeError: an image must be a path, not {type(value).__name__}")
    if value.startswith("data:") or (len(value) > 100 and value.startswith(_BASE64)):
        return _decoded(value)
    if _URL.match(value):
        raise SkipEntry(
            "url_not_fetched",
            f"{value[:200]!r}: URLs are not fetched; download the images, e.g. with img2dataset, and name the files",
        )
    if value.lower().startswith("file:"):
        value = unquote(urlsplit(value).path)
    if "\\" in value and not _is_file(folder, value):
        value = PureWindowsPath(value).as_posix()
        if PureWindowsPath(value).drive:
            raise SkipEntry(
                "outside_root", f"{value!r} is a path of another machine; write it relative to --image-root ({folder})"
            )
    if value.startswith("/"):
        value = _relative(value, folder)
    return inside(folder, value)


def _relative(name: str, folder: Path) -> str:
    """Return an absolute path relative to `folder` if it is below it, else unchanged."""
    path = Path(os.path.normpath(name))
    for base in (Path(os.path.normpath(folder.absolute())), Path(os.path.realpath(folder))):
        for below in (path, Path(os.path.realpath(path.parent)) / path.name):
            if below.is_relative_to(base):
                return str(below.relative_to(base))
    return name


def _decoded(value: str) -> bytes:
    """Return the bytes of a ``data:`` URL or of plain base64."""
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SkipEntry("unreadable_image", f"{value[:40]!r}... is no base64: {error}") from error


def _is_link(key: str, values: list[Any]) -> bool:
    """Return whether a further key only says where the image came from."""
    return "url" in key or all(isinstance(value, str) and _URL.match(value) for value in values)


def _base_name(value: Any) -> Any:
    return PureWindowsPath(value).name if isinstance(value, str) else value


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):
        return False


def _image_like(value: Any, depth: int = 0) -> Iterator[str | bytes]:
    """Yield what looks like the path or the bytes of an image, in nested values as well."""
    if isinstance(value, str):
        if (
            (len(value) < 1000 and _LOOKS_LIKE_A_PATH.fullmatch(value.strip()))
            or value.startswith("data:image/")
            or (len(value) > 100 and value.startswith(_BASE64))
        ):
            yield value
    elif isinstance(value, bytes):
        if value.startswith(_MAGIC):
            yield value
    elif isinstance(value, dict | list | tuple) and depth < _DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _image_like(item, depth + 1)
