"""How a step's samples divide into micro-batches."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.errors import ConfigError


def test_accumulation() -> None:
    assert TrainSection(batch_size=64, micro_batch_size=4).accumulation(8) == 2
    assert TrainSection(batch_size=6, micro_batch_size=6).accumulation(1) == 1


@given(batch=st.integers(1, 60), micro=st.integers(1, 12), world=st.integers(1, 9))
def test_it_divides_or_the_advice_helps(batch: int, micro: int, world: int) -> None:
    """Every micro-batch size that the message suggests works, and none is missing from it."""
    train = TrainSection(batch_size=batch, micro_batch_size=micro)
    works = [m for m in range(1, batch + 1) if batch % (m * world) == 0]
    try:
        accumulation = train.accumulation(world)
    except ConfigError as error:
        assert micro not in works
        advised = re.search(r"train.micro_batch_size in \[(.*)\]", str(error))
        assert [int(m) for m in advised[1].split(", ")] == works if works else f"divisible by {world}" in str(error)
    else:
        assert accumulation * micro * world == batch


def test_the_message_names_all_three_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"batch_size 10 .* micro-batches of 4 on 2 rank.*micro_batch_size in \[1, 5\]"
    ):
        TrainSection(batch_size=10, micro_batch_size=4).accumulation(2)
