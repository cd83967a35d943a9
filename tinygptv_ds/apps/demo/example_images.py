"""Synthetic images for the demo's examples: a street, and handwritten digits like those of the quick start."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

_DIGITS = (3, 8)  # seeds of scenes with several digits
_SCALE = 4
_LEAST_PIXELS = 224  # side of an image of the released models; the quick start's sees scenes of digits alone
_TASK_TEMPLATE = "[INST]"  # stage 4's: the only stage that learns words in brackets for tasks

Example = tuple[Image.Image, str]


def examples(template: str = "[INST] {} [/INST]", image_size: int = 448) -> list[Example]:
    """Return images with a question about each that a model can be expected to answer.

    Args:
        template: the words around a question, by which the stage is known.
        image_size: side in pixels of the images that the model was trained on.
    """
    from tinygptv_ds.data.sets.digits import random_scene  # imports scikit-learn, which is slow

    digits = [Image.fromarray(random_scene(random.Random(seed), "test").pixels) for seed in _DIGITS]
    tasks, sees_photos = _TASK_TEMPLATE in template, image_size >= _LEAST_PIXELS
    if not tasks:  # stages 1 to 3 learn to describe
        images = [street(), *digits] if sees_photos else digits
        return [(image, "Describe this image in detail.") for image in images]
    of_digits = [
        (digits[0], "[grounding] describe this image in detail"),
        (digits[1], "[vqa] how many digits are there?"),
    ]
    if sees_photos:
        street_questions = ("[vqa] what colour is the bus?", "Please write a poem about the image")
        return [*((street(), question) for question in street_questions), *of_digits]
    return [(digits[1], "[vqa] what digit is in the bottom-left?"), *of_digits]


def street() -> Image.Image:
    """Draw a red bus on a road, a house, a tree and the sun: 480 x 320 pixels."""
    big = Image.new("RGB", (480 * _SCALE, 320 * _SCALE), (150, 205, 240))
    pen = ImageDraw.Draw(big)

    def at(*sides: int) -> tuple[int, ...]:
        return tuple(side * _SCALE for side in sides)

    pen.ellipse(at(390, 25, 440, 75), (255, 215, 70))
    pen.rectangle(at(0, 190, 480, 245), (120, 180, 95))
    pen.rectangle(at(0, 245, 480, 320), (90, 92, 98))
    for left in range(10, 480, 80):
        pen.rectangle(at(left, 278, left + 40, 284), (235, 235, 225))
    pen.rectangle(at(30, 120, 140, 215), (240, 225, 195))
    pen.polygon([at(20, 120), at(85, 65), at(150, 120)], (165, 75, 55))
    pen.rectangle(at(72, 165, 98, 215), (120, 80, 50))
    for left in (42, 108):
        pen.rectangle(at(left, 135, left + 22, 157), (130, 180, 215))
    pen.rectangle(at(408, 160, 422, 225), (110, 75, 45))
    pen.ellipse(at(375, 90, 455, 180), (60, 140, 70))
    pen.rounded_rectangle(at(175, 150, 355, 262), 14 * _SCALE, (205, 40, 45))
    for left in range(188, 330, 40):
        pen.rectangle(at(left, 168, left + 30, 200), (200, 230, 245))
    for left in (205, 305):
        pen.ellipse(at(left, 245, left + 34, 279), (35, 35, 40))
        pen.ellipse(at(left + 11, 256, left + 23, 268), (190, 190, 195))
    return big.resize((480, 320), Image.Resampling.LANCZOS)
