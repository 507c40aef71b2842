"""Laws of the learning rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.training.options import Course
from onnxslim_passes.training.schedules import learning_rate

common = {"learning_rate": st.floats(1e-6, 1), "warmup": st.floats(0, 0.9)}
courses = st.one_of(
    st.builds(Course, schedule=st.sampled_from(["constant", "cosine"]), **common),
    st.builds(
        Course,
        schedule=st.just("step"),
        decay_epochs=st.integers(1, 4),
        decay_factor=st.floats(0.1, 1),
        **common,
    ),
)


@given(courses, st.integers(1, 30), st.integers(1, 6))
def test_it_rises_then_falls_within_bounds(course, epochs, per_epoch):
    steps = epochs * per_epoch
    rates = [learning_rate(course, step, steps, per_epoch) for step in range(steps)]
    assert all(0 < rate <= course.learning_rate for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_known_points():
    cosine = Course(learning_rate=0.2, schedule="cosine")
    assert learning_rate(cosine, 0, 10, 5) == 0.2
    assert learning_rate(cosine, 5, 10, 5) == pytest.approx(0.1)
    step = Course(learning_rate=0.2, schedule="step", decay_epochs=2, decay_factor=0.5)
    assert [learning_rate(step, s, 12, 2) for s in (0, 3, 4, 8)] == [0.2, 0.2, 0.1, 0.05]
    warm = Course(learning_rate=0.2, schedule="constant", warmup=0.3)
    assert [learning_rate(warm, s, 10, 5) for s in range(4)] == pytest.approx(
        [0.05, 0.1, 0.15, 0.2]
    )
