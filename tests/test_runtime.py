"""Sessions, the optimized graph and the profile, on models of a few nodes."""

import gc
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from onnxslim_passes import runtime
from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import load
from onnxslim_passes.runtime import node_runs, open_session, optimized_graph, profile, reason

ADD = """<ir_version: 8, opset_import: ["": 18]>
g (float[N, 3] x, float[N, 3] z) => (float[N, 3] y) { a = Relu(x)  y = Add(a, z) }"""


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def weighted(size: int = 600) -> onnx.ModelProto:
    """y = x W with an initializer W of (size, size)."""
    model = parse(
        '<ir_version: 8, opset_import: ["": 18]>'
        f"g (float[N, {size}] x) => (float[N, {size}] y) {{ y = MatMul(x, W) }}"
    )
    values = np.arange(size * size, dtype=np.float32).reshape(size, size) / size**2
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "W"))
    return model


@pytest.mark.parametrize("form", ["proto", "bytes", "path", "str", "model"])
def test_every_form_of_model_runs(form: str, tmp_path: Path) -> None:
    proto = parse(ADD)
    onnx.save(proto, tmp_path / "m.onnx")
    model = {
        "proto": proto,
        "bytes": proto.SerializeToString(),
        "path": tmp_path / "m.onnx",
        "str": str(tmp_path / "m.onnx"),
        "model": load(proto),
    }[form]
    with open_session(model) as session:
        ones = np.ones((2, 3), np.float32)
        assert np.array_equal(session.run({"x": -ones, "z": ones})["y"], ones)
        assert [i.name for i in session.inputs] == ["x", "z"]
        assert session.inputs[0].shape == ("N", 3)
        assert session.inputs[0].dtype == np.float32
        assert str(session.outputs[0]) == "float32 (N, 3)"


def test_selected_outputs_only() -> None:
    text = '<ir_version: 8, opset_import: ["": 18]> g (float[2] x) => (float[2] y, float[2] z)'
    session = open_session(parse(text + "{ y = Relu(x) z = Neg(x) }"))
    assert list(session.run({"x": np.ones(2, np.float32)}, ["z"])) == ["z"]


def test_overridable_initializers_are_not_inputs() -> None:
    model = weighted(4)
    model.graph.input.append(onnx.helper.make_tensor_value_info("W", 1, [4, 4]))
    assert [i.name for i in open_session(model).inputs] == ["x"]


def test_external_data_is_found_beside_a_path(tmp_path: Path) -> None:
    onnx.save_model(
        weighted(), tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin"
    )
    assert (tmp_path / "weights.bin").is_file()
    with open_session(tmp_path / "m.onnx") as session:
        assert session.run({"x": np.eye(600, dtype=np.float32)})["y"][0, 1] == np.float32(
            1 / 6e2**2
        )


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        ("bfloat16", ml_dtypes.bfloat16),
        ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
        ("float16", np.float16),
        ("uint16", np.uint16),
        ("bool", np.bool_),
        ("string", np.object_),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()])
def test_every_type_comes_out_as_it_went_in(
    element: str, dtype: type, shape: tuple[int, ...]
) -> None:
    declared = "[]" if shape == () else "[N, 3]"
    session = open_session(
        parse(
            f'<ir_version: 10, opset_import: ["": 21]> g ({element}{declared} x)'
            f" => ({element}{declared} y) {{ y = Identity(x) }}"
        )
    )
    x = np.full(shape, "a", dtype) if dtype is np.object_ else np.ones(shape, dtype)
    y = session.run({"x": x})["y"]
    assert session.inputs[0].dtype == x.dtype == y.dtype
    assert y.shape == shape
    assert np.array_equal(x, y)


def test_sequences_and_maps_have_their_kind() -> None:
    text = '<ir_version: 8, opset_import: ["": 18]> g (seq(float[N]) x) => (int64 n)'
    session = open_session(parse(text + "{ n = SequenceLength(x) }"))
    assert session.inputs[0].kind == "sequence"
    assert session.inputs[0].dtype is None
    assert session.run({"x": [np.zeros(2, np.float32)] * 3})["n"] == 3


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (b"no model", "protobuf parsing failed"),
        (b"", "No graph was found"),
        ("/no/such/file.onnx", "'/no/such/file.onnx'.*doesn't exist"),
        (parse(ADD.replace("Relu", "Rely")), "No Op registered for Rely"),
        (parse(ADD.replace('"": 18', '"": 99')), "[Oo]pset 99"),
    ],
)
def test_refused_to_load(model: object, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeRefusedError, match=text) as caught:
        open_session(model)  # type: ignore[arg-type]  # one parameter table for all forms
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("feed", "text"),
    [
        ({"x": (2, 3), "z": (5, 3)}, r"node 'sum' \(Add\): .*broadcast.*2 by 5"),
        ({"x": (2, 3)}, "Required inputs .*'z'"),
        ({"x": (2, 4), "z": (2, 3)}, "Got: 4 Expected: 3"),
    ],
)
def test_refused_to_run(
    feed: dict[str, tuple[int, ...]], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = parse(ADD)
    model.graph.node[1].name = "sum"
    session = open_session(model)
    with pytest.raises(RuntimeRefusedError, match=text) as caught:
        session.run({name: np.ones(shape, np.float32) for name, shape in feed.items()})
    assert "\n" not in str(caught.value)
    assert ".h:" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_reason_drops_signatures() -> None:
    noisy = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Gather node."
        " Name:'emb/Gather' Status Message: /src/core/gather.cc:63 virtual onnxruntime::Status"
        " onnxruntime::Gather::F(int, const Tensor*) const [with T = float] index out of range\n"
    )
    assert reason(RuntimeError(noisy)) == "node 'emb/Gather' (Gather): index out of range."


def test_large_models_go_through_a_folder_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runtime, "PROTO_LIMIT_BYTES", 1000)
    monkeypatch.setattr(runtime, "MODEL_LIMIT_BYTES", 1000)
    model = weighted()
    before = model.SerializeToString()
    x = np.eye(600, dtype=np.float32)
    with open_session(model) as session:
        assert [f.name for f in tmp_path.glob("*/*.data")] == ["model.data"]
        assert session.run({"x": x})["y"][1, 0] > 0
    assert list(tmp_path.iterdir()) == []
    with open_session(load(model)) as session:
        assert len(list(tmp_path.glob("*/*.data"))) == 1
        assert session.run({"x": x})["y"][1, 0] > 0
    assert list(tmp_path.iterdir()) == []
    dropped = open_session(model)
    del dropped
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    model.graph.node[0].op_type = "Unknown"
    with pytest.raises(RuntimeRefusedError, match="Unknown"):
        open_session(model)
    assert list(tmp_path.iterdir()) == []
    model.graph.node[0].op_type = "MatMul"
    assert model.SerializeToString() == before


def test_optimized_graph_is_folded() -> None:
    model = parse(
        '<ir_version: 8, opset_import: ["": 18]> g (float[N, 2] x) => (float[N, 2] y)'
        "{ a = Constant<value = float[2] {1, 2}>() b = Neg(a) c = Relu(x) y = Add(c, b) }"
    )
    assert [n.op_type for n in optimized_graph(model).graph.node] == ["Relu", "Add"]
    assert "Neg" in [n.op_type for n in optimized_graph(model, level="none").graph.node]


def test_optimized_graph_with_and_without_payload(tmp_path: Path) -> None:
    whole = optimized_graph(weighted())
    assert onnx.numpy_helper.to_array(whole.graph.initializer[0]).shape == (600, 600)
    assert optimized_graph(weighted(), weights=False).ByteSize() < 2000


def test_profile_names_every_node() -> None:
    model = parse(ADD)
    model.graph.node[0].name, model.graph.node[1].name = "first", "second"
    feed = {"x": np.ones((2, 3), np.float32), "z": np.ones((2, 3), np.float32)}
    times = profile(model, feed, runs=3)
    assert [(t.name, t.op) for t in times] == [("first", "Relu"), ("second", "Add")]
    assert all(0 <= t.seconds < 1 and t.provider == "CPUExecutionProvider" for t in times)


def test_node_runs_have_shapes_and_count_loops() -> None:
    model = parse(
        '<ir_version: 8, opset_import: ["": 18]> g (float[2, 3] x, int64 n) => (float[2, 3] y)'
        "{ t = Constant<value = bool {1}>() y = Loop(n, t, x)"
        "<body = b (int64 i, bool c, float[2, 3] p) => (bool d, float[2, 3] q)"
        " { d = Identity(c) q = Neg(p) }> }"
    )
    runs = node_runs(model, {"x": np.ones((2, 3), np.float32), "n": np.array(4)})
    negations = [r for r in runs if r.op == "Neg"]
    assert [(r.inputs, r.outputs) for r in negations] == [(((2, 3),), ((2, 3),))] * 4


def test_a_recurrence_keeps_its_state() -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    g (float[2] x, float[2] total, float scale) => (float[2] next, float[2] shown)
    { p = Mul (x, scale) next = Add (total, p) shown = Neg (next) }
    """
    with runtime.open_session(onnx.parser.parse_model(text)) as session:
        first = {"total": np.float32([1, 1]), "scale": np.array(2, np.float32), "idle": np.ones(1)}
        steps = runtime.Recurrence(session, first, {"total": "next"})
        for _ in range(3):
            found = steps.run({"x": np.float32([1, 2]), "unknown": np.ones(1)})
        np.testing.assert_array_equal(found["shown"], [-7, -13])
        assert found.keys() == {"shown"}
        np.testing.assert_array_equal(steps.read()["total"], [7, 13])
        steps.write({"total": np.float32([0, 0])})
        steps.run({"x": np.float32([1, 1])})
        np.testing.assert_array_equal(steps.read(["total"])["total"], [2, 2])
        with pytest.raises(RuntimeRefusedError):
            steps.run({"x": np.ones(3, np.float32)})
