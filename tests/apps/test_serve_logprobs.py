"""Log-probabilities in the server's answers: the model's own, in OpenAI's form, whatever is answered with them."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch
from helpers import tiny
from test_serve import DEFAULTS, HELLO, LIMITS, NAME, answerer, data_url, said, serving

from tinygptv_ds.apps.serve.routes import build_app
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.conversation import Turn
from tinygptv_ds.generate.decoding import Decoder
from tinygptv_ds.generate.logprobs import AnswerLogprobs, TokenBytes, TokenLogprob
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.detokenize import clean_up

__all__ = ["answerer"]
DRAWN = {"temperature": 1.4, "seed": 5, "max_tokens": 30, "extra_body": {"repetition_penalty": 1.5}}


@pytest.fixture(scope="module")
def client(answerer: Answerer) -> Iterator[openai.OpenAI]:
    app = build_app(answerer, DEFAULTS, replace(LIMITS, batch=4, waiting=20))
    with serving(app) as there, openai.OpenAI(base_url=f"{there}/v1", api_key="x", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, messages: list[dict], **settings: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=messages, logprobs=True, **settings).choices[0]


def finished(answerer: Answerer, turn: Turn, generation: Generation) -> Row:
    row = answerer.row(answerer.prompt([turn]), generation)
    decoder = Decoder(answerer.model, answerer.processor)
    decoder.add([row])
    while decoder.running():
        decoder.step()
    return row


def test_they_are_those_of_a_forward_pass(client: openai.OpenAI, answerer: Answerer) -> None:
    """Without cache, over prompt and answer at once; before the temperature and the penalty with which it is drawn."""
    (image,) = tiny.encoded_images(1)
    choice = ask(client, [said("what is it ?", data_url(image))], top_logprobs=20, **DRAWN)
    settings = Generation(max_new_tokens=30, temperature=1.4, top_p=0.9, seed=5, repetition_penalty=1.5)
    row = finished(answerer, Turn("what is it ?", [image]), settings)
    pixels = answerer.processor.pixels([image])
    with torch.no_grad():
        logits = answerer.model(torch.tensor([row.prompt_ids + row.ids]), pixel_values=pixels).logits[0]
    expected = logits[len(row.prompt_ids) - 1 : -1].double().log_softmax(-1)
    bytes_of = TokenBytes(answerer.processor.tokenizer)
    assert len(choice.logprobs.content) == len(row.ids) == 30
    for entry, token, scores in zip(choice.logprobs.content, row.ids, expected, strict=True):
        assert bytes(entry.bytes) == bytes_of(token)
        assert entry.logprob == pytest.approx(scores[token].item(), abs=1e-4)
        found = scores.topk(20)
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx(found.values.tolist(), abs=1e-4)
        assert [each.bytes and bytes(each.bytes) for each in entry.top_logprobs] == list(
            map(bytes_of, found.indices.tolist())
        )
    assert any(entry.logprob < entry.top_logprobs[0].logprob for entry in choice.logprobs.content)


def test_tokens_spell_the_answer(client: openai.OpenAI) -> None:
    """Parts of characters have their bytes and a name that can be read; a stop and the end have none."""
    plain = ask(client, HELLO, **DRAWN)
    entries = [(entry.token, bytes(entry.bytes)) for entry in plain.logprobs.content]
    whole = b"".join(spelled for _, spelled in entries)
    assert clean_up(whole.decode(errors="replace")).strip() == plain.message.content
    parts = [(token, spelled) for token, spelled in entries if token.encode() != spelled]
    assert parts and all(
        bytes.fromhex(token.replace("\\x", "").removeprefix("bytes:")) == spelled for token, spelled in parts
    )
    stop = next(token for token, spelled in entries[10:] if token.isalnum() and token.isascii())
    stopped = ask(client, HELLO, stop=stop, **DRAWN)
    content = stopped.logprobs.content
    assert content == plain.logprobs.content[: len(content)] and stopped.finish_reason == "stop"
    starts = [sum(len(spelled) for _, spelled in entries[:number]) for number in range(len(entries))]
    assert len(content) == sum(start < whole.index(stop.encode()) for start in starts) < len(entries)


def test_streams_have_the_same(client: openai.OpenAI) -> None:
    settings = DRAWN | {"top_logprobs": 2, "stop": ["e", "zzz"], "max_tokens": 40}
    whole = ask(client, HELLO, **settings)
    pieces = client.chat.completions.create(model=NAME, messages=HELLO, logprobs=True, stream=True, **settings)
    choices = [chunk.choices[0] for chunk in pieces]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.message.content
    found = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.model_dump() for entry in found] == [entry.model_dump() for entry in whole.logprobs.content]
    assert choices[-1].logprobs is None and len(choices) > 3


def test_they_do_not_depend_on_the_batch(client: openai.OpenAI) -> None:
    """Together with answers that ask for more, fewer and none; these and their texts are as they are alone."""
    kinds: list[dict[str, Any]] = [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}]
    kinds.append(kinds[1] | {"top_logprobs": 20, **DRAWN})
    bodies = [{"model": NAME, "messages": [said("what " * n)], "max_tokens": 9, **kinds[n % 4]} for n in range(1, 9)]
    create = client.chat.completions.create
    alone = [create(**body).choices[0] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = [reply.choices[0] for reply in pool.map(lambda body: create(**body), bodies)]
    for one, other, body in zip(alone, together, bodies, strict=True):
        assert one.message == other.message
        assert (one.logprobs is None) == (other.logprobs is None) == ("logprobs" not in body)
        for mine, others in zip(
            *((each.logprobs.content if each.logprobs else []) for each in (one, other)), strict=True
        ):
            assert mine.bytes == others.bytes and mine.logprob == pytest.approx(others.logprob, abs=1e-5)
            assert len(mine.top_logprobs) == len(others.top_logprobs) == body.get("top_logprobs", 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20, not 21"),
        ({"logprobs": 5}, "valid boolean"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(model=NAME, messages=HELLO, **wrong)
    assert caught.value.param in wrong


def test_beam_search_has_none(answerer: Answerer) -> None:
    app = build_app(answerer, Generation(max_new_tokens=3, num_beams=2), LIMITS)
    with serving(app) as there, openai.OpenAI(base_url=f"{there}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="num-beams"):
            ask(client, HELLO)
        assert client.chat.completions.create(model=NAME, messages=HELLO, logprobs=False).choices


def test_what_is_no_token_and_what_ends(answerer: Answerer) -> None:
    """Entries of the vocabulary beyond the tokenizer have no bytes; the end token and a split stop are left out."""
    tokenizer = answerer.processor.tokenizer
    assert TokenBytes(tokenizer)(len(tokenizer)) is None
    assert TokenBytes(tokenizer)(tokenizer.eos_token_id) == tokenizer.eos_token.encode()
    kept = AnswerLogprobs(tokenizer, ["ab"])
    ids = [tokenizer.convert_tokens_to_ids(each) for each in ("x", "a", "c", "a")]
    sent = []
    for token in ids:
        kept.take(TokenLogprob(token, -math.log(2), ()))
        sent.append([each.id for each in kept.settled(complete=False)])
    assert sent == [ids[:1], [], ids[1:3], []]  # an "a" may begin the stop
    kept.take(TokenLogprob(tokenizer.eos_token_id, -0.1, ()))
    assert [each.id for each in kept.settled(complete=True)] == ids[3:]
