"""Takes the screenshot of the demo in docs/, with the quick start's model:

python tests/apps/screenshot.py runs/quickstart/model runs/quickstart/example.jpg docs/use/demo.png
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import browser
from PIL import Image

from tinygptv_ds.apps.demo import demo
from tinygptv_ds.apps.demo.page import TASKS, build_page, launch
from tinygptv_ds.apps.server_args import check_serving_arguments

PALETTE_COLORS = 224


def main() -> None:
    options = argparse.ArgumentParser()
    demo.add_arguments(options)
    options.add_argument("image", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--task", choices=TASKS, default="Grounding")
    options.add_argument("--question")
    args = options.parse_args()
    if browser.MISSING:
        sys.exit(browser.MISSING)
    defaults = check_serving_arguments(args, "gradio")
    answer_question, name, samples = demo.load_answer_function(args)
    page = build_page(answer_question, name, defaults, samples=samples)
    url, *_ = launch(page, args.host, args.port)
    take(url, args.image, args.task, args.question).save(args.out, optimize=True)
    page.close(verbose=False)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


def take(url: str, image: Path, task: str, question: str | None) -> Image.Image:
    """Ask one question and return a screenshot of the page with a palette."""
    encoded = io.BytesIO()
    Image.open(image).convert("RGB").save(encoded, "PNG")
    with browser.visited(url, height=780) as (page, _):
        browser.upload(page, encoded.getvalue())
        browser.ask(page, task, question)
        page.wait_for_selector("#chat .image-container img")
        page.wait_for_function("() => [...document.querySelectorAll('#chat img')].every(each => each.naturalWidth)")
        page.mouse.move(640, 770)
        page.wait_for_timeout(1000)  # until overlays have faded out
        shot = Image.open(io.BytesIO(page.screenshot()))
    return shot.convert("RGB").quantize(PALETTE_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
