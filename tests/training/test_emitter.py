"""Emitters know types and shapes of all tensors, and make no constant twice."""

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxslim_passes import runtime
from onnxslim_passes.errors import UnsupportedModelError, UsageError
from onnxslim_passes.model import Model
from onnxslim_passes.training import Emitter
from onnxslim_passes.training.noise import uniform


def model_of(text: str, *, opset: int = 18) -> Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    return Model.from_proto(parser.parse_model(header + text))


def emitter_of(text: str) -> Emitter:
    return Emitter(model_of(text))


def tensor(emit: Emitter, name: str):
    made = [t for node in emit.graph.nodes for t in node.outputs]
    return next(t for t in (*emit.graph.inputs, *emit.graph.initializers, *made) if t.name == name)


def test_static_and_free_sizes_are_told_apart() -> None:
    emit = emitter_of(
        """g (float[N, 3, H, 8] x) => (float[N, M] y) {
            flat = Flatten<axis = 1>(x)
            rows = Shape<start = 0, end = 1>(x)
            rest = Constant<value_ints = [-1]>()
            sizes = Concat<axis = 0>(rows, rest)
            y = Reshape(flat, sizes)
            z = Transpose<perm = [1, 3, 2, 0]>(x)
        }"""
    )
    assert emit.shape(tensor(emit, "x")) == ("N", 3, "H", 8)
    assert emit.shape(tensor(emit, "z")) == (3, 8, "H", "N")
    flat, y = (emit.shape(tensor(emit, name)) for name in ("flat", "y"))
    assert flat == y
    assert flat[0] == "N"
    assert isinstance(flat[1], str)


def test_arithmetic_on_shapes_is_followed() -> None:
    emit = emitter_of(
        """g (float[N, 6] x) => (float[N, K, 2] y) <int64 two = {2}, int64[1] zero = {0}> {
            all = Shape(x)
            one = Constant<value_int = 1>()
            columns = Gather(all, one)
            half = Div(columns, two)
            row = Unsqueeze(half, zero)
            pair = Unsqueeze(two, zero)
            batch = Constant<value_ints = [-1]>()
            sizes = Concat<axis = 0>(batch, row, pair)
            y = Reshape(x, sizes)
        }"""
    )
    assert emit.shape(tensor(emit, "y")) == ("N", 3, 2)
    assert emit.value(tensor(emit, "half")) == 3
    assert emit.value(tensor(emit, "all")) is None  # its first element is free


def test_unnamed_batches_that_must_agree_are_one() -> None:
    emit = emitter_of("g (float[?, 3] a, float[?, 3] b) => (float[?, 3] y) { y = Add(a, b) }")
    rows = {emit.shape(tensor(emit, name))[0] for name in ("a", "b", "y")}
    assert len(rows) == 1


def test_lengths_stay_within_a_table_of_positions() -> None:
    """A size far beyond the table would be cut to the table's, whatever it was."""
    emit = emitter_of(
        """g (float[N, T, 4] x, float[1, 512, 4] table) => (float[N, T, 4] y)
        <int64[1] zero = {0}, int64[1] axis = {1}> {
            length = Shape<start = 1, end = 2>(x)
            positions = Slice(table, zero, length, axis)
            y = Add(x, positions)
        }"""
    )
    assert emit.shape(tensor(emit, "positions")) == (1, "T", 4)


def test_sizes_that_must_be_multiples() -> None:
    emit = emitter_of(
        """g (float[1, 2, H, W] x) => (float[1, 4, H, W] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}> {
            small = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
            large = Resize(small, , s)
            y = Concat<axis = 1>(x, large)
        }"""
    )
    assert emit.shape(tensor(emit, "y")) == (1, 4, "H", "W")


def test_equal_small_constants_are_one() -> None:
    emit = emitter_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    y = tensor(emit, "y")
    assert emit.scalar(1, y) is emit.scalar(1.0, y)
    assert emit.scalar(0.0, y) is not emit.scalar(-0.0, y)
    assert emit.ints(1) is not emit.constant(np.array([1], np.int32))


def test_names_that_exist_are_refused() -> None:
    emit = emitter_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(UsageError, match="has a tensor 'x' already"):
        emit.input("x", np.float32, (2,))
    with pytest.raises(UsageError, match="has a tensor 'y' already"):
        emit.output(tensor(emit, "x"), "y")


def test_old_opsets_are_refused() -> None:
    old = model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=13)
    with pytest.raises(UnsupportedModelError, match="need opset 18 or newer, this model has 13"):
        Emitter(old)


def test_a_broadcast_that_depends_on_a_free_size_is_refused() -> None:
    emit = emitter_of("g (float[N, 3] x, float[M, 3] w) => (float[N, 3] y) { y = Relu(x) }")
    with pytest.raises(UnsupportedModelError, match="whether its axis 0 is repeated is not known"):
        emit.sum_to(tensor(emit, "x"), tensor(emit, "w"))


@pytest.mark.parametrize("length", [20, 100])
def test_tables_of_limited_length_are_met(length: int) -> None:
    emit = emitter_of(
        f"""g (int64[N, T] x) => (float[N, T, 2] y)
        <float[1, {length}, 2] table = {{{", ".join(["0"] * 2 * length)}}}> {{
            start = Constant<value_ints = [0]>()
            axis = Constant<value_ints = [1]>()
            length = Shape<start = 1>(x)
            rows = Slice(table, start, length, axis)
            whole = Cast<to = 1>(x)
            two = Constant<value_ints = [2]>()
            last = Unsqueeze(whole, two)
            y = Add(rows, last)
        }}"""
    )
    assert emit.shape(tensor(emit, "rows")) == (1, "T", 2)
    assert emit.shape(tensor(emit, "y")) == ("N", "T", 2)


def test_single_elements_have_the_axes_of_what_ends_in_size_one() -> None:
    emit = emitter_of("g (float[4, 3, 1, 1] x, float s) => (float[4, 3, 1, 1] y) { y = Relu(x) }")
    x, s = tensor(emit, "x"), tensor(emit, "s")
    for made in (emit.mul(x, s), emit.scale(x, 0.5), emit.sub(s, x)):
        assert {emit.rank(given) for given in made.inputs[0].inputs} == {4}
        assert emit.shape(made) == (4, 3, 1, 1)


def test_outputs_of_our_own_need_no_copy() -> None:
    emit = emitter_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    twice = emit.add(tensor(emit, "x"), tensor(emit, "x"))
    assert emit.output(twice, "twice") is twice
    again = emit.output(twice, "again")
    assert again is not twice
    assert [t.name for t in emit.graph.outputs] == ["y", "twice", "again"]


def test_promoted_weights_keep_name_and_place() -> None:
    emit = emitter_of("g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Mul(x, w) }")
    made = emit.promote(emit.graph.initializers[0])
    assert made.name == "w"
    assert emit.graph.nodes[0].inputs[1] is made
    with runtime.open_session(emit.model) as session:
        feed = {"x": np.float32([3, 4]), "w": np.float32([5, 6])}
        assert session.run(feed)["y"].tolist() == [15, 24]


class TestUniform:
    @staticmethod
    def draw(seed: int, places: int = 1, shape: tuple[int, ...] = (50, 80)) -> list[np.ndarray]:
        emit = emitter_of("g (float[A, B] x) => (float[A, B] z) { z = Relu(x) }")
        source = emit.input("seed", np.int64, ())
        for place in range(places):
            emit.output(uniform(emit, tensor(emit, "x"), source, place), f"u{place}")
        with runtime.open_session(emit.model) as session:
            found = session.run({"x": np.zeros(shape, np.float32), "seed": np.array(seed)})
        return [found[f"u{place}"] for place in range(places)]

    def test_numbers_are_uniform(self) -> None:
        (numbers,) = self.draw(7)
        assert numbers.shape == (50, 80)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts, _ = np.histogram(numbers, 20, (0, 1))
        # 200 expected a bin; five standard deviations of a binomial count.
        assert np.abs(counts - 200).max() < 5 * np.sqrt(200)

    def test_places_and_seeds_are_independent(self) -> None:
        first, second = self.draw(1, places=2)
        (other,) = self.draw(2)
        again = self.draw(1)[0]
        assert np.array_equal(first, again)
        for one, two in ((first, second), (first, other), (first[1:], first[:-1])):
            # The standard deviation of a correlation of 4,000 pairs is 0.016.
            assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.08

    def test_the_largest_seeds_work(self) -> None:
        (numbers,) = self.draw(2**31)
        assert 0.45 < numbers.mean() < 0.55


def test_what_is_emitted_is_valid() -> None:
    emit = emitter_of("g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
    x = tensor(emit, "x")
    with emit.scope("loss"):
        mean = emit.reduce_mean(emit.square(x))
    emit.output(mean, "loss")
    proto = emit.model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [node.name for node in proto.graph.node][1].startswith("loss/mul")
