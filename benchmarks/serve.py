"""The server under load: clients that ask about images of their own, with and without batching.

For each `--max-batch`, a server is started, and 1, 8, 32 and 200 clients ask it one question after another for some
seconds. Every client streams its answers; refused with 429 or 503, it waits as `Retry-After` says. The server's CPU
time is measured next to the clock, because other work on the machine affects it least.

    python benchmarks/serve.py my_model [--batches 1 8] [--clients 1 8 32 200] [--seconds 20] [OPTION of serve ...]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinygptv_ds.cli import run_command
from tinygptv_ds.distributed import free_port

SIDE = 320  # of the images, in pixels
QUESTION = "[caption] describe the image"
COUNTS = "clients  answered  429  other"
TIMES = "latency s, 50 / 95 %  first text s, 50 / 95 %  tokens/s  tokens/CPU s  MB before  after"


@dataclass
class Load:
    """What the clients of one measurement have seen."""

    answered: int = 0
    tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    first_texts: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every combination, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as `serve` takes it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="values of --max-batch")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 200])
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args, options = parser.parse_known_args(argv)
    found = []
    for batch in args.batches:
        print(f"\n--max-batch {batch}\n{COUNTS}  {TIMES}", flush=True)
        with server(args.model, batch, options) as (address, process):
            asyncio.run(load(address, 1, 2.0, args.tokens))  # the first request costs more than others
            for clients in args.clients:
                found.append({"batch": batch} | measure(address, process, clients, args.seconds, args.tokens))
                print(row(found[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@contextmanager
def server(model: str, batch: int, options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run a server; yield its address and process."""
    port = free_port()
    command = [sys.executable, "-m", "tinygptv_ds", "serve", model, "--port", str(port), "--max-batch", str(batch)]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            while not is_ready(address):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with {process.returncode}")
                time.sleep(0.2)
            yield address, process.pid
        finally:
            process.terminate()


def is_ready(address: str) -> bool:
    """Whether the model is loaded."""
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def measure(address: str, process: int, clients: int, seconds: float, tokens: int) -> dict:
    """Return the figures of some clients."""
    before, cpu, began = resident_mb(process), cpu_seconds(process), time.monotonic()
    seen = asyncio.run(load(address, clients, seconds, tokens))
    spent, used = time.monotonic() - began, cpu_seconds(process) - cpu
    return {
        "clients": clients,
        "answered": seen.answered,
        "refused": dict(seen.refused),
        "latency": [percentile(seen.latencies, share) for share in (0.5, 0.95)],
        "first_text": [percentile(seen.first_texts, share) for share in (0.5, 0.95)],
        "tokens_s": seen.tokens / spent,
        "tokens_cpu_s": seen.tokens / used,
        "mb": [before, resident_mb(process)],
    }


async def load(address: str, clients: int, seconds: float, tokens: int) -> Load:
    """Let clients ask until the time is over; answers that have begun are waited for."""
    seen, until = Load(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await asyncio.gather(*(ask_on(client, body(model, n, tokens), until, seen) for n in range(clients)))
    return seen


async def ask_on(client: httpx.AsyncClient, request: dict, until: float, seen: Load) -> None:
    """Ask one question after another."""
    while time.monotonic() < until:
        began, first, usage = time.monotonic(), None, None
        async with client.stream("POST", "/v1/chat/completions", json=request) as reply:
            if reply.status_code != 200:
                again = reply.headers.get("Retry-After")
                seen.refused[f"{reply.status_code}" + ("" if again else " without Retry-After")] += 1
                await asyncio.sleep(min(float(again or 1), max(until - time.monotonic(), 0)))
                continue
            async for line in reply.aiter_lines():
                chunk = json.loads(line[6:]) if line.startswith("data: {") else {}
                usage = chunk.get("usage") or usage
                if first is None and any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                    first = time.monotonic() - began
        seen.answered += 1
        seen.latencies.append(time.monotonic() - began)
        seen.first_texts.append(first if first is not None else seen.latencies[-1])
        seen.tokens += usage["completion_tokens"] if usage else 0


def body(model: str, client: int, tokens: int) -> dict:
    """The request of a client, with an image of its own."""
    out = io.BytesIO()
    Image.effect_noise((SIDE, SIDE), 20 + client).convert("RGB").save(out, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    settings = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": [{"role": "user", "content": content}], **settings}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the quantile at this share of the values; NaN of none."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def resident_mb(process: int) -> float:
    """Resident memory of a process."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def row(figures: dict) -> str:
    """One line of the table."""
    refused = figures["refused"]
    queue = refused.get("429", 0)
    (half, most), (first, late), (before, after) = figures["latency"], figures["first_text"], figures["mb"]
    counts = f"{figures['clients']:7}{figures['answered']:10}{queue:5}{sum(refused.values()) - queue:7}"
    times = f"{half:15.2f} / {most:6.2f}{first:17.2f} / {late:6.2f}"
    return f"{counts}{times}{figures['tokens_s']:10.1f}{figures['tokens_cpu_s']:14.1f}{before:11.0f}{after:7.0f}"


if __name__ == "__main__":
    run_command(main)
