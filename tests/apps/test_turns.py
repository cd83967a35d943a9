"""Orders of messages that clients send, brought into the form of the training."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.request_schema import Message, TextLimits, parse_request
from tinygptv_ds.apps.serve.turns import turns_of

ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}


def messages(order: str) -> list[Message]:
    """Messages of the roles whose first letters are given, with the texts s0, u1, ..."""
    return [Message(role=ROLES[role], content=f"{role}{number}") for number, role in enumerate(order)]


def turns(order: str, *, has_system: bool = False) -> tuple[str | None, list[tuple[str, str]]]:
    system, made = turns_of(messages(order), [[]] * len(order), has_system=has_system)
    return system, [(turn.question, turn.answer) for turn in made]


@pytest.mark.parametrize(
    ("order", "right"),
    [
        ("u", [("u0", "")]),
        ("uau", [("u0", "a1"), ("u2", "")]),
        ("su", [("s0\nu1", "")]),
        ("sdu", [("s0\nd1\nu2", "")]),
        ("usu", [("u0\ns1\nu2", "")]),
        ("uasu", [("u0", "a1"), ("s2\nu3", "")]),
        ("us", [("u0\ns1", "")]),
        ("uuaau", [("u0\nu1", "a2\na3"), ("u4", "")]),
        ("au", [("u1", "")]),
        ("sau", [("s0\nu2", "")]),
    ],
)
def test_orders(order: str, right: list[tuple[str, str]]) -> None:
    assert turns(order) == (None, right)


def test_a_system_text_with_a_place_of_its_own() -> None:
    assert turns("sduau", has_system=True) == ("s0\nd1", [("u2", "a3"), ("u4", "")])
    assert turns("usu", has_system=True) == (None, [("u0\ns1\nu2", "")])


def test_images_stay_with_their_question() -> None:
    shown = [["first"], ["second"], [], ["third"]]
    _, made = turns_of(messages("uuau"), shown, has_system=False)
    assert [turn.images for turn in made] == [["first", "second"], ["third"]]


@given(st.text("sdua", max_size=8))
def test_no_text_is_lost(order: str) -> None:
    """All texts are in the turns, in their order, but for a greeting before the first question."""
    _, made = turns(order + "u")
    first = order.find("u") if "u" in order else len(order)
    kept = [f"{role}{n}" for n, role in enumerate(order + "u") if role != "a" or n > first]
    joined = "\n".join(text for turn in made for text in turn if text).split("\n")
    assert sorted(joined) == sorted(kept)
    assert all(turn[1] for turn in made[:-1]) and not made[-1][1]


def test_empty_texts_add_nothing() -> None:
    given_messages = [Message(role="system", content=""), Message(role="user", content=None), *messages("u")]
    _, made = turns_of(given_messages, [[], [], []], has_system=False)
    assert [turn.question for turn in made] == ["u0"]


@pytest.mark.parametrize(("order", "number"), [("uu", 1), ("suu", 2), ("usu", 1), ("au", 0)])
def test_strict(order: str, number: int) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": ROLES[role], "content": "x"} for role in order]})
    limits = TextLimits(100, 1000)
    parse_request(body.encode(), limits)
    with pytest.raises(RequestError, match=f"messages.{number}.: the role must be"):
        parse_request(body.encode(), limits, strict=True)
