"""Recorded outputs: the same verdict as with both models open."""

from collections.abc import Iterator

import numpy as np
import onnx.parser
import pytest

from onnxslim_passes.errors import VerificationError
from onnxslim_passes.evaluation import RecordedOutputs, compare_outputs
from onnxslim_passes.evaluation.recorded import ChangedFeedsError
from onnxslim_passes.runtime import Feed, Session, open_session

MODEL = "(float[N, M] x) => (float[N, M] y) { y = %s(x) }"
SEQUENCE = """(float[N, M] x) => (seq(float) s, int64[K] i)
    { s = SplitToSequence(x)  i = Shape(x) }"""
EXTENDED = "(float[N, M] x) => (bfloat16[N, M] b) { b = Cast<to = 16>(x) }"


def session(text: str) -> Session:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g {text}')
    return open_session(model)


def feeds(count: int, columns: int = 3) -> Iterator[Feed]:
    rng = np.random.default_rng(0)
    for rows in range(1, count + 1):
        yield {"x": rng.normal(size=(rows, columns)).astype(np.float32)}


def recorded(text: str, *, columns: int = 3) -> RecordedOutputs:
    with session(text) as reference:
        return RecordedOutputs(reference, feeds(4, columns))


@pytest.mark.parametrize("columns", [3, 1 << 18])  # in memory, and 10 MB in a file
def test_equal_to_both_models_open(columns: int) -> None:
    with session(MODEL % "Sigmoid") as reference, session(MODEL % "HardSigmoid") as candidate:
        expected = compare_outputs(reference, candidate, feeds(4, columns))
        kept = RecordedOutputs(reference, feeds(4, columns))
        assert kept.compare(candidate, feeds(4, columns)) == expected
        assert kept.compare(candidate, feeds(4, columns)) == expected, "read once more"


@pytest.mark.parametrize("text", [SEQUENCE, EXTENDED])
def test_outputs_that_are_no_plain_floats(text: str) -> None:
    with session(text) as candidate:
        found = recorded(text).compare(candidate, feeds(4))
    assert found.max_error == 0
    assert found.agreement in (None, 1.0)


def other(count: int, place: int) -> Iterator[Feed]:
    for index, feed in enumerate(feeds(count)):
        if index == place:
            feed["x"][-1, -1] += 1e-6
        yield feed


@pytest.mark.parametrize(
    ("count", "place"), [(4, 0), (4, 3), (3, -1), (5, -1)], ids=["first", "last", "fewer", "more"]
)
def test_other_feeds_are_told_apart(count: int, place: int) -> None:
    with session(MODEL % "Relu") as candidate, pytest.raises(ChangedFeedsError):
        recorded(MODEL % "Relu").compare(candidate, other(count, place))


def test_strings_are_told_apart() -> None:
    same = "(string[N] x) => (string[N] y) { y = Identity(x) }"
    before, after = ({"x": np.array(["a", last], np.object_)} for last in "bc")
    with session(same) as model:
        kept = RecordedOutputs(model, [before])
        assert kept.compare(model, [before]).agreement == 1.0
        with pytest.raises(ChangedFeedsError):
            kept.compare(model, [after])


def test_numbers_of_outputs_must_match() -> None:
    with session(MODEL % "Relu") as candidate, pytest.raises(VerificationError, match="s, i"):
        recorded(SEQUENCE).compare(candidate, feeds(4))
