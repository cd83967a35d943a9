"""The verb `report`: a page about run directories in whatever state, which loads nothing and runs nothing."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinygptv_ds.apps.report.run_data import find_runs, read_run, read_runs
from tinygptv_ds.cli import main
from tinygptv_ds.errors import ConfigError

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\ud83d"
RECIPE = """
stage: {stage}
model: {{init_from: {start}}}
data:
  datasets: [{{name: cats, weight: 3}}, {{name: dogs, weight: 1}}]
  validation: []
optimizer: {{lr: {lr}}}
train: {{cycles: 1, epochs: 1, steps_per_epoch: {steps}, log_every: 10}}
"""


def metrics(step: int, **more: float | None) -> dict[str, Any]:
    counts = {"with_image_cats": 6, "text_only_cats": 0, "with_image_dogs": 1, "text_only_dogs": 1, "skipped": 0}
    data = {f"data/{name}": count for name, count in counts.items()}
    speed = {"perf/samples_s": 100.0, "perf/step_seconds": 0.5}
    return {"step": step, "time": 1e9 + step, "train/loss": 3 / step, "train/lr": 0.1, **data, **speed, **more}


def make_run(
    folder: Path, lines: list[Any], *, stage: int = 1, start: str = "null", lr: float = 1e-3, done: bool = True
) -> Path:
    """A run of 30 steps as far as its lines go."""
    folder.mkdir(parents=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "recipe.yaml").write_text(RECIPE.format(stage=stage, start=start, lr=lr, steps=30))
    (folder / "versions.json").write_text('{"torch": "2.14", "flash-attn": null}')
    if done:
        (folder / "model").mkdir()
    return folder


def add_panel(folder: Path, step: int, *answers: str, truth: str = "a cat", prompt: str = "what is it?") -> None:
    (folder / "samples/images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(folder / "samples/images/red.png")
    rows = [{"prompt": prompt, "truth": truth, "answer": answer, "images": ["images/red.png"]} for answer in answers]
    (folder / f"samples/step-{step:08d}.json").write_text(json.dumps({"step": step, "samples": rows}))


LINES = [metrics(1), metrics(10), metrics(20), metrics(30), {"step": 30, "time": 1e9 + 31, "val/loss": 0.25}]


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(*runs: Path, out: Path) -> str:
    """Return the page; it may load and run nothing."""
    main(["report", *map(str, runs), "--out", str(out)])
    page = out.read_text()
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.found}
    for _, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")]
        links = [attributes.get(name) or "" for name in ("src", "href", "action") if name in attributes]
        assert all(link.startswith("data:image/") for link in links)
    assert "default-src 'none'" in page and not re.search(r"url\(|@import", page)
    assert "partial" not in {path.suffix for path in out.parent.iterdir()}
    return page


def text_of(page: str) -> str:
    return Elements(page).text


def test_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", LINES)
    add_panel(run, 20, "old")
    add_panel(run, 30, "<p>a cat</p> {<10><20><30><40>} sits", truth="<p>a cat</p> {<12><20><30><40>}")
    text = text_of(page := report(run, out=tmp_path / "out.html"))
    assert "Stage 1: mine" in text and "3.000 → 0.100" in text and "0.25" in text and "15.0 s" in text
    assert "a cat sits" in text and "old" not in text  # the newest panel, without the boxes' numbers
    assert '<rect class="" x="10" y="20" width="20" height="20"' in page and '<rect class="true" x="12"' in page
    assert "75.0 %" in text and "2.14" in text
    for note in ("Unfinished", "Resumed", "damaged", "No validation"):
        assert note not in text


def test_what_is_hostile_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", [metrics(1, **{f"train/loss_{HOSTILE}": 1.0, f"train/loss_{HOSTILE}2": 2.0})])
    add_panel(run, 1, HOSTILE, f"<p>{HOSTILE}</p> {{<1><2><3><4>}}", truth=HOSTILE, prompt=HOSTILE)
    (run / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "recipe.yaml").write_text(json.dumps({"stage": HOSTILE[:-1], "text": {HOSTILE[:-1]: HOSTILE[:-1]}}))
    (run / "evaluation/step-00000001").mkdir(parents=True)
    score = {"benchmark": HOSTILE, "strict": 1.0, HOSTILE: 2.0, "step": 1}
    (run / "evaluation/step-00000001/a.json").write_text(json.dumps(score))
    page = report(run, out=tmp_path / "out.html")
    assert html.escape(HOSTILE[:-1]) in page and "<script>alert" not in page and "onerror=alert(2)>" not in page


def test_images_come_from_the_run_alone(tmp_path: Path) -> None:
    """Neither a file elsewhere nor one that is no image gets into the page."""
    run = make_run(tmp_path / "run", LINES)
    (tmp_path / "secret.png").write_bytes(b"\x89PNG secret")
    add_panel(run, 30, "answer")
    (run / "samples/images/text.svg").write_text("<svg onload=alert(1)>")
    for name in ("../../secret.png", str(tmp_path / "secret.png"), "images/text.svg", "missing.png", "images"):
        rows = [{"prompt": "", "truth": "", "answer": "", "images": [name, None, 3]}]
        (run / "samples/step-00000030.json").write_text(json.dumps({"step": 30, "samples": rows}))
        page = report(run, out=tmp_path / "out.html")
        assert "data:image" not in page.split("</style>")[1] and "(an empty answer)" in page


@pytest.mark.parametrize(
    ("lines", "done", "note"),
    [
        (LINES[:2], False, "Unfinished: 10 of 30 steps are logged."),
        (LINES[:3], True, "Ended early, after 20 of 30 steps."),
        (LINES[:4], True, "No validation loss was measured."),
        ([LINES[0], metrics(10), metrics(16), metrics(20), *LINES[3:]], True, "Resumed after step 15."),
        ([*LINES, '{"step": 31, "train/l'], True, "1 damaged line(s)"),
        (["\x00\x00", "[]", '{"step": "1"}', "{}", '{"step": -1}', "[" * 10_000, *LINES], True, "6 damaged line(s)"),
        ([], False, "Unfinished: 0 of 30 steps are logged."),
    ],
)
def test_states_of_a_run(tmp_path: Path, lines: list[Any], done: bool, note: str) -> None:
    run = make_run(tmp_path / "run", lines, done=done)
    assert note in text_of(report(run, out=tmp_path / "out.html"))


def test_odd_values(tmp_path: Path) -> None:
    """Losses that are not finite, texts, and numbers that no float holds are gaps."""
    odd = {"step": 2, "train/loss": None, "train/lr": "high", "perf/samples_s": True, "train/grad_norm": int("9" * 400)}
    lines = [metrics(1), odd, '{"step": 3, "train/loss": NaN, "train/grad_norm": 1e999}', metrics(4)]
    run = read_run(make_run(tmp_path / "run", lines), "run")
    assert [step for step, _ in run.series["train/loss"]] == [1, 2, 3, 4] and run.last("train/grad_norm") is None
    assert [step for step, _ in run.series["train/lr"]] == [1, 4]
    report(run.path, out=tmp_path / "out.html")


@pytest.mark.parametrize("damage", ["remove", "garbage", "empty", "folder", "binary"])
@pytest.mark.parametrize("file", ["recipe.yaml", "versions.json", "samples/step-00000030.json", "metrics.jsonl"])
def test_damaged_files(tmp_path: Path, file: str, damage: str) -> None:
    run = make_run(tmp_path / "run", LINES)
    (run / "log.txt").write_text("")
    add_panel(run, 30, "answer")
    (run / file).unlink()
    if damage == "folder":
        (run / file).mkdir()
    elif damage != "remove":
        (run / file).write_bytes({"garbage": b"a: [1, {", "empty": b"", "binary": bytes(range(256))}[damage])
    text = text_of(report(run, out=tmp_path / "out.html"))
    if (file, damage) not in (("samples/step-00000030.json", "remove"), ("metrics.jsonl", "empty")):
        assert Path(file).name in text


def test_a_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", LINES, lr=lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    text = text_of(page := report(*runs, out=tmp_path / "out.html"))
    assert "a/run" in text and "b/run" in text  # the shortest names that differ
    (settings,) = re.findall(r"<h2>Settings that differ</h2>(.*?)</table>", page)
    assert re.findall(r"<code>(.*?)</code>", settings) == ["optimizer.lr"]
    assert "step, all runs" not in text


def test_stages_follow_each_other(tmp_path: Path) -> None:
    """A folder of runs of which each began from the one before: one axis, and the scores after each."""
    first = make_run(tmp_path / "all/stage1", LINES)
    second = make_run(tmp_path / "all/stage2", LINES, stage=2, start=str(first))
    for run, strict in ((first, 50.0), (second, 75.0)):
        scores = tmp_path / "all/eval" / run.name / "vqa"
        scores.mkdir(parents=True)
        result = {"benchmark": "vqa", "strict": strict, "questions": 40, "step": 30, "answers": []}
        (scores / "results.json").write_text(json.dumps(result))
    exported = tmp_path / "all/model"
    exported.mkdir()
    (exported / "recipe.yaml").write_text("")
    assert find_runs([tmp_path / "all", second]) == [first, second]
    text = text_of(report(tmp_path / "all", out=tmp_path / "out.html"))
    assert "step, all runs" in text and "stage 2" in text and "Score: vqa, strict" in text and "strict 75.0 %" in text


def test_the_last_panel_is_limited(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LINES)
    add_panel(run, 30, *(f"answer {number}" for number in range(40)))
    text = text_of(report(run, out=tmp_path / "out.html"))
    assert "answer 11" in text and "answer 12" not in text and "(12 of 40)" in text


def test_the_loss_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LINES)
    main(["report", str(run), "--out", str(tmp_path / "out.html"), "--loss-curve", str(tmp_path / "loss.svg")])
    light, dark = ((tmp_path / f"loss-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert "var(" not in light + dark and "#0d1117" in dark and "#0d1117" not in light


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no metrics\.jsonl, nor do the folders in it; give run"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="missing is no folder"):
        find_runs([tmp_path / "missing"])
    make_run(tmp_path / "run", LINES)
    for option in ("--out", "--loss-curve"):
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
            patch.setattr("tinygptv_ds.cli._end_with_error", lambda message: sys.exit(message))
            main(["report", str(tmp_path / "run"), option, str(tmp_path / "page.txt")])
        assert f"{option} {tmp_path}/page.txt: the name must end in" in str(ended.value.code)


def test_names_of_the_same_run_twice(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LINES)
    assert [each.name for each in read_runs(find_runs([run, tmp_path / "run/../run"]))] == ["run"]


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LINES)
    add_panel(run, 30, "answer")
    call = f"main(['report', {str(run)!r}, '--out', {str(tmp_path / 'o.html')!r}])"
    code = (
        f"import sys; from tinygptv_ds.cli import main; {call}"
        "; sys.exit(str({'torch', 'transformers', 'gradio', 'deepspeed'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "" and "o.html" in done.stdout
