"""Whether a command of this project, as documents and examples have it, is one that its parsers take."""

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest

from tinygptv_ds.arguments import hyphenated
from tinygptv_ds.cli import VERBS
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.evaluation.cli import EVALUATIONS, add_options
from tinygptv_ds.train.setup.job import stage_parser

ROOT = Path(__file__).parents[2]
LAUNCHER = {"--hostfile": 1, "--no_ssh": 0, "--node_rank": 1, "--master_addr": 1, "--master_port": 1, "--num_gpus": 1}
LAUNCHER |= {"--restarts": 1}
OTHERS = ("pip", "hf", "wget", "lmms_eval")  # not ours


def taken(parser: argparse.ArgumentParser, options: list[str]) -> argparse.Namespace:
    """Fails with the parser's own words."""
    try:
        return parser.parse_args(hyphenated(options))
    except SystemExit:
        pytest.fail(f"not taken: {options}")


def check_stage(stage: str, options: list[str]) -> None:
    own, rest = [], iter(options)
    for option in rest:
        name, given, _ = option.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        if name not in LAUNCHER:
            own.append(option)
        elif LAUNCHER[name] and not given:
            next(rest)
    recipe = ROOT / f"stages/{stage}.yaml"
    args = taken(stage_parser(recipe), own)
    load_recipe(recipe, [text for text in args.set if not text.startswith("deepspeed.")])
    assert args.deepspeed_config is None or (ROOT / args.deepspeed_config).is_file()


def in_container(found: list[str]) -> list[str]:
    """The command that `docker run` starts; nothing for docker's other commands."""
    at = next((n for n, word in enumerate(found) if re.fullmatch(r"tinygptv-ds:\w+", word)), len(found))
    if found[1] != "run":
        return []
    entry = found[found.index("--entrypoint") + 1] if "--entrypoint" in found[:at] else "tinygptv-ds"
    return [entry, *found[at + 1 :]]


def check_command(found: list[str]) -> None:
    """Fails unless the words are a verb, a script or a program that is not ours, with options that it has."""
    if found[0] == "docker":
        found = in_container(found)
        if not found:
            return
    at = found.index("tinygptv-ds") + 1 if "tinygptv-ds" in found else None
    at = next((n + 2 for n in range(len(found)) if found[n : n + 2] == ["-m", "tinygptv_ds"]), at)
    if at is not None:
        verb, *options = found[at:]
        if verb in ("--version", "--help"):
            assert not options
            return
        if verb == "train":
            check_stage(options[0], options[1:])
            return
        parser = argparse.ArgumentParser()
        import_module(VERBS[verb][1]).add_arguments(parser)
        args = vars(taken(parser, options))
        if args.get("recipe") and args.get("set"):
            load_recipe(ROOT / args["recipe"], args["set"])
        return
    if set(OTHERS) & set(found):
        return
    script = next(word for word in found if re.search(r"\.(py|sh|sbatch)$", word))
    assert (ROOT / script).is_file(), script
    before, after = found[: found.index(script)], found[found.index(script) + 1 :]
    if script.startswith("launch/stage"):
        check_stage(Path(script).stem, [*(before[1:] if before[0] == "deepspeed" else ()), *after])
    elif script == "launch/slurm.sbatch":
        check_stage(*after[:1], after[1:])
    elif script.startswith("eval/"):
        kind = Path(script).stem
        parser = argparse.ArgumentParser()
        add_options(parser, kind)
        args = taken(parser, after)
        assert args.shards or set(args.benchmarks.split(",")) <= set(EVALUATIONS[kind].benchmarks)
