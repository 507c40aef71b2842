"""Large values stay in the file they are in, and come out bit for bit."""

import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model import Model, load
from onnxslim_passes.model.payload import CHUNK_BYTES, FilePayload
from onnxslim_passes.model.wire import SMALLEST_BYTES, filled, lift

LARGE = SMALLEST_BYTES // 4 + 1  # float32 elements that stay in the file


def values(size: int = LARGE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def everywhere() -> onnx.ModelProto:
    """Large values in an initializer, a Constant node, both branches of an If and a function."""

    def branch(name: str, seed: int) -> onnx.GraphProto:
        inner = numpy_helper.from_array(values(seed=seed), f"{name}_w")
        node = helper.make_node("Add", ["x", f"{name}_w"], [f"{name}_y"])
        made = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [LARGE])
        return helper.make_graph([node], name, [], [made], [inner])

    constant = numpy_helper.from_array(values(seed=1))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node(
            "If", ["f"], ["b"], then_branch=branch("then", 2), else_branch=branch("else", 3)
        ),
        helper.make_node("Own", ["b"], ["o"], domain="own"),
        helper.make_node("Sum", ["c", "o", "w", "s"], ["y"]),
    ]
    function = helper.make_function(
        "own",
        "Own",
        ["p"],
        ["q"],
        [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(values(seed=4))),
            helper.make_node("Mul", ["p", "k"], ["q"]),
        ],
        [helper.make_opsetid("", 18)],
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [LARGE]),
            helper.make_tensor_value_info("f", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [LARGE])],
        [numpy_helper.from_array(values(), "w"), numpy_helper.from_array(values(1), "s")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return path


def in_bytes(model: Model) -> bytes:
    message: bytes = model.to_proto().SerializeToString(deterministic=True)
    return message


def test_large_values_stay_wherever_they_stand(tmp_path: Path) -> None:
    path = saved(everywhere(), tmp_path)
    model = load(path)
    behind = [c.name for c in model.constants() if isinstance(c.payload, FilePayload)]
    assert sorted(behind) == ["c", "else_w", "k", "then_w", "w"]
    whole = load(path.read_bytes())
    assert in_bytes(model) == in_bytes(whole)
    assert model.nbytes() == pytest.approx(whole.nbytes(), abs=len(behind))
    for mine, theirs in zip(model.constants(), whole.constants(), strict=True):
        assert np.array_equal(mine.values, theirs.values)


@pytest.mark.parametrize("external", [False, True])
def test_saving_over_the_file_itself(tmp_path: Path, external: bool) -> None:
    path = saved(everywhere(), tmp_path)
    model = load(path)
    before = in_bytes(model)
    model.save(path, external=external)
    assert in_bytes(model) == before
    assert in_bytes(load(path)) == before


def test_a_file_that_is_removed_can_still_be_read(tmp_path: Path) -> None:
    path = saved(everywhere(), tmp_path)
    model, before = load(path), in_bytes(load(path.read_bytes()))
    path.unlink()
    assert in_bytes(model) == before


def test_a_file_that_is_written_into_is_an_error(tmp_path: Path) -> None:
    path = saved(everywhere(), tmp_path)
    model = load(path)
    with path.open("r+b") as stream:
        stream.truncate(SMALLEST_BYTES)
    with pytest.raises(InvalidModelError, match="written into while it was in use"):
        model.to_proto()


def test_dimensions_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    proto = everywhere()
    proto.graph.initializer[0].dims[0] = LARGE + 1
    model = load(saved(proto, tmp_path))
    with pytest.raises(InvalidModelError, match="holds fewer or other values"):
        next(c for c in model.constants() if c.name == "w").values  # noqa: B018  # reads them


def test_a_forged_mark_is_an_error(tmp_path: Path) -> None:
    proto = everywhere()
    forged = proto.graph.initializer[1]
    forged.ClearField("raw_data")
    forged.data_location = TensorProto.EXTERNAL
    forged.external_data.add(key="onnxslim_passes:raw_data", value="99")
    with pytest.raises(InvalidModelError, match="external data of no file"):
        load(saved(proto, tmp_path))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 100_000), flipped=st.integers(0, 100_000), bit=st.integers(0, 7))
def test_damaged_files_are_read_as_by_protobuf(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flipped: int, bit: int
) -> None:
    """What is lifted out of a damaged file is what parsing all of it gives, or nothing is."""
    data = bytearray(everywhere().SerializeToString())
    data[flipped % len(data)] ^= 1 << bit
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(data[: len(data) - cut % len(data)])
    outcomes = []
    for source in (path, path.read_bytes()):
        try:
            outcomes.append(in_bytes(load(source)))
        except Exception as error:  # any kind, as long as both are of one
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_nothing_is_lifted_from_small_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08")
    assert lift(path) is None


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    path = saved(everywhere(), tmp_path)
    before = len(list(folder.iterdir()))
    for _ in range(5):
        load(path).copy()
    gc.collect()
    assert len(list(folder.iterdir())) <= before + 1


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "int4", "uint2", "int64", "bool", "object"]
)
@pytest.mark.parametrize("size", [10, 20_000, (1 << 20) + 3])
def test_streamed_files_are_those_of_one_message(
    dtype: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    values = np.arange(size) % 2
    array = values.astype(str).astype(object) if dtype == "object" else values.astype(kind)
    onnx.save(everywhere(), tmp_path / "source.onnx")
    model = load(tmp_path / "source.onnx")
    for index, constant in enumerate(model.constants()):
        if index % 2:  # the others stay in the file
            constant.values = array
    expected = model.to_proto().SerializeToString(deterministic=True)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("one message held all values")

    monkeypatch.setattr(Model, "to_proto", refuse)
    model.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == expected
    load(tmp_path / "m.onnx").save(tmp_path / "again.onnx")  # from file to file
    assert (tmp_path / "again.onnx").read_bytes() == expected


def test_marks_where_no_value_can_be_put() -> None:
    message = onnx.ModelProto(producer_name="here MARK1234").SerializeToString()
    assert filled(message, b"MARK", [5]) is None
    assert filled(message, b"none", []) == [message]


@pytest.mark.parametrize("external", [False, True])
def test_values_in_a_file_are_read_piece_by_piece(external: bool, tmp_path: Path) -> None:
    expected = values(CHUNK_BYTES // 2)
    onnx.save(everywhere(), tmp_path / "source.onnx")
    model = load(tmp_path / "source.onnx")
    for constant in model.constants():
        constant.values = expected
    model.save(tmp_path / "m.onnx", external=external)
    for constant in load(tmp_path / "m.onnx").constants():
        pieces = list(constant.flat_pieces())
        assert [piece.nbytes for piece in pieces] == [CHUNK_BYTES] * 2
        assert np.array_equal(np.concatenate(pieces), expected)
