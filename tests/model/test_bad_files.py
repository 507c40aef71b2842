"""What is no ONNX model, or only half of one, is refused with its name and the reason."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.errors import InvalidModelError, ModelError
from onnxslim_passes.model import Model, load
from tests.roundtrip.zoo import ZOO


def small_model() -> onnx.ModelProto:
    """Two weights, a body, a function, metadata: a bit of everything."""
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "W")
    shape = [2, 2]
    x, y, t, e = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xyte")
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    then_body = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["t"])], "then", [], [t])
    else_body = helper.make_graph(
        [helper.make_node("f", ["x"], ["e"], domain="l")], "else", [], [e]
    )
    branch = helper.make_node("If", ["c"], ["y"], then_branch=then_body, else_branch=else_body)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("l", 1)]
    relu = helper.make_node("Relu", ["a"], ["b"])
    function = helper.make_function("l", "f", ["a"], ["b"], [relu], imports[:1])
    graph = helper.make_graph([branch], "g", [x, condition], [y], [weight])
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    helper.set_model_props(model, {"author": "someone"})
    return model


SMALL = small_model().SerializeToString()


def exercise(model: Model) -> None:
    """Everything that looks at the whole model."""
    model.to_proto()
    model.weights()
    for constant in model.constants():
        _ = constant.values
    model.copy()
    model.nbytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\0" * 64, "not an ONNX model"),
        (b"this is a text file, not a model\n" * 9, "not an ONNX model"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX model"),
        (b"PK\x03\x04" + bytes(100), "not an ONNX model"),
        (b"\x93NUMPY\x01\x00", "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not an ONNX"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
        (numpy_helper.from_array(np.ones(3), "t").SerializeToString(), "not an ONNX model"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else None,
)
def test_what_is_no_model_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModelError, match=r"bad\.onnx") as caught:
        load(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"missing\.onnx: .*No such file"):
        load(tmp_path / "missing.onnx")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="directory"):
        load(tmp_path)


def test_a_path_with_a_null_is_refused() -> None:
    with pytest.raises(InvalidModelError):
        load("a\0b.onnx")


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = small_model()
    change(model)
    return model


@pytest.mark.parametrize("version", [-1, 0, 999])
def test_an_unknown_opset_is_refused(version: int) -> None:
    model = changed(lambda m: setattr(m.opset_import[0], "version", version))
    with pytest.raises(InvalidModelError, match=f"opset {version} "):
        load(model)


def test_a_missing_opset_import_is_refused() -> None:
    with pytest.raises(InvalidModelError, match="operator set"):
        load(changed(lambda m: m.ClearField("opset_import")))


@pytest.mark.parametrize(("index", "domain"), [(0, "ai.onnx"), (1, "l")])
def test_a_missing_import_of_a_domain_is_refused(index: int, domain: str) -> None:
    with pytest.raises(InvalidModelError, match=f"domain '{domain}'"):
        load(changed(lambda m: m.opset_import.pop(index)))


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidModelError, match="not UTF-8"):
        load(SMALL.replace(b"then_branch", b"then\xffbranch"))


def test_a_graph_without_outputs_is_refused() -> None:
    with pytest.raises(InvalidModelError, match="no outputs"):
        load(changed(lambda m: m.graph.ClearField("output")))


def test_two_initializers_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidModelError, match="'W'"):
        load(changed(lambda m: m.graph.initializer.append(m.graph.initializer[0])))


def test_a_cycle_is_refused() -> None:
    def bend(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Relu", ["q"], ["p"]))
        model.graph.node.append(helper.make_node("Relu", ["p"], ["q"]))

    with pytest.raises(InvalidModelError, match="cycle"):
        load(changed(bend)).to_proto()


def test_a_constant_with_too_few_values_is_refused() -> None:
    model = load(changed(lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234")))
    with pytest.raises(InvalidModelError, match="'W'"):
        exercise(model)


@pytest.mark.parametrize("elem_type", [0, 99])
def test_an_unknown_element_type_is_refused(elem_type: int) -> None:
    proto = changed(lambda m: setattr(m.graph.initializer[0], "data_type", elem_type))
    with pytest.raises(InvalidModelError, match="'W'"):
        exercise(load(proto))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SMALL) - 1))
def test_a_truncated_file_is_refused_or_whole(cut: int) -> None:
    """Protobuf has no end mark: a cut between two fields leaves what is still a message."""
    with contextlib.suppress(ModelError):
        exercise(load(SMALL[:cut]))


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(SMALL) - 1), st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_survived(place: int, byte: int) -> None:
    damaged = bytearray(SMALL)
    damaged[place] = byte
    with contextlib.suppress(ModelError):
        exercise(load(bytes(damaged)))


# What the small model above has not: every kind of attribute, sparse tensors, strings, functions.
RICH = {
    name: ZOO[name]().SerializeToString()
    for name in (
        *("attributes_of_every_kind", "sparse_raw_coordinates", "sparse_typed_linear"),
        *("strings_not_utf8", "sparse_constant_node", "function_with_body", "if_in_loop_in_if"),
        *("constant_int4", "typed_data_bfloat16", "sequence_of_maps_output", "training_info"),
    )
}


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(RICH)), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
def test_a_damaged_rich_model_is_refused_or_survived(name: str, place: float, byte: int) -> None:
    damaged = bytearray(RICH[name])
    damaged[int(place * len(damaged))] = byte
    with contextlib.suppress(ModelError):
        exercise(load(bytes(damaged)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(InvalidModelError):
        load(noise)
