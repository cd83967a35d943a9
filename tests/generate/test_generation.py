"""Answers do not depend on their batch; beams, draws, penalties and streams give what they promise."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny

from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.generate.conversation import Conversation, Prompt
from tinygptv_ds.generate.generate import answers, stream
from tinygptv_ds.generate.inputs import prompt_tokens
from tinygptv_ds.generate.load import LoadedModel
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.sampling import next_tokens, row_seeds
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.generate.stopping import cut
from tinygptv_ds.processing.templates import training_template
from tinygptv_ds.processing.text import IMAGE_TAG

SHORT = Generation(max_new_tokens=8)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Unequal lengths; no image, one, two, one."""
    first, second, third, _ = tiny.encoded_images(4)
    template = training_template("[INST] {} [/INST]", "###")
    asked = [("the bus", []), ("what colour is it ?", [first]), ("left or " * 9, [second, third]), ("a", [third])]
    return [Conversation(template).ask(question, images) for question, images in asked]


@pytest.mark.parametrize(
    "settings",
    [
        SHORT,
        replace(SHORT, num_beams=3, length_penalty=0.5),
        replace(SHORT, temperature=1.0, top_p=0.95, top_k=50, seed=5),
        replace(SHORT, repetition_penalty=3.0, min_new_tokens=4),
        replace(SHORT, stop=("e", "\n")),
    ],
    ids=["greedy", "beams", "draws", "penalty", "stops"],
)
def test_the_batch_does_not_matter(loaded: LoadedModel, prompts: list[Prompt], settings: Generation) -> None:
    """Alone, in pairs, all at once, and as a stream."""
    all_at_once = list(answers(*loaded, prompts, settings))
    for size in (1, 3):
        assert list(answers(*loaded, prompts, settings, batch_size=size)) == all_at_once
    assert len(set(all_at_once)) > 1
    streamed = ["".join(stream(*loaded, prompt, settings)) for prompt in prompts]
    if not settings.samples:  # a stream's draws are those of question number 0
        assert streamed == all_at_once
    else:
        assert streamed[0] == all_at_once[0]


def test_beams_are_those_of_transformers(loaded: LoadedModel, prompts: list[Prompt]) -> None:
    """Through `generate` with pixels as well as through embeddings, with two images in one row."""
    model, processor = loaded
    inputs = processor([prompt.images for prompt in prompts], [prompt.text for prompt in prompts], add_bos_token=True)
    ids = model.generate(**inputs, max_new_tokens=8, num_beams=4, do_sample=False)
    theirs = processor.answers(ids[:, inputs["input_ids"].shape[1] :])
    ours = list(answers(model, processor, prompts, replace(SHORT, num_beams=4)))
    assert ours == theirs
    assert ours != list(answers(model, processor, prompts, SHORT))


def test_draws(loaded: LoadedModel, prompts: list[Prompt]) -> None:
    """A seed repeats them, by the number of the question; another seed or none does not."""
    warm = replace(SHORT, temperature=1.5, top_p=1.0, seed=1)
    first = list(answers(*loaded, prompts, warm))
    assert list(answers(*loaded, prompts, warm)) == first
    assert list(answers(*loaded, prompts[2:], warm, numbers=[2, 3])) == first[2:]
    assert list(answers(*loaded, prompts, replace(warm, seed=2))) != first
    unseeded = replace(warm, seed=None)
    assert list(answers(*loaded, prompts, unseeded)) != list(answers(*loaded, prompts, unseeded))
    greedy = list(answers(*loaded, prompts, SHORT))
    for cold in (1e-300, 1e-45, 1e-36, 1e-9, 1e-6):  # of the likeliest token, and no overflow
        assert list(answers(*loaded, prompts, replace(warm, temperature=cold))) == greedy
    state = torch.get_rng_state()
    beams = replace(warm, num_beams=2)
    assert list(answers(*loaded, prompts, beams)) == list(answers(*loaded, prompts, beams))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_softmax(loaded: LoadedModel) -> None:
    """4000 draws: frequencies within 4 standard deviations of the probabilities, none of what top-k leaves out."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(4000, 1)
    settings = Generation(temperature=0.5, top_p=1.0, top_k=3)
    rows = [Row(loaded[1], Prompt(("a",)), [0], settings, seed) for seed in row_seeds(0, range(4000))]
    expected = torch.tensor([4.0, 2.0, 0.0, -torch.inf]).softmax(0)
    share = torch.tensor(next_tokens(logits, rows)).bincount(minlength=4) / 4000
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_the_penalty_counts_what_is_new(loaded: LoadedModel) -> None:
    """Words and images of the question are not penalised, as in the original: the first token is the greedy one."""
    model, processor = loaded
    (image,) = tiny.encoded_images(1)
    words = f"{IMAGE_TAG} " + "".join(processor.tokenizer.convert_ids_to_tokens(range(32, 127)))
    prompt = Prompt((words,), (image,))
    one = Generation(max_new_tokens=1)
    plain, punished = (
        list(answers(model, processor, [prompt], g)) for g in (one, replace(one, repetition_penalty=10.0))
    )
    assert plain == punished
    longer = replace(one, max_new_tokens=12)
    repeats, new = (
        next(iter(answers(model, processor, [prompt], g))) for g in (longer, replace(longer, repetition_penalty=10.0))
    )
    assert len(set(new)) > len(set(repeats))


def test_a_stream_ends_where_asked(loaded: LoadedModel, prompts: list[Prompt]) -> None:
    whole = stream(*loaded, prompts[1], SHORT)
    assert "".join(whole) and (whole.finish, whole.new_tokens) == ("length", 8)
    assert whole.prompt_tokens == len(prompt_tokens(*loaded, prompts[1], 8))
    left = stream(*loaded, prompts[1], Generation(max_new_tokens=180))
    for _piece in left:
        break
    assert left.finish == "closed" and left.new_tokens < 100
    text = next(iter(answers(*loaded, prompts[1:2], SHORT)))
    stopped = stream(*loaded, prompts[1], replace(SHORT, stop=(text[2:4],)))
    assert "".join(stopped) == cut(text, (text[2:4],)) != text
    assert stopped.finish == "stop" and stopped.new_tokens < 8


def test_an_error_in_a_stream_comes_out_of_it(
    loaded: LoadedModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = stream(*loaded, prompts[0], SHORT)
    monkeypatch.setattr(loaded[0].language_model.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(broken)


def test_a_prompt_that_is_too_long_is_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded[0].config.text_config, "max_position_embeddings", 40)
    with pytest.raises(DataError, match=r"prompt of 35 tokens \(3 of them for 1 image\(s\)\) .* up to 8 exceed .* 40"):
        list(answers(*loaded, [Prompt(("é" * 16 + "<ImageHere>",), tuple(tiny.encoded_images(1)))], SHORT))
    assert len(list(answers(*loaded, [Prompt(("é" * 16,))], SHORT))) == 1
    with pytest.raises(DataError, match="empty"):
        list(answers(*loaded, [Prompt(("",))], SHORT))
    with pytest.raises(DataError, match="1 times"):
        stream(*loaded, Prompt(("<ImageHere>",)), SHORT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("min_new_tokens", 301), ("temperature", -0.1), ("temperature", float("nan")),
        ("top_p", 0.0), ("top_k", -1), ("num_beams", 0), ("repetition_penalty", 0.0), ("length_penalty", 11.0),
        ("seed", -1), ("stop", ("",)),
    ],
)  # fmt: skip
def test_settings_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Generation(**{field: value})
