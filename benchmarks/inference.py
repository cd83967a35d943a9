"""Memory and speed of generation with random weights of the full size in 16, 8 and 4 bit.

Each form is loaded in its own process from base weights and an adapter and answers a question about one image of 224
pixels with a fixed number of tokens; then it answers a batch of eight short questions without an image. Memory is the
kernel's VmHWM, the largest resident set, with Python and the libraries included (0.8 GB). Times are CPU seconds of one
thread, because other work on the machine affects those least.

    python benchmarks/inference.py [--dir FOLDER] [--only TEXT] [--tokens N] [--json FILE]
    python benchmarks/inference.py --layers      # times of one linear layer of Phi, by number of rows
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinygptv_ds.cli import run_command

if TYPE_CHECKING:
    from torch import Tensor

FORMS: dict[str, dict] = {
    "bf16": {},
    "bf16, LoRA merged": {"merge": True},
    "8 bit": {"bits": 8},
    "8 bit, ViT too": {"bits": 8, "quantize_vision": True},
    "4 bit": {"bits": 4},
    "4 bit, ViT too": {"bits": 4, "quantize_vision": True},
}
BATCH = 8
ROUNDS = 2  # the better one is reported
WORDS = 40  # number of words in the question, one token each
ROWS = (1, 8, 64, 256)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the weights, measure every form, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="folder for the weights (9 GB), kept for another call")
    parser.add_argument(
        "--size", choices=["published", "tiny"], default="published", help="tiny: only to try the script"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only forms with TEXT in their name")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--layers", action="store_true", help="time one linear layer instead")
    parser.add_argument(
        "--form", nargs=2, metavar=("NAME", "RECIPE"), help=argparse.SUPPRESS
    )  # set in the process that measures this form
    args = parser.parse_args(argv)
    if args.layers:
        rows = time_layers()
    elif args.form:
        print(json.dumps(figures(args.form[0], args.form[1], args.tokens)))
        return
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure_all(args.dir or Path(folder), args.size, args.only, args.tokens)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure_all(folder: Path, size: str, only: str, tokens: int) -> list[dict]:
    """Measure every form with `only` in its name, and print it."""
    recipe = folder / "stage4.yaml"
    if not recipe.is_file():
        from benchmarks.made_up import make_weights

        print(f"making weights of the {size} size in {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(make_weights(folder, size).phi_bin)
    columns = f"{'loading, GB':>12}{'peak, GB':>9}{'load, s':>9}{'first token, s':>16}{'tokens/s':>10}"
    print(f"\n{'':20}{columns}{f'{BATCH} at once':>11}", flush=True)
    found = []
    for name in FORMS:
        if only in name:
            command = [sys.executable, __file__, "--form", name, str(recipe), "--tokens", str(tokens)]
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr}")
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
            show(found[-1])
    return found


def figures(name: str, recipe: str, tokens: int) -> dict:
    """Return the figures of one form, measured in this process."""
    import numpy as np
    import torch

    from tinygptv_ds.generate.conversation import Prompt
    from tinygptv_ds.generate.generate import answers, stream
    from tinygptv_ds.generate.load import load_model
    from tinygptv_ds.generate.settings import Generation

    torch.set_num_threads(1)
    trained = Path(recipe).with_suffix(".pth")
    began = time.process_time()
    model, processor = load_model(trained, torch.bfloat16, device="cpu", recipe=Path(recipe), **FORMS[name])
    loaded, peak_loading = time.process_time() - began, peak_gb()
    words = tuple(f"w{number}" for number in range(WORDS))
    size = processor.image_size
    image = np.random.default_rng(0).integers(0, 255, (3, size, size), dtype=np.uint8)
    prompt = Prompt(("<ImageHere>", *words), (image,), add_bos_token=True, stop=())
    short = Prompt(words[:8], add_bos_token=True, stop=())
    fixed = Generation(max_new_tokens=tokens, min_new_tokens=tokens)
    firsts, rates, together = [], [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        answer = stream(model, processor, prompt, fixed)
        times = [(time.process_time() - began, answer.new_tokens) for _piece in answer]
        (first, before), (last, after) = times[0], times[-1]
        firsts.append(first)
        rates.append((after - before) / (last - first))
        began = time.process_time()
        list(answers(model, processor, [short] * BATCH, fixed, batch_size=BATCH))
        together.append(BATCH * tokens / (time.process_time() - began))
    return {
        "form": name,
        "peak_loading": peak_loading,
        "peak": peak_gb(),
        "load": loaded,
        "first_token": min(firsts),
        "tokens_s": max(rates),
        "tokens_s_together": max(together),
    }


def show(row: dict) -> None:
    """Print one line of the table."""
    memory = f"{row['peak_loading']:>12.2f}{row['peak']:>9.2f}{row['load']:>9.0f}"
    speed = f"{row['first_token']:>16.2f}{row['tokens_s']:>10.2f}{row['tokens_s_together']:>11.2f}"
    print(f"{row['form']:20}{memory}{speed}", flush=True)


def peak_gb() -> float:
    """The largest resident set so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def time_layers() -> list[dict]:
    """Milliseconds of Phi's largest linear layer (2560 to 10240) by rows of the input, the fastest of ten."""
    import torch
    from torch import nn

    from tinygptv_ds.generate.quantize import quantized_linear

    torch.set_num_threads(1)
    torch.manual_seed(0)
    true = nn.Linear(2560, 10240).requires_grad_(False)
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    layers: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
        "fp32": (true, torch.float32),
        "bf16": (nn.Linear(2560, 10240, dtype=bf16).requires_grad_(False), bf16),
        "8 bit, bitsandbytes": (quantized_linear(true.weight, true.bias.to(bf16), 8, bf16, cpu), bf16),
        "4 bit, bitsandbytes": (quantized_linear(true.weight, true.bias.to(bf16), 4, bf16, cpu), bf16),
    }
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        weight_only = nn.Sequential(nn.Linear(2560, 10240, dtype=bf16).requires_grad_(False))
        quantize_(weight_only, Int8WeightOnlyConfig())
        layers["8 bit, torchao"] = (weight_only, bf16)
    print(f"{'ms by rows of input':24}{''.join(f'{rows:>9}' for rows in ROWS)}")
    found = []
    with torch.no_grad():
        for name, (layer, dtype) in layers.items():
            spent = {rows: 1000 * fastest(layer, torch.randn(rows, 2560, dtype=dtype)) for rows in ROWS}
            found.append({"layer": name, "ms": spent})
            print(f"{name:24}{''.join(f'{ms:>9.2f}' for ms in spent.values())}", flush=True)
    return found


def fastest(layer: Callable[[Tensor], Tensor], x: Tensor, times: int = 10) -> float:
    """CPU seconds of the fastest call after two that warm up."""
    spent = []
    for _ in range(times + 2):
        began = time.process_time()
        layer(x)
        spent.append(time.process_time() - began)
    return min(spent[2:])


if __name__ == "__main__":
    run_command(main)
