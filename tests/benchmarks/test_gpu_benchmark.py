"""The GPU benchmark: every part runs on a CPU with the tiny model, and failures are reported and counted."""

import itertools
import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.forked import apart

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, install
from benchmarks.gpu.model import build, make_batches, model_config, overrides
from benchmarks.gpu.plan import COMPILED, FP8, LEVERS, QUANTIZED, Case, Group, groups, obstacle
from benchmarks.gpu.profile import busy_share
from benchmarks.gpu.report import MAX_SKIPPED, PARTS, Report, original_rates, step_checks, step_table
from benchmarks.gpu.results import MEASURED, OUT_OF_MEMORY, add, check, read
from benchmarks.gpu.run import Launcher, ProcessEnd, run_checks, run_group
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.train.transfer import model_inputs

ROOT = Path(__file__).parents[2]
PIXELS = Case(4, 2, "bf16", "pixels", 2)
FEATURES = Case(4, 2, "bf16", "features", 2)


def figures(case: Case, losses: tuple[float, ...] = (5.0, 4.0), skipped: int = 0, before: int = 0) -> dict:
    """As a process hands them over."""
    rates = {"samples_s": 10.0, "target_tokens_s": 100.0, "step_seconds": 0.2}
    return {
        "case": asdict(case),
        "status": MEASURED,
        "losses": list(losses),
        "skipped_steps": skipped,
        "steps_before": before,
        "rates": rates,
        "seconds_by_part": dict.fromkeys(PARTS, 0.01),
        "memory_gib": {"allocated": 1.0},
        "estimated_gib": 2.0,
    }


class FakeProcess:
    """Processes that measure some of their cases and end as given, one after the other."""

    def __init__(self, *ends: tuple[int, str | None, ProcessEnd]) -> None:
        self.ends = list(ends)
        self.asked: list[list[Case]] = []

    def __call__(self, module: str, arguments: list[str], ranks: int | None = None) -> ProcessEnd:
        options = dict(itertools.pairwise(arguments))
        cases = [Case(**each) for each in json.loads(options["--cases"])]
        self.asked.append(cases)
        measured, status, ended = self.ends.pop(0)
        for case in cases[:measured]:
            add(Path(options["--out"]), "steps", figures(case))
        for _ in range(2 if status else 0):  # two ranks say so
            add(Path(options["--out"]), "steps", {"case": asdict(cases[measured]), "status": status, "why": "8 GiB"})
        return ended


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path, {"size": "tiny"})


def written(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())


def test_the_whole_command(tmp_path: Path) -> None:
    """Machine, attention, packed against padded; under ZeRO-3 in fp16 steps of stage 4 and a checkpoint."""
    env = {**os.environ, "PYTHON": sys.executable}
    options = ["--dry-run", "--steps", "2", "--out", str(tmp_path), "--only", "checks", "ZeRO-3, fp16, stage 4"]
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), *options], env=env, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    found = written(tmp_path)
    assert found["machine"]["torch"] and found["ceilings"]["matmul_tflops"] > 0
    assert {(row["precision"], row["backend"]) for row in found["attention"]} == {("bf16", "sdpa"), ("fp16", "sdpa")}
    assert [row["precision"] for row in found["whole_model"]] == ["fp32", "bf16", "fp16"]
    pixels, features = found["steps"]
    assert (pixels["case"]["source"], features["case"]["source"]) == ("pixels", "features")
    for row in (pixels, features):
        assert len(row["losses"]) == 5 and row["rates"]["samples_s"] > 0 and row["estimated_gib"] > 1
        parts = row["seconds_by_part"]
        assert set(parts) == set(PARTS) and all(parts[part] > 0 for part in ("phi", "backward", "optimizer", "head"))
        assert row["host_pct"] == 100 and 0 < row["profile"]["busy_pct"] <= 100
        assert row["profile"]["kernels"] > 100 and len(row["profile"]["top"]) == 20
    assert pixels["seconds_by_part"]["vision"] > 0 == features["seconds_by_part"]["vision"]
    (save,) = found["save"]
    assert save["gb"] > 0 and all(value > 0 for name, value in save.items() if name.endswith("seconds"))
    assert found["checks"] and all(each["passed"] for each in found["checks"])
    assert not found["failed"] and not found["left_out"]
    assert "| ZeRO-3, fp16, stage 4, features, 2 samples |" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "log.txt", "table.md"]


def measured(module: str, arguments: list[str], log: Path) -> int:
    """Return the exit code of a measuring process, which this is."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"benchmarks.gpu.{module}", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Forking(Launcher):
    """A launcher whose processes are forked from one that has imported everything."""

    def __call__(self, module: str, arguments: list[str], ranks: int | None = None) -> ProcessEnd:
        return ProcessEnd(apart(measured, module, arguments, self._log))


def test_the_original_before_and_after_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first loss is ours on the same weights and samples; every row of ours has its ratio, or a reason."""
    words = ["original's procedure, stage 4, 2 samples", "ZeRO-2, bf16, stage 4"]
    monkeypatch.setattr(command, "Launcher", Forking)
    command.main(["--gpus", "0", "--dry-run", "--steps", "2", "--out", str(tmp_path), "--only", *words])
    printed = capsys.readouterr().out
    found = written(tmp_path)
    cases = [Case(**row["case"]) for row in found["steps"]]
    assert [number for number, case in enumerate(cases) if case.original] == [0, 6]
    plain = [(case.source, case.batch) for case in cases[1:6] if not case.recompute]
    assert plain == [("pixels", 2), ("features", 2), ("pixels", 16), ("features", 16)]
    assert [(case.lever, case.batch) for case in cases[7:]] == [(COMPILED, 2), (COMPILED, 16)]
    same = [each for each in found["checks"] if "difference of the loss from ours" in each["name"]]
    assert len(same) == 2 and all(each["passed"] for each in same)
    assert len(found["steps"][0]["losses"]) == 5
    ours = next(
        line for line in printed.splitlines() if line.startswith("| ZeRO-2, bf16, stage 4, pixels, 2 samples |")
    )
    ratio = found["steps"][1]["rates"]["samples_s"] / original_rates(found["steps"])[4, 2]
    assert f"| {ratio:.2f} |" in ours
    reasons = {each["what"].split(", ")[3]: each["why"] for each in found["left_out"]}
    assert set(reasons) == {*LEVERS} - {COMPILED} and "needs a GPU" in reasons["fp8"]
    assert "kernels of ZeRO-2, bf16, stage 4" in printed


def test_every_case_that_matters_is_planned() -> None:
    ours = [case for group in groups() for case in group.cases if not case.original and not case.lever]
    planned = {(case.stage, case.zero, case.precision, case.source) for case in ours}
    assert planned == {
        (s, z, p, f) for s in (1, 4) for z in (2, 3) for p in ("bf16", "fp16") for f in ("pixels", "features")
    }
    assert {case.group for group in groups() for case in group.cases} == {group.name for group in groups()}
    assert [group.name for group in groups() if group.save] == ["ZeRO-2, bf16, stage 4", "ZeRO-3, fp16, stage 4"]
    by_default = [group for group in groups() if group.by_default]
    assert {(case.zero, case.precision) for group in by_default for case in group.cases} == {(0, "fp16"), (2, "bf16")}
    assert [group.module for group in by_default[:3]] == ["original", "steps", "original"]
    assert {case.lever for group in by_default for case in group.cases} == {"", *LEVERS}


def test_levers() -> None:
    quantized = Case(4, 2, "bf16", "pixels", 2, lever=QUANTIZED)
    assert obstacle(PIXELS, "tiny") is None and "block" in obstacle(quantized, "tiny")
    in_fp8 = Case(4, 2, "bf16", "pixels", 2, lever=FP8)
    assert obstacle(in_fp8, "published") is None and "needs a GPU" in (obstacle(in_fp8, "tiny") or "")


def test_busy_share() -> None:
    """Kernels next to each other on two streams count once, gaps do not."""
    spans = [(0, 10), (5, 12), (20, 30), (22, 25)]
    events = [SimpleNamespace(time_range=SimpleNamespace(start=start, end=end)) for start, end in spans]
    assert busy_share(events) == pytest.approx(22 / 30) and busy_share([]) == 0


def test_quantized_weights_on_the_device() -> None:
    """The case of 4 bit trains what the others train."""
    pytest.importorskip("bitsandbytes")
    import torch

    config = model_config(load_recipe(ROOT / "stages/stage4.yaml", overrides(4, "tiny")), "tiny")
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 128
    plain, quantized = (build(config, torch.bfloat16, torch.device("cpu"), bits) for bits in (None, 4))
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (plain, quantized)]
    assert trained[0] == trained[1] and any("codes" in name for name, _ in quantized.named_buffers())
    batch = make_batches(config, PIXELS, 0, pinned=False).loaded[0].batch
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(**model_inputs(batch)).token_losses.isfinite().all()


def test_results_are_on_disk_while_the_process_runs(tmp_path: Path, report: Report) -> None:
    """If all is cut off there, what was measured is in the output folder."""

    def cut_off(module: str, arguments: list[str]) -> ProcessEnd:
        options = dict(itertools.pairwise(arguments))
        add(Path(options["--out"]), "steps", figures(PIXELS))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_group(cut_off, Group((PIXELS, FEATURES)), [], tmp_path / "elsewhere", report)
    (line,) = read(tmp_path / "running.jsonl")
    assert line["value"]["case"] == asdict(PIXELS)


def test_ratios(report: Report) -> None:
    """Of one GPU to the original's mean before and after; the original's own, too."""
    original = Case(4, 0, "fp16", "pixels", 2, original=True)
    rows = [figures(original), figures(PIXELS), figures(original)]
    rows[0]["rates"]["samples_s"], rows[2]["rates"]["samples_s"], rows[1]["rates"]["samples_s"] = 4.0, 6.0, 20.0
    assert original_rates(rows) == {(4, 2): 5.0}
    ratios = [line.split(" | ")[2] for line in step_table(rows, gpus=2)[2:]]
    assert ratios == ["0.80", "2.00", "1.20"]


def test_without_memory_half_the_batch(tmp_path: Path, report: Report) -> None:
    """A row says so, the other cases are measured all the same, and nothing has failed."""
    launch = FakeProcess((1, OUT_OF_MEMORY, ProcessEnd(1, "exit code 1")), (2, None, ProcessEnd(0)))
    other = Case(4, 2, "bf16", "pixels", 2, recompute=True)
    run_group(launch, Group((FEATURES, PIXELS, other)), [], tmp_path, report)
    assert launch.asked[1] == [Case(4, 2, "bf16", "pixels", 1), other]
    assert [row["status"] for row in written(tmp_path)["steps"]] == [MEASURED, OUT_OF_MEMORY, MEASURED, MEASURED]
    assert report.is_good
    assert "| ZeRO-2, bf16, stage 4, pixels, 2 samples | out of memory |" in report.text()


def test_not_even_one_sample_fits(tmp_path: Path, report: Report) -> None:
    launch = FakeProcess((0, OUT_OF_MEMORY, ProcessEnd(1)))
    run_group(launch, Group((Case(1, 2, "bf16", "pixels", 1),)), [], tmp_path, report)
    assert len(launch.asked) == 1 and report.is_good


def test_a_process_that_dies(tmp_path: Path, report: Report) -> None:
    """What it had measured stays, the case it died of is named, and the next one is measured."""
    launch = FakeProcess((1, None, ProcessEnd(-11, "exit code -11: illegal memory access")), (1, None, ProcessEnd(0)))
    other = Case(4, 2, "bf16", "pixels", 16)
    run_group(launch, Group((PIXELS, FEATURES, other)), [], tmp_path, report)
    assert launch.asked == [[PIXELS, FEATURES, other], [other]]
    found = written(tmp_path)
    assert [row["case"] for row in found["steps"]] == [asdict(PIXELS), asdict(other)]
    assert found["failed"] == [{"what": str(FEATURES), "why": "exit code -11: illegal memory access"}]
    assert not report.is_good and "FAILED: ZeRO-2, bf16, stage 4, features, 2 samples" in report.text()


def test_a_checkpoint_that_fails(tmp_path: Path, report: Report) -> None:
    run_group(FakeProcess((1, None, ProcessEnd(1, "full"))), Group((PIXELS,), save=True), [], tmp_path, report)
    assert "the checkpoint after its cases: full" in report.text() and not report.is_good


def test_the_time_is_up(tmp_path: Path, report: Report) -> None:
    """It is no failure, but it is reported."""
    run_group(
        FakeProcess((1, None, ProcessEnd(None, "stopped", by_budget=True))),
        Group((PIXELS, FEATURES)),
        [],
        tmp_path,
        report,
    )
    assert report.is_good
    assert "left out: ZeRO-2, bf16, stage 4, features, 2 samples (stopped)" in report.text()


def test_checks_that_die_are_a_failure(tmp_path: Path, report: Report) -> None:
    run_checks(lambda *_, **__: ProcessEnd(1, "no kernel image"), "tiny", tmp_path / "lines", report)
    assert not report.is_good and "FAILED: checks: no kernel image" in report.text()


@pytest.mark.parametrize(
    ("rows", "failed"),
    [
        ([figures(PIXELS, (5.0, 4.0)), figures(Case(4, 3, "bf16", "pixels", 2), (5.0, 4.02))], []),
        ([figures(PIXELS, (5.0, 4.0)), figures(Case(4, 3, "bf16", "pixels", 2), (5.0, 4.1))], ["under ZeRO-2"]),
        ([figures(PIXELS, (5.0, 4.0)), figures(Case(4, 3, "bf16", "pixels", 2), (9.0, 9.0), before=3)], []),
        ([figures(PIXELS, (5.0, 4.0)), figures(Case(4, 2, "fp16", "pixels", 2), (5.2, 4.0))], ["in bf16"]),
        ([figures(PIXELS, (5.0, float("nan")))], ["not finite"]),
        ([figures(PIXELS, skipped=1)], ["skipped steps"]),
        ([figures(Case(4, 2, "fp16", "pixels", 2), skipped=MAX_SKIPPED["fp16"])], []),
    ],
)
def test_what_cases_say_of_each_other(rows: list[dict], failed: list[str]) -> None:
    names = [each["name"] for each in step_checks(rows) if not each["passed"]]
    assert len(names) == len(failed) and all(part in name for part, name in zip(failed, names, strict=True))


def test_a_wrong_back_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks at what comes after, in attention alone and in the whole model."""
    import torch
    import torch.nn.functional as F

    def wrong(q, k, v, packing):
        rows = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows).transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attention", wrong)
    monkeypatch.setattr("tinygptv_ds.models.phi.varlen_attention", wrong)
    attention.compare_backends(torch.device("cpu"), "tiny", tmp_path / "lines")
    attention.compare_packed_with_padded(torch.device("cpu"), tmp_path / "lines")
    checks = [line["value"] for line in read(tmp_path / "lines") if line["kind"] == "check"]
    assert len(checks) == 9 and not any(each["passed"] for each in checks)


def test_nan_passes_no_check() -> None:
    assert not check("apart", float("nan"), 1.0)["passed"] and check("apart", 1.0, 1.0)["passed"]


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    add(tmp_path / "lines", "check", 1)
    with (tmp_path / "lines").open("a") as file:
        file.write('{"kind": "steps", "val')
    assert read(tmp_path / "lines") == [{"kind": "check", "value": 1}] and read(tmp_path / "none") == []


def test_a_process_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the time limit; of one that fails by itself the last output is reported."""
    launch = Launcher(tmp_path, minutes=1, ranks=1)
    assert launch.has_time()
    assert launch("no_such_part", []).why.endswith("No module named benchmarks.gpu.no_such_part")
    short = Launcher(tmp_path, minutes=0.2 / 60, ranks=1)
    began = time.monotonic()
    ended = short("checks", ["--size", "tiny", "--out", str(tmp_path / "lines")])
    assert (ended.code, ended.by_budget) == (None, True) and time.monotonic() - began < 10
    assert not short.has_time()


def test_only_missing_packages_are_installed(tmp_path: Path) -> None:
    wheels = [tmp_path / name for name in ("torch-1.0-py3-none-any.whl", "py_test_nothing-1.0-py3-none-any.whl")]
    assert install.missing_packages(wheels) == wheels[1:]
