"""An image that is stored sideways, one half of it transparent."""

import io

from PIL import Image

_ORIENTATION = 0x0112  # EXIF's tag
_QUARTER_TURN = 6


def turned_image(color: tuple[int, int, int]) -> bytes:
    """Return a PNG of 40 x 20 pixels, to be turned by 90 degrees: its left half of the color, the rest transparent."""
    image = Image.new("RGBA", (40, 20))
    image.paste((*color, 255), (0, 0, 20, 20))
    exif, out = Image.Exif(), io.BytesIO()
    exif[_ORIENTATION] = _QUARTER_TURN
    image.save(out, "PNG", exif=exif)
    return out.getvalue()
