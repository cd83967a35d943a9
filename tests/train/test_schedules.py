"""The schedules other than the published one, their cycles, and the learning rates of parts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.config.recipe import ModelSection, Recipe
from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.train.schedule import begins_cycle, learning_rate, learning_rate_of_step


def rates(total: int, **options: object) -> list[float]:
    optimizer = OptimizerSection(**{"lr": 1.0, "min_lr": 0.1, "warmup_lr": 0.0, "warmup_steps": 4, **options})
    return [learning_rate(step, optimizer, steps_per_epoch=5, total_steps=total) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_warm_up_counts_once(schedule: str) -> None:
    """The warm-up continues over the end of an epoch of five steps, where the published schedule restarts."""
    assert rates(20, schedule=schedule, warmup_steps=8)[:9] == [step / 8 for step in range(9)]
    assert rates(20, schedule="published", warmup_steps=8)[5] == 0.0


def test_the_cosine_starts_at_the_end_of_the_warm_up() -> None:
    curve = rates(20, schedule="cosine")
    assert curve[4] == 1.0 and curve[20] == pytest.approx(0.1) and curve[12] == pytest.approx(0.55)
    assert curve[8] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates(20, schedule="published")[4] < 1.0  # its cosine has been falling since step 0


def test_constant() -> None:
    assert set(rates(20, schedule="constant")[4:]) == {1.0}


def test_wsd() -> None:
    """The phases are warm-up, stable, and a linear decay that ends with the last step."""
    curve = rates(20, schedule="wsd", decay_steps=5)
    assert curve[4:16] == [1.0] * 12
    assert curve[15:] == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28, 0.1])


def test_step_decay() -> None:
    """As in LAVIS: a warm-up within the first epoch, then `lr` times the rate at every epoch, down to `min_lr`."""
    curve = rates(22, schedule="step", decay_rate=0.5, warmup_steps=4)
    assert curve[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve[5:] == [0.5] * 5 + [0.25] * 5 + [0.125] * 5 + [0.1] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, r"schedule step needs an optimizer\.decay_rate between 0 and 1"),
        ({"schedule": "step", "decay_rate": 1.5}, r"schedule step needs an optimizer\.decay_rate between 0 and 1"),
        ({"decay_rate": 0.5}, r"optimizer\.decay_rate is of the schedule step"),
        ({"schedule": "step", "decay_rate": 0.5, "warmup_steps": 6}, r"within its first epoch of 5 steps"),
    ],
)
def test_mistakes_of_step_decay(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(1, **options)


@given(
    schedule=st.sampled_from(["cosine", "constant", "wsd"]),
    lr=st.floats(1e-6, 1e-2),
    low=st.floats(0, 1e-2),
    start=st.floats(0, 1e-2),
    warmup=st.integers(0, 10),
    decay=st.integers(1, 10),
    stable=st.integers(0, 10),
)
def test_no_rate_is_out_of_bounds(
    schedule: str, lr: float, low: float, start: float, warmup: int, decay: int, stable: int
) -> None:
    curve = rates(
        warmup + stable + decay,
        schedule=schedule,
        lr=lr,
        min_lr=low,
        warmup_lr=start,
        warmup_steps=warmup,
        decay_steps=decay if schedule == "wsd" else 0,
    )
    least, most = min(lr, low, start), max(lr, low, start)
    assert all(least * (1 - 1e-9) - 1e-18 <= rate <= most * (1 + 1e-9) for rate in curve)
    assert curve[warmup] == pytest.approx(lr)


def recipe(cycles: int, **optimizer: object) -> Recipe:
    return Recipe(
        stage=1,
        model=ModelSection("p", "e", "q"),
        data=DataSection([DatasetSection("a", "a")]),
        optimizer=OptimizerSection(**{"lr": 1e-4, "min_lr": 8e-5, "warmup_steps": 3, **optimizer}),
        train=TrainSection(batch_size=2, micro_batch_size=2, epochs=2, steps_per_epoch=5, cycles=cycles),
    )


def test_cycles_repeat_the_schedule() -> None:
    """The published stage 1 has 17 runs in a row, each with its own warm-up."""
    once, often = recipe(1), recipe(17)
    assert often.train.total_steps == 17 * once.train.total_steps
    of_one = [learning_rate_of_step(step, once) for step in range(10)]
    assert [learning_rate_of_step(step, often) for step in range(170)] == of_one * 17
    assert [step for step in range(30) if begins_cycle(step, often)] == [10, 20]
    assert not any(begins_cycle(step, once) for step in range(10))


def test_a_schedule_must_fit_into_a_cycle() -> None:
    assert recipe(2, schedule="wsd", decay_steps=7).train.steps_per_cycle == 10
    with pytest.raises(ConfigError, match=r"warmup_steps \(3\) and decay_steps \(8\) do not fit into the 10 steps"):
        recipe(2, schedule="wsd", decay_steps=8)
