"""The server under load: requests are answered together as they are alone, in order; it drains and reports itself."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import tiny
from helpers.patience import PATIENCE
from test_serve import DEFAULTS, HELLO, KEY, NAME, With, answerer, data_url, said, serving, until
from test_user_errors import ROOT

from tinygptv_ds.apps.serve.metrics import Counter, Histogram
from tinygptv_ds.apps.serve.request_images import ImageLimits
from tinygptv_ds.apps.serve.routes import Access, Limits, build_app
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.decoding import Decoder
from tinygptv_ds.generate.row import Row

__all__ = ["answerer"]
LIMITS = Limits(200_000, new_tokens=50, waiting=30, images=ImageLimits(2, 20_000, 90_000), batch=4)
CHAT = "/v1/chat/completions"


class Watched(Decoder):
    """A decoder that keeps who was in the batch together."""

    def __init__(self, answerer: Answerer) -> None:
        super().__init__(answerer.model, answerer.processor)
        self.sizes: list[int] = []
        self.joined: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        self.joined += rows
        super().add(rows)

    def step(self) -> None:
        self.sizes.append(len(self.rows))
        super().step()


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """Return the text of an answer, streamed or not."""
    if not body.get("stream"):
        reply = await client.post(CHAT, json=body)
        return reply.json()["choices"][0]["message"]["content"]
    async with client.stream("POST", CHAT, json=body) as reply:
        found = [line async for line in reply.aiter_lines()]
    return "".join(re.findall(r'"content":\s*"((?:[^"\\]|\\.)*)"', "\n".join(found))).encode().decode("unicode_escape")


def requests() -> list[dict[str, Any]]:
    """Unlike each other in length, images, settings and stops; half of them streamed."""
    images = [data_url(image) for image in tiny.encoded_images(3)]
    plain = [
        {"messages": [said("what colour ?", *images[: number % 3])], "max_tokens": 5 + 3 * number}
        for number in range(8)
    ]
    drawn = [body | {"temperature": 1.2, "seed": number, "top_k": 30} for number, body in enumerate(plain)]
    ended = [body | {"stop": ["a", "e"], "repetition_penalty": 1.5} for body in plain]
    return [{"model": NAME, "stream": number % 2 == 1} | body for number, body in enumerate([*plain, *drawn, *ended])]


def test_answers_are_those_of_single_requests(answerer: Answerer) -> None:
    watched = Watched(answerer)

    async def scenario(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
            alone = [await ask(client, body) for body in requests()]
            assert set(watched.sizes) <= {0, 1}
            together = await asyncio.gather(*(ask(client, body) for body in requests()))
            assert together == alone and len(set(alone)) > 10
            assert max(watched.sizes) == 4

    with serving(build_app(With(answerer, watched), DEFAULTS, LIMITS)) as address:
        asyncio.run(scenario(address))


def test_who_came_first_is_first(answerer: Answerer) -> None:
    watched = Watched(answerer)
    gate = threading.Event()
    watched.step = lambda: (gate.wait(PATIENCE), Decoder.step(watched))  # the first one holds the batch up

    async def scenario(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
            asked = []
            for number in range(8):
                body = {"model": NAME, "messages": [said("x" * (1 + (number * 5) % 8))], "max_tokens": 4}
                asked.append(asyncio.create_task(ask(client, body)))
                while (await client.get("/health")).json()["in_hand"] <= number:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)  # its prompt is made
            gate.set()
            await asyncio.gather(*asked)

    with serving(build_app(With(answerer, watched), DEFAULTS, LIMITS)) as address:
        asyncio.run(scenario(address))
    lengths = [len(row.prompt_ids) for row in watched.joined]
    assert [length - min(lengths) for length in lengths] == [(number * 5) % 8 for number in range(8)]


def test_one_that_cannot_be_read_harms_no_other(answerer: Answerer) -> None:
    """Two join together, of which one fails: it alone is answered with 500."""

    class Choosy(Watched):
        def add(self, rows: Sequence[Row]) -> None:
            if any(row.seed == 13 for row in rows):
                raise RuntimeError("out of memory")
            super().add(rows)

    choosy = Choosy(answerer)
    gate = threading.Event()
    choosy.step = lambda: (gate.wait(PATIENCE), Decoder.step(choosy))

    class Marked(With):
        def row(self, prompt: Any, generation: Any, *given: Any) -> Row:
            row = super().row(prompt, generation, *given)
            row.seed = 13 if generation.seed == 13 else 0
            return row

    async def scenario(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
            body = {"model": NAME, "messages": HELLO}
            first = asyncio.create_task(client.post(CHAT, json=body))
            await asyncio.to_thread(until, lambda: choosy.rows)
            others = [asyncio.create_task(client.post(CHAT, json=body | {"seed": seed})) for seed in (13, 14)]
            while "requests_waiting 2\n" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            gate.set()
            assert (await first).status_code == 200
            assert [(await other).status_code for other in others] == [500, 200]

    with serving(build_app(Marked(answerer, choosy), DEFAULTS, LIMITS)) as address:
        asyncio.run(scenario(address))


def test_metrics(answerer: Answerer) -> None:
    """They count what was asked, answered and refused; with a key they need it, as Prometheus can send it."""
    with serving(build_app(answerer, DEFAULTS, LIMITS, Access(KEY))) as address:
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}) as client:
            body = {"model": NAME, "messages": HELLO, "max_tokens": 7}
            first, _ = (client.post(CHAT, json=body).json() for _ in range(2))
            client.post(CHAT, json=body | {"n": 2})
            client.post(CHAT, json=body | {"model": "gpt-4"})
            reply = client.get("/metrics")
        assert httpx.get(f"{address}/metrics").status_code == 401
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = reply.text.splitlines()
    for line in (
        'tinygptv_requests_total{code="200"} 2',
        'tinygptv_requests_total{code="400"} 1',
        'tinygptv_requests_refused_total{reason="unsupported_parameter"} 1',
        'tinygptv_requests_refused_total{reason="model_not_found"} 1',
        f"tinygptv_prompt_tokens_total {2 * first['usage']['prompt_tokens']}",
        "tinygptv_generated_tokens_total 14",
        'tinygptv_batch_size_bucket{le="1"} 14',
        "tinygptv_requests_in_flight 0",
        "tinygptv_requests_waiting 0",
        "tinygptv_requests_running 0",
        "tinygptv_time_to_first_token_seconds_count 2",
        'tinygptv_request_duration_seconds_bucket{le="+Inf"} 2',
        "# TYPE tinygptv_request_duration_seconds histogram",
    ):
        assert line in lines, line
    names = {line.split(" ")[2] for line in lines if line.startswith("# TYPE")}
    assert all(re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"\})? [0-9.e+-]+', line) for line in lines if line[0] != "#")
    assert {re.sub(r"(_bucket|_sum|_count)?[{ ].*", "", line) for line in lines if line[0] != "#"} <= names


def test_histograms_and_labels() -> None:
    histogram = Histogram("h", "Text.", (1, 2.5))
    for number in (0.5, 1, 1.5, 9):
        histogram.observe(number)
    assert list(histogram.lines())[2:] == [
        'h_bucket{le="1"} 2', 'h_bucket{le="2.5"} 3', 'h_bucket{le="+Inf"} 4', "h_sum 12", "h_count 4",
    ]  # fmt: skip
    counter = Counter("c", "Text.", "code")
    assert len(list(counter.lines())) == 2
    counter.add(2, "200")
    assert list(counter.lines())[2:] == ['c{code="200"} 2']


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(model: Path, port: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tinygptv_ds", "serve", str(model), "--port", str(port), "--dtype", "fp32"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_loading_serving_draining(exported: Path, port: int) -> None:
    """503 before the model is there; after SIGTERM those in hand are answered, others get 503, and it exits with 0."""
    server = started(exported, port, "--model-name", NAME, "--max-new-tokens", "150", "--max-batch", "1")
    try:
        with (
            ThreadPoolExecutor(12) as pool,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client,
        ):
            seen = []

            def answers() -> bool:
                try:
                    reply = client.get("/health")
                except httpx.TransportError:
                    return False
                seen.append((reply.status_code, reply.json()["status"], reply.headers.get("Retry-After")))
                return reply.status_code == 200

            until(answers)
            assert set(seen) == {(503, "loading", "10"), (200, "ready", None)}
            with client.stream("POST", CHAT, json={"model": NAME, "messages": HELLO, "stream": True}) as reply:
                lines = reply.iter_lines()
                next(lines)
                body = {"model": NAME, "messages": HELLO}
                waiting = [pool.submit(client.post, CHAT, json=body) for _ in range(12)]
                in_hand: list[int] = []

                def received() -> bool:
                    in_hand.append(client.get("/health").json()["in_hand"])
                    return in_hand[-1] > 3

                until(received)
                server.send_signal(signal.SIGTERM)
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as other:
                    refused = other.post(CHAT, json=body)
                    health = other.get("/health")
                ended = [line for line in lines if line]
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
            assert refused.json()["error"]["code"] == "draining"
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            assert ended[-1] == "data: [DONE]" and len(ended) > 50
            # The signal may overtake some of the twelve; those in hand before it, next to the stream, are answered.
            statuses = [each.result().status_code for each in waiting]
            assert set(statuses) <= {200, 503} and statuses.count(200) >= in_hand[-1] - 1
        assert server.wait(PATIENCE) == 0, server.stderr.read()
    finally:
        server.kill()
        server.communicate()


def test_a_model_that_does_not_load_ends_the_server(exported: Path, port: int, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:2000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    done = started(tmp_path, port)
    _, errors = done.communicate(timeout=PATIENCE)
    assert done.returncode == 2 and "model.safetensors" in errors and "Traceback" not in errors, errors
