"""The server, asked by OpenAI's own client over a real socket, with a tiny model behind it."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from helpers import tiny
from helpers.patience import PATIENCE
from PIL import Image

from tinygptv_ds.apps.serve.connections import BoundedConnection
from tinygptv_ds.apps.serve.request_images import ImageLimits
from tinygptv_ds.apps.serve.routes import Access, Limits, build_app
from tinygptv_ds.apps.serve.serve import allowed_hosts
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.conversation import Prompt, Turn
from tinygptv_ds.generate.decoding import Decoder
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.templates import TEMPLATES, choose_template

NAME, KEY = "tiny", "secret"
LIMITS = Limits(body_bytes=200_000, new_tokens=50, waiting=2, images=ImageLimits(2, 20_000, 90_000), batch=1)
DEFAULTS = Generation(max_new_tokens=12)


@contextmanager
def serving(app: object) -> Iterator[str]:
    """Yield the address of a server in a thread, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(app, http=BoundedConnection, log_level="critical", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([free],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(10)


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Recording(Answerer):
    """A model that keeps what it was asked last."""

    def row(self, prompt: Prompt, *given: Any) -> Row:
        self.__dict__["asked"] = prompt
        return super().row(prompt, *given)


@pytest.fixture(scope="module")
def answerer(loaded) -> Answerer:
    model, processor = loaded
    return Recording(model, processor, choose_template(None, processor.prompt_template, processor.end_sym), NAME)


@pytest.fixture(scope="module")
def address(answerer: Answerer) -> Iterator[str]:
    with serving(build_app(answerer, DEFAULTS, LIMITS, Access(KEY))) as there:
        yield there


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def post(address: str) -> Callable[..., httpx.Response]:
    """Send a body as it is."""

    def send(body: bytes, **headers: str) -> httpx.Response:
        given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
        return httpx.post(f"{address}/v1/chat/completions", content=body, headers=given)

    return send


def encoded(size: tuple[int, int] = (40, 30), colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def said(text: str, *urls: str) -> dict:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *images]}


def directly(answerer: Answerer, turns: list[Turn], generation: Generation) -> str:
    """Return the answer without a server."""
    (answer,) = answers(answerer.model, answerer.processor, [answerer.prompt(turns)], generation)
    return answer


def test_text(client: openai.OpenAI, answerer: Answerer) -> None:
    reply = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "what colour ?"}])
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == directly(answerer, [Turn("what colour ?")], DEFAULTS)
    assert choice.finish_reason == "length" and reply.usage.completion_tokens == 12
    prompt = answerer.prompt([Turn("what colour ?")])
    assert reply.usage.prompt_tokens == len(answerer.prompt_ids(prompt))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12


def test_images_and_history(client: openai.OpenAI, answerer: Recording) -> None:
    """The model is given the very pixels and the whole conversation, images before the words of their turn."""
    first, second = tiny.encoded_images(2)
    history = [said("what is it", data_url(first)), {"role": "assistant", "content": "a bus"}]
    reply = client.chat.completions.create(model=NAME, messages=[*history, said("and?", data_url(second))])
    prompt = answerer.asked
    tag = "<Img><ImageHere></Img>"
    assert prompt.text == f"[INST] {tag} what is it  [/INST]a bus###[INST] {tag} and?  [/INST]"
    seen = answerer.processor.pixels(prompt.images)
    assert torch.equal(seen, answerer.processor.pixels([first, second]))
    turns = [Turn("what is it", [first], "a bus"), Turn("and?", [second])]
    assert reply.choices[0].message.content == directly(answerer, turns, DEFAULTS)


def streamed(client: openai.OpenAI, **request: object) -> tuple[str, list]:
    chunks = list(client.chat.completions.create(model=NAME, stream=True, **request))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_streaming_equals_not_streaming(client: openai.OpenAI) -> None:
    request = {"messages": [said("what is it", data_url(encoded()))], "temperature": 1.5, "seed": 3, "max_tokens": 30}
    whole = client.chat.completions.create(model=NAME, **request)
    text, chunks = streamed(client, stream_options={"include_usage": True}, **request)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 10 and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_a_seed_repeats_and_another_differs(client: openai.OpenAI) -> None:
    def ask(**settings: float) -> str:
        return streamed(client, messages=[said("what is it")], temperature=1.5, max_tokens=20, **settings)[0]

    assert ask(seed=1, top_p=0.99) == ask(seed=1, top_p=0.99) != ask(seed=2, top_p=0.99)
    assert ask(seed=1, top_p=1e-6) == ask(seed=2, top_p=1e-6)  # of the likeliest token alone


def test_stops_are_left_out(client: openai.OpenAI) -> None:
    request = {"messages": [said("what colour ?")], "max_tokens": 30}
    whole = client.chat.completions.create(model=NAME, **request).choices[0].message.content
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    reply = client.chat.completions.create(model=NAME, stop=["never", stop], **request)
    assert reply.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens < 30
    assert streamed(client, stop=stop, **request)[0] == reply.choices[0].message.content


def test_models_and_health(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "tinygptv_ds"
    health = httpx.get(f"{address}/health").json()
    assert (health["status"], health["model"]) == ("ready", NAME)
    with pytest.raises(openai.NotFoundError, match="only model here is 'tiny'"):
        client.models.retrieve("gpt-4")
    for path in ("/v1/models/", f"/v1/models/{NAME}/", "/health/"):  # not redirected, behind a proxy to http
        assert httpx.get(f"{address}{path}", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    for path in ("/", "/chat/completions/", "/v1/completions"):
        error = httpx.post(f"{address}{path}").json()["error"]
        assert error["code"] == "unknown_url" and "this server has POST /v1/chat/completions" in error["message"]


OTHER_SERVERS = {"keep_alive": "5m", "chat_template_kwargs": {"enable_thinking": False}, "cache_prompt": True}
OTHER_SERVERS |= {"top_k": -1, "best_of": 1, "min_p": 0, "skip_special_tokens": True}
HELLO = [{"role": "user", "content": "hello"}]
BIG = data_url(encoded((400, 300)))
FORTY = [{"role": "user", "content": "word " * 700}]


@pytest.mark.parametrize(
    ("changes", "status", "param", "code", "words"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found", "'gpt-4' is not here; this server has 'tiny'"),
        ({"model": None}, 400, "model", "missing_required_parameter", "model is missing"),
        ({"messages": []}, 400, "messages", "invalid_value", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "invalid_value", "'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", None, "last message must be the user"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages", None, "last message must be the user"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "messages", None, "last message"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "invalid_value", "list"),
        ({"messages": [{**HELLO[0], "tool_calls": [1]}]}, 400, "messages[0].tool_calls", None, "not supported"),
        ({"messages": HELLO * 2100}, 400, "messages", "context_length_exceeded", "2,100 messages and parts exceed"),
        ({"messages": [said("x")] * 1100}, 400, "messages", "context_length_exceeded", "exceed the model's context"),
        ({"messages": [said("x" * 150_000)]}, 400, "messages", "context_length_exceeded", "150,000 characters exceed"),
        ({"stop": "\ud800"}, 400, "stop", "invalid_value", "half a character"),
        ({"messages": [said("x", "http://\ud800/")]}, 400, "messages[0].content[1].image_url.url", None, "half a char"),
        ({"messages": [said("half \ud800")]}, 400, "messages[0].content[0].text", "invalid_value", "half a character"),
        ({"messages": FORTY}, 400, "messages", "context_length_exceeded", "exceed the model's"),
        ({"max_tokens": 51}, 400, "max_tokens", None, "this server's limit of 50"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value", "greater than or equal to 1, not 0"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", None, "differ; give one"),
        ({"temperature": 2.5}, 400, "temperature", "invalid_value", "less than or equal to 2"),
        ({"top_p": 0}, 400, "top_p", "invalid_value", "greater than 0"),
        ({"seed": -2}, 400, "seed", "invalid_value", "greater than or equal to 0"),
        ({"stop": ["a"] * 17}, 400, "stop", "invalid_value", "at most 16"),
        ({"n": 2}, 400, "n", "unsupported_parameter", "only 1 is accepted"),
        ({"max_tokens": 4.5}, 400, "max_tokens", "invalid_value", "valid integer, not 4.5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
            400,
            "messages[0].content[0]",
            None,
            "'file'",
        ),
        ({"": 1}, 400, '""', "unsupported_parameter", '"" is not supported'),
        ({"messages": ["hello"]}, 400, "messages[0]", "invalid_value", "messages[0] must be a JSON object"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_parameter", "not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter", "not supported"),
        (
            {"response_format": {"type": "json_object"}},
            400,
            "response_format",
            None,
            'only {"type": "text"} is accepted',
        ),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort", "unsupported_parameter", "not supported"),
    ],
)
def test_what_is_refused(post, changes: dict, status: int, param: str, code: str | None, words: str) -> None:
    reply = post(json.dumps({"model": NAME, "messages": HELLO} | changes).encode())
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert words in error["message"] and error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code or code is None


def test_what_changes_nothing_is_taken(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=NAME, messages=HELLO).choices[0].message
    history = [*HELLO, plain.model_dump(), *HELLO]  # the client's own record of an answer is full of nulls
    neutral = {"n": 1, "tools": [], "logprobs": False, "frequency_penalty": 0, "user": "me", "store": False}
    neutral |= {
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "top_p": None,
        "logit_bias": {"5": 0},
        "stop": "",
    }
    neutral |= {"metadata": {"chat": "7"}, "service_tier": "auto", "parallel_tool_calls": True, "top_logprobs": 0}
    neutral |= {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none", "max_tokens": 12.0}
    neutral |= {"stream_options": {"include_usage": True}, "seed": -1.0, "extra_body": OTHER_SERVERS}
    assert client.chat.completions.create(model=NAME, messages=HELLO, **neutral).choices[0].message == plain
    assert client.chat.completions.create(model=NAME, messages=history).choices


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda url: url.replace(",", ",\n  "), ""),
        (lambda url: url + "\n", ""),
        (lambda url: "data:image/png;base64," + base64.encodebytes(encoded()).decode(), ""),
        (lambda url: url.rstrip("="), ""),
        (lambda url: url.replace("+", "-").replace("/", "_").replace("image_png", "image/png"), ""),
        (lambda url: f"\n {url} ", ""),
        (lambda url: url.replace("image/png", 'IMAGE/png;name="a,b;base64,c.png";charset=utf-8'), ""),
        (lambda url: "data:image/png," + "".join(f"%{byte:02X}" for byte in encoded((41, 31))), ""),
        (lambda url: url.replace("+", "%2B").replace("=", "%3D"), ""),
        (lambda url: url.partition(",")[2], "not as bare base64"),
        (lambda url: url.replace(";base64", ""), "must look like data:image/jpeg;base64"),
        (lambda url: "data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>", "it is SVG"),
        (lambda url: "data:image/png," + "%" * 20_000, "none of JPEG"),
    ],
)
def test_base64_as_clients_write_it(post, change: Callable[[str], str], words: str) -> None:
    """The image is the same whatever the spelling, and an error never repeats it."""
    plain = data_url(encoded((41, 31)))
    ask = lambda url: post(json.dumps({"model": NAME, "messages": [said("what?", url)]}).encode())  # noqa: E731
    reply = ask(change(plain))
    if words:
        assert words in reply.json()["error"]["message"] and plain[60:90] not in reply.text
    else:
        assert reply.json()["choices"] == ask(plain).json()["choices"], reply.json()


def test_parts_as_other_apis_spell_them(post) -> None:
    """Those of the Responses API and of transformers, texts alone, and a refusal of the assistant in the history."""
    url = data_url(encoded((41, 31)))
    image_url = {"image_url": {"url": url}}
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", **image_url}]
    ask = lambda *messages: post(json.dumps({"model": NAME, "messages": messages}).encode()).json()  # noqa: E731
    history = [*HELLO, {"role": "assistant", "content": "no"}, {"role": "user", "content": parts}]
    expected = ask(*history)["choices"]
    others = [
        [{"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": url, "detail": "auto"}],
        ["what?", {"type": "image", "url": url}],
        [{"type": "text", "text": "what?"}, {"type": "image", "image": url}],
        [parts[0], {"type": "image_url", "uuid": "7", "image_url": {"url": url, "format": "image/png"}}],
    ]
    said_no = [
        {"content": None, "refusal": "no"},
        {"content": [{"type": "refusal", "refusal": "no"}]},
        {"content": [{"type": "output_text", "text": "no", "annotations": [{"start": 0}]}], "id": "m1", "timestamp": 3},
    ]
    for number, content in enumerate(others):
        refusal = {"role": "assistant", **said_no[number % 3]}
        reply = ask(*HELLO, refusal, {"role": "user", "content": content})
        assert reply["choices"] == expected, reply
    wrong = ask({"role": "user", "content": [{"type": "image"}]})["error"]
    assert (wrong["param"], wrong["code"]) == ("messages[0].content[0].image_url", "missing_required_parameter")


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        ([data_url(encoded())] * 3, "3 images; at most 2"),
        ([BIG], "400 x 300 pixels is above the limit of 90,000"),
        ([data_url(b"x" * 30_000)], "larger than 20,000 bytes"),
        ([data_url(b"no image")], "cannot be decoded: it is none of JPEG"),
        ([data_url(encoded()[:60])], "cannot be decoded"),
        (["data:image/png,abc"], "must look like data:image/jpeg;base64"),
        (["data:image/png;base64,?"], "holds no base64"),
        (["file:///etc/passwd"], "file:"),
        (["http://127.0.0.1/a.png"], "127.0.0.1"),
        (["http://[::1]/a.png"], "::1"),
        (["http://169.254.169.254/latest"], "169.254.169.254"),
        (["a.png"], "not as bare base64 or a path"),
    ],
)
def test_images_that_are_refused(client: openai.OpenAI, urls: list[str], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=[said("what?", *urls)])
    assert words in caught.value.message
    assert caught.value.param == ("messages" if len(urls) > 1 else "messages[0].content[1].image_url.url")


def test_a_large_body_is_not_read_to_its_end(answerer: Answerer) -> None:
    """The length of such a body is not declared in advance."""
    sent = 0

    async def blocks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 50_000

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(answerer, DEFAULTS, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/v1/chat/completions", content=blocks(), headers=headers)

    assert asyncio.run(ask()).status_code == 413 and sent == 5


def test_the_least_length_gives_way_to_a_shorter_request(answerer: Answerer) -> None:
    with serving(build_app(answerer, Generation(max_new_tokens=12, min_new_tokens=10), LIMITS)) as address:
        for wanted in (None, 3):
            body = {"model": NAME, "messages": HELLO, "max_tokens": wanted}
            reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=PATIENCE).json()
            assert reply["usage"]["completion_tokens"] == (wanted or 12), reply


@pytest.mark.parametrize("key", ["wrong", f"{KEY}x"])
def test_the_key_is_asked_for(post, key: str) -> None:
    reply = post(b"{}", Authorization=f"Bearer {key}")
    assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"


def test_the_system_message_takes_the_place_of_the_templates(answerer: Answerer) -> None:
    asked = Answerer(answerer.model, answerer.processor, TEMPLATES["A"], NAME)
    prompt = asked.prompt([Turn("why?")], "Be brief.")
    assert prompt.text == "Be brief.###Human: why?###Assistant: "
    assert asked.prompt([Turn("why?")]).text.startswith("Give the following image: <Img>ImageContent</Img>.")


class Slow(Decoder):
    """Answers that go on until they are closed."""

    def __init__(self) -> None:
        self.rows, self.begun, self.closed = [], 0, 0

    def add(self, rows: Sequence[Row]) -> None:
        self._remove_closed()
        self.begun += len(rows)
        self.rows += rows
        self._go_on()

    def step(self) -> None:
        self._remove_closed()
        self._go_on()

    def _go_on(self) -> None:
        time.sleep(0.01)
        for row in self.rows:
            row.ids += [7, 8]  # never ends

    def _remove_closed(self) -> None:
        self.closed += sum(row.closed for row in self.rows)
        self.rows = [row for row in self.rows if not row.closed]


class With(Answerer):
    """A model with another decoder."""

    def __init__(self, answerer: Answerer, decoder: Decoder) -> None:
        super().__init__(answerer.model, answerer.processor, answerer.template, NAME)
        self.__dict__["decoder"] = lambda: decoder


def test_who_leaves_ends_his_answer_and_who_is_too_many_is_sent_away(answerer: Answerer) -> None:
    """One is answered, two wait, the fourth is refused; then all leave, streaming or not, and nothing goes on."""
    slow = Slow()
    body = {"model": NAME, "messages": HELLO}

    async def scenario(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:

            async def ask(stream: bool) -> None:
                async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": stream}) as reply:
                    async for _ in reply.aiter_lines():
                        pass

            async def refusal() -> httpx.Response:
                return await client.post("/v1/chat/completions", json=body)

            asking = []
            for stream in (True, False, True):
                asking.append(asyncio.create_task(ask(stream)))
                while (await client.get("/health")).json()["in_hand"] < len(asking):  # so that they come in this order
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(until, lambda: slow.begun == 1)
            refused = await refusal()
            assert refused.status_code == 429 and refused.headers["Retry-After"]
            assert refused.json()["error"]["code"] == "queue_full"
            asking[0].cancel()
            await asyncio.to_thread(until, lambda: (slow.closed, slow.begun) == (1, 2))  # the next one's turn
            asking[1].cancel()
            await asyncio.to_thread(until, lambda: (slow.closed, slow.begun) == (2, 3))
            asking[2].cancel()
            while (await client.get("/health")).json()["in_hand"]:
                await asyncio.sleep(0.01)
            await asyncio.gather(*asking, return_exceptions=True)

    with serving(build_app(With(answerer, slow), DEFAULTS, LIMITS)) as address:
        asyncio.run(scenario(address))


def test_a_failure_is_reported(answerer: Answerer) -> None:
    """Before the first piece the error has a status of its own; after it, it comes within the stream."""

    class Failing(Slow):
        def add(self, rows: Sequence[Row]) -> None:
            if not self.begun:
                self.begun = 1
                raise RuntimeError("out of memory")
            super().add(rows)

        def step(self) -> None:
            raise RuntimeError("out of memory")

    with (
        serving(build_app(With(answerer, Failing()), DEFAULTS, LIMITS)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="the server failed: RuntimeError"):
            client.chat.completions.create(model=NAME, messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="the answer broke off: RuntimeError"):
            streamed(client, messages=HELLO)


def test_who_may_use_the_server(answerer: Answerer) -> None:
    """A page that reaches a local server under a name of its own is refused; one whose origin is allowed is served."""
    access = Access(hosts=frozenset({"localhost", "127.0.0.1"}), origins=("http://localhost:3000",))

    async def scenario() -> None:
        transport = httpx.ASGITransport(build_app(answerer, DEFAULTS, LIMITS, access))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            assert (await client.get("/health")).status_code == 200
            for host in ("evil.example", "localhost.evil.example:8000", ""):
                refused = await client.get("/v1/models", headers={"Host": host})
                assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_not_allowed"
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
            for origin, status in (("http://localhost:3000", 200), ("http://evil.example", 400)):
                reply = await client.options("/v1/chat/completions", headers={"Origin": origin, **asked})
                assert reply.status_code == status
                assert (reply.headers.get("access-control-allow-origin") == origin) == (status == 200)

    asyncio.run(scenario())


def test_names_of_the_server() -> None:
    """On this machine always restricted; beyond it, e.g. in a container, by --allowed-host alone."""
    here = {"localhost", "127.0.0.1", "[::1]"}
    assert allowed_hosts("127.0.0.1", []) == here
    assert allowed_hosts("127.0.0.1", ["Box.example"]) == here | {"box.example"}
    assert allowed_hosts("0.0.0.0", []) == frozenset()
    assert allowed_hosts("0.0.0.0", ["localhost"]) == here | {"0.0.0.0"}


def test_bodies_that_are_held_back_are_bounded_together(answerer: Answerer) -> None:
    """Bodies that have arrived in part fill the memory for all; the next is refused, and served when they have gone."""
    app = build_app(answerer, DEFAULTS, LIMITS)
    headers = {"Content-Type": "application/json"}

    async def scenario() -> None:
        gone = asyncio.Event()

        async def part() -> AsyncIterator[bytes]:
            yield b" " * 190_000
            await gone.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            ask = lambda content: client.post("/v1/chat/completions", content=content, headers=headers)  # noqa: E731
            held = [asyncio.create_task(ask(part())) for _ in range(4)]
            await asyncio.sleep(0)
            while (await ask(b" " * 100_000)).status_code != 429:
                await asyncio.sleep(0)
            gone.set()
            await asyncio.gather(*held)
            assert (await ask(b" " * 100_000)).status_code == 400  # not JSON, but read

    asyncio.run(scenario())
