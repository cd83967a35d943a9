"""The whole verb on a tiny model: from a JSON file to scores, killed after every phase, and nothing done twice."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from helpers import tiny
from helpers.patience import PATIENCE
from helpers.verbs import call

from tinygptv_ds.cli import VERBS
from tinygptv_ds.errors import ConfigError, DataError, TinyGPTVError, WeightsError
from tinygptv_ds.finetune import finetune, phases
from tinygptv_ds.finetune.phases import Phase

ROOT = Path(__file__).parents[2]
PHASES = ["prepare", "estimate", "preview", "before", "train", "export", "after"]


class Killed(BaseException):
    """Stands for kill -9, after which nothing more is written."""


class Children:
    """Runs the verbs in this process, and dies where it is to: after a verb, before the journal knows."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.commands: dict[str, str] = {}
        self.die_after: str | None = None

    def run(self, phase: Phase, _: object) -> int:
        self.ran.append(phase.name)
        self.commands[phase.name] = phase.command
        verb, *options = phase.argv
        if verb == "train":
            # One rank without the launcher, whose options these are.
            stage, own = options[0], [w for w in options[3:] if not w.startswith("ds_configs")]
            script = [sys.executable, str(ROOT / f"stages/{stage}.py"), *own, str(ROOT / "ds_configs/cpu.json")]
            ended = subprocess.run(script, capture_output=True, text=True, timeout=PATIENCE, check=False)
            assert ended.returncode == 0, ended.stdout + ended.stderr
        else:
            call(import_module(VERBS[verb][1]), *options)
        if phase.name == self.die_after:
            raise Killed
        return 0


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    made = Children()
    monkeypatch.setattr(phases, "_run_child", made.run)
    return made


@pytest.fixture(scope="module")
def model(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export_model(weights, tmp_path_factory.mktemp("finetune") / "exported")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images with a question each, as LLaVA writes them."""
    (tmp_path / "images").mkdir()
    entries = []
    for number, image in enumerate(tiny.encoded_images(12)):
        (tmp_path / f"images/{number}.png").write_bytes(image)
        turns = [{"from": "human", "value": "<image>\nwhat colour"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    return tmp_path / "mine.json"


@pytest.fixture
def verb(data: Path, model: Path, tmp_path: Path) -> Callable[..., None]:
    def run(*options: str, **changes: object) -> None:
        given = {"data": data, "images": tmp_path / "images", "from": model, "out": tmp_path / "out"} | changes
        places = [word for name, value in given.items() for word in (f"--{name}", value)]
        call(finetune, *places, "--set", "train.epochs=2", *options)

    return run


def test_killed_after_every_phase(
    verb: Callable[..., None], children: Children, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, phase in enumerate(PHASES):
        children.die_after = phase
        with pytest.raises(Killed):
            verb()
        assert [name for name in PHASES if name in children.ran] == PHASES[: number + 1]
    assert {name: children.ran.count(name) for name in ("train", "export")} == {"train": 1, "export": 1}
    children.die_after = None
    verb()
    printed = capsys.readouterr().out
    assert [children.ran.count(name) for name in PHASES] == [2, 2, 2, 2, 1, 1, 2]  # what repeats reuses what is there
    assert "held-out score" in printed and f"$ tinygptv-ds chat {tmp_path / 'out'} --image" in printed
    result = json.loads((tmp_path / "out.finetune/scores/after.json").read_text())
    assert result["questions"] == 1 and result["wording"]
    asked = (tmp_path / "out.finetune/preview.html").read_text()
    assert 'class="target' in asked and (tmp_path / "out/config.json").is_file()

    before = len(children.ran)
    verb()  # nothing is left to do
    assert children.ran[before:] == []
    with pytest.raises(ConfigError, match=r"has been trained with --set \['train.epochs=2'\], now it is"):
        verb("--set", "train.epochs=3")
    (tmp_path / "mine.json").write_text((tmp_path / "mine.json").read_text() + " ")
    with pytest.raises(ConfigError, match=r"begun with other inputs:\n  - --data: .*bytes.*\n.*choose another --out"):
        verb()


def test_a_dry_run_stops_after_the_plan(
    verb: Callable[..., None], children: Children, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb("--dry-run")
    assert children.ran == ["prepare", "estimate", "preview"]
    printed = capsys.readouterr().out
    assert "11 samples to train on, 1 held out" in printed and "$ tinygptv-ds train stage4 --num-gpus 1" in printed
    assert not (tmp_path / "out").exists() and (tmp_path / "out.finetune/recipe.yaml").is_file()
    assert children.commands["prepare"].startswith("tinygptv-ds prepare llava --annotations ")
    verb("--dry-run", "--set", "train.batch_size=2")  # before training, the recipe may change
    assert children.ran[3:] == ["estimate", "preview"]
    assert "  batch_size: 2  # given with --set\n" in (tmp_path / "out.finetune/recipe.yaml").read_text()


def test_a_failed_verb_is_named(verb: Callable[..., None], children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_run_child", lambda phase, lock: 2)
    with pytest.raises(TinyGPTVError, match=r"prepare ended with exit code 2; its message is above"):
        verb()


@pytest.mark.parametrize("code", [75, 130, 138, 143])
def test_a_verb_that_can_be_resumed_gives_its_exit_code(
    code: int, verb: Callable[..., None], children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler starts the same command again after a lost rank, and not after a mistake."""
    monkeypatch.setattr(phases, "_run_child", lambda phase, lock: code)
    with pytest.raises(SystemExit) as ended:
        verb()
    assert ended.value.code == code


def test_wrong_inputs_are_reported_first(
    verb: Callable[..., None], children: Children, data: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(data.read_text())[:3]))
    with pytest.raises(DataError, match=r"few.json: 3 sample\(s\).*needs 10"):
        verb(data=few)
    with pytest.raises(DataError, match=r"--images .*absent: no such folder"):
        verb(images=tmp_path / "absent")
    with pytest.raises(WeightsError, match=r"--from .*few.json: "):
        verb(**{"from": few})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(ConfigError, match="is there already, and not from this command"):
        verb(out=tmp_path / "taken")
    with pytest.raises(ConfigError, match=r"--num-gpus 99: this machine shows"):
        verb("--num-gpus", "99")
    assert children.ran == []


def test_no_image_is_found(verb: Callable[..., None], children: Children, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match=r"not one sample could be prepared.*does not exist"):
        verb(images=tmp_path / "elsewhere")
