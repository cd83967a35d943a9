"""What a user gets wrong shows at once: exit code 2, one message, no traceback, and torch was never imported."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.patience import PATIENCE

ROOT = Path(__file__).parents[1]
CPU = str(ROOT / "ds_configs/cpu.json")
# In a process where these are None, importing them is an error.
HEAVY = ("torch", "deepspeed", "transformers", "timm", "torchvision", "peft", "tensorboard")
WITHOUT = f"import sys, runpy; sys.modules.update(dict.fromkeys({HEAVY!r})); sys.path.insert(0, {str(ROOT)!r}); "


def python(code: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process that cannot import torch and the like."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, **env},
    )


def stage(number: int, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / f"stages/stage{number}.py")
    return python(f"sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')", *options, **env)


def cli(*argv: str) -> subprocess.CompletedProcess[str]:
    return python("runpy.run_module('tinygptv_ds', run_name='__main__', alter_sys=True)", *argv)


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a process that ended as it should for a user's mistake."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error: ") == 1
    assert done.stderr.startswith("error: ")
    return done.stderr


def test_importing_the_package_is_light() -> None:
    light = (
        "cli",
        "config.load",
        "data.stream.plan",
        "distributed",
        "errors",
        "log",
        "train.setup.job",
        "train.schedule",
    )
    assert python("".join(f"import tinygptv_ds.{name}; " for name in light)).returncode == 0
    assert python("import torch").returncode == 1


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_help_of_a_stage(number: int) -> None:
    done = stage(number, "--help")
    assert done.returncode == 0, done.stderr
    for option in ("--recipe", "--deepspeed-config", "--set", "--run-dir", "--resume"):
        assert option in done.stdout
    assert f"deepspeed launch/stage{number}.sh" in done.stdout
    assert f"stages/stage{number}.yaml" in done.stdout


def test_a_wrong_recipe_is_reported_before_numpy_is_imported() -> None:
    """The readers of images, shards and benchmarks come later, which keeps the answer under a third of a second."""
    script = str(ROOT / "stages/stage1.py")
    done = python(
        f"sys.modules['numpy'] = None; sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')",
        "--set",
        "train.batchsize=3",
    )
    assert "did you mean batch_size?" in one_error(done)


def test_ctrl_c_while_modules_are_imported() -> None:
    """One line, and the exit code of a process that SIGINT has ended."""
    code = "import tinygptv_ds.cli; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "stopped: interrupted by Ctrl-C\n")


@pytest.mark.parametrize("script", ["tinygptv_ds", "stages/stage1.py", "eval/vqa.py"])
def test_a_python_without_the_packages_is_recognized(script: str) -> None:
    """In a shell where the environment is not active: one line that says how to activate it, or to make it."""
    run = (
        f"runpy.run_path({script!r}, run_name='__main__')"
        if "/" in script
        else "runpy.run_module('tinygptv_ds', run_name='__main__')"
    )
    code = f"sys.modules['yaml'] = None; sys.argv[1:] = ['check-data', 'stages/stage1.yaml']; {run}"
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True, check=False)
    message = one_error(done)
    assert message.count("\n") == 1 and f"{sys.executable} has no package 'yaml'" in message
    assert "activate" in message or "source launch/setup.sh" in message


def test_help_of_the_command_line() -> None:
    done = cli("--help")
    assert done.returncode == 0, done.stderr
    verbs = (
        "doctor",
        "prepare",
        "convert-laion",
        "convert-cc-sbu",
        "check-data",
        "preview",
        "stream",
        "index",
        "features",
        "train",
        "eval",
        "estimate",
    )
    for verb in (*verbs, "inspect", "convert", "export", "chat", "answer"):
        assert verb in done.stdout
        assert cli(verb, "--help").returncode == 0


def test_inference_that_cannot_begin(tmp_path: Path) -> None:
    """A model that is not there, settings out of range and questions that are none, all before torch is loaded."""
    (tmp_path / "questions.jsonl").write_text("[]")
    files = ["--input", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    assert "no such file or folder" in one_error(cli("chat", str(tmp_path / "none")))
    assert "--template must be one of" in one_error(cli("chat", str(tmp_path), "--template", "Z"))
    assert "top_p must be above 0" in one_error(cli("answer", str(tmp_path), *files, "--top-p", "0"))
    assert "1 of 1 lines cannot be answered" in one_error(cli("answer", str(tmp_path), *files))


def test_a_missing_recipe(tmp_path: Path) -> None:
    message = one_error(stage(1, "--recipe", str(tmp_path / "none.yaml")))
    assert "no recipe at" in message and "stages/stage1.yaml" in message


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_what_the_published_recipe_names_and_is_not_there(number: int, tmp_path: Path) -> None:
    """All of it in one message, each with the way to get it."""
    away = [f"--set=model.{part}={tmp_path}/{part}" for part in ("phi", "eva_vit", "qformer")]
    sets = f"--set=data.datasets=[{{name: laion, shards: {tmp_path}/laion/*.tar}}, {{name: gqa, shards: {tmp_path}/g}}]"
    before = f"--set=model.init_from={tmp_path}/before"
    message = one_error(
        stage(number, *away, sets, before, "--run-dir", str(tmp_path / "run"), "--deepspeed_config", CPU)
    )
    assert f"6 thing(s) that the recipe of stage {number} names cannot be used" in message
    for remedy in ("microsoft/phi-2", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "train the stage before"):
        assert remedy in message
    for name in ("phi", "eva_vit", "qformer", "before", "laion", "g"):
        assert str(tmp_path / name) in message
    assert "img2dataset" in message and "train_balanced_questions.json" in message
    assert not (tmp_path / "run").exists()


def test_some_datasets_are_there_and_others_not(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """The message ends with the option that trains on the former, and with that option no dataset is missing."""
    recipe, away = str(recipe_file()), f"--set=data.datasets.0.shards={tmp_path}/away"
    message = one_error(stage(4, "--recipe", recipe, away, "--deepspeed_config", CPU))
    option = message.strip().splitlines()[-1].partition("that are there: ")[2]
    assert option == "--set 'data.only=[text, chat, pair]'"
    weights = f"--set=model.phi={tmp_path}/none"  # so that it ends before it trains
    message = one_error(stage(4, "--recipe", recipe, away, *shlex.split(option), weights, "--deepspeed_config", CPU))
    assert "1 thing(s)" in message and "model.phi" in message and "data.only" not in message


def test_features_that_are_not_there(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Named with the command that makes them, for each dataset."""
    recipe = str(recipe_file(data__features=str(tmp_path / "none")))
    message = one_error(stage(4, "--recipe", recipe, "--deepspeed_config", CPU))
    assert f"dataset vqa: {tmp_path / 'none' / 'vqa'} holds no features" in message
    assert message.count("tinygptv-ds features RECIPE --out DIR") == 4


def test_a_folder_that_is_no_phi(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    message = one_error(stage(4, "--recipe", str(recipe_file(model__phi=str(tmp_path))), "--deepspeed_config", CPU))
    assert "model.phi" in message and "config.json" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.batchsize=3"], "unknown key train.batchsize; did you mean batch_size?"),
        (["--set", "train.batch_size=x"], "train.batch_size must be a whole number"),
        (["--set", "train.batch_size"], "write key=value"),
        (["--set", "train.micro_batch_size=3"], "choose train.micro_batch_size in [1, 2, 4, 8]"),
        (["--set", "deepspeed.gradient_cliping=1"], "unknown key 'gradient_cliping'; did you mean gradient_clipping?"),
        (["--set", "optimizer.gradient_clipping=1.0"], "--set deepspeed.gradient_clipping=1.0"),
        (["--deepspeed_config", "none.json"], "no DeepSpeed JSON at none.json"),
    ],
)
def test_options(options: list[str], message: str, recipe_file: Callable[..., Path]) -> None:
    given = ["--recipe", str(recipe_file()), "--deepspeed_config", CPU, *options]
    assert message in one_error(stage(4, *given))


def test_a_batch_that_does_not_divide_among_the_ranks(recipe_file: Callable[..., Path]) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_SIZE": "3"}
    message = one_error(stage(4, "--recipe", str(recipe_file()), "--deepspeed_config", CPU, **ranks))
    assert "on 3 rank(s): choose a train.batch_size divisible by 3" in message


def test_only_rank_0_speaks(recipe_file: Callable[..., Path]) -> None:
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "LOCAL_SIZE": "3"}
    done = stage(4, "--recipe", str(recipe_file()), "--deepspeed_config", CPU, **ranks)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_an_accelerator_that_is_none(recipe_file: Callable[..., Path]) -> None:
    message = one_error(stage(4, "--recipe", str(recipe_file()), DS_ACCELERATOR="gpu"))
    assert "DS_ACCELERATOR is 'gpu'; unset it, or set it to cpu or cuda" in message


def test_an_environment_with_ranks_or_without_docstrings(tmp_path: Path) -> None:
    """A rank that is left over in a shell, or that of a pod, does not silence a verb that is no rank."""
    env = {"RANK": "3", "WORLD_SIZE": "8", "PYTHONOPTIMIZE": "2"}
    done = python("runpy.run_module('tinygptv_ds', run_name='__main__')", "inspect", str(tmp_path / "no"), **env)
    assert "PYTHONOPTIMIZE=2" in one_error(done)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"zero_optimization": {"stage": 2}, "fp61": {}})])
def test_a_bad_json(text: str, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text(text)
    given = ["--recipe", str(recipe_file()), "--deepspeed_config", str(tmp_path / "my.json")]
    assert "my.json" in one_error(stage(4, *given))


def test_a_run_directory_in_use(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ["--recipe", str(recipe_file()), "--deepspeed_config", CPU, "--run-dir", str(run)]
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert "holds checkpoints; choose another --run-dir, or --resume auto" in one_error(
        stage(4, *given, "--resume=never")
    )
    assert "--resume nowhere: there is no such folder; give auto, never, or" in one_error(
        stage(4, *given, "--resume=nowhere")
    )
    (run / "model").mkdir()
    assert "model holds no trained.safetensors: it is not complete; remove it" in one_error(stage(4, *given))
    (run / "model/trained.safetensors").touch()
    assert "holds a finished run (its model/ is there" in one_error(stage(4, *given))


def test_verbs(tmp_path: Path) -> None:
    message = one_error(cli("prepare", "gqa", "--root", str(tmp_path), "--out", str(tmp_path / "out")))
    assert "train_balanced_questions.json" in message
    (tmp_path / "mine").write_text("mine")
    there, away, out = str(tmp_path / "mine"), str(tmp_path / "nowhere"), str(tmp_path / "out")
    for verb, *options in (["inspect"], ["convert", "--out", out], ["export", "--out", out]):
        assert f"{away}: no such file or folder" in one_error(cli(verb, away, *options))
    for verb in ("convert", "export"):
        assert f"{there} already exists; choose another --out" in one_error(cli(verb, there, "--out", there))
    assert "no recipe at" in one_error(cli("export", there, "--out", out, "--recipe", away))
    stage_1 = ["--recipe", str(ROOT / "stages/stage1.yaml"), "--set", "model.phy=x"]
    assert "did you mean phi?" in one_error(cli("export", there, "--out", out, *stage_1))
    for verb in ("check-data", "preview"):
        assert "no recipe at" in one_error(cli(verb, away))
        assert "did you mean phi?" in one_error(cli(verb, *stage_1[1:]))
    assert "no recipe at" in one_error(cli("features", away, "--out", out))
    done = cli("prepair")
    assert done.returncode == 2 and "invalid choice" in done.stderr
