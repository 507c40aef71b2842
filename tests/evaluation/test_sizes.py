"""Sizes: bytes, parameters, multiply-accumulates."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import zstandard
from onnx import numpy_helper

from onnxslim_passes.evaluation import measure_size, sizes
from onnxslim_passes.evaluation.sizes import count_macs, count_parameters, model_files, node_macs
from onnxslim_passes.model import Model, load


def model(text: str, opset: int = 18, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return load(proto)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("op", "inputs", "output", "macs"),
    [
        ("Conv", [(1, 4, 8, 8), (6, 4, 3, 3)], (1, 6, 6, 6), 6 * 36 * 4 * 9),
        ("Conv", [(1, 4, 8, 8), (4, 1, 3, 3)], (1, 4, 6, 6), 4 * 36 * 9),
        ("QLinearConv", [(1, 4, 8), (), (), (6, 4, 3)], (1, 6, 6), 6 * 6 * 4 * 3),
        ("ConvTranspose", [(1, 4, 5), (4, 6, 3)], (1, 6, 7), 4 * 5 * 6 * 3),
        ("Gemm", [(3, 4), (4, 5)], (3, 5), 60),
        ("Gemm", [(4, 3), (5, 4)], (3, 5), 60),
        ("MatMul", [(2, 3, 4), (4, 5)], (2, 3, 5), 120),
        ("QLinearMatMul", [(3, 4), (), (), (4, 5)], (3, 5), 60),
        ("LSTM", [(7, 2, 3), (1, 20, 3), (1, 20, 5)], (7, 1, 2, 5), 14 * 4 * 5 * (3 + 5)),
        ("GRU", [(7, 2, 3), (2, 15, 3), (2, 15, 5)], (7, 2, 2, 5), 14 * 2 * 3 * 5 * (3 + 5)),
    ],
)
def test_node_macs(op: str, inputs: list, output: tuple, macs: int) -> None:
    assert node_macs(op, inputs, [output]) == macs


def test_macs_of_declared_shapes_and_of_a_feed() -> None:
    fixed = model("(float[2, 4] x) => (float[2, 5] y) { y = MatMul(x, w) }", w=ones(4, 5))
    assert count_macs(fixed) == (40, "for the declared shapes")
    free = model("(float[N, 4] x) => (float[N, 5] y) { y = MatMul(x, w) }", w=ones(4, 5))
    assert count_macs(free)[0] is None
    assert "(MatMul) are not fixed" in count_macs(free)[1]
    assert count_macs(free, {"x": ones(3, 4)}) == (60, "for x (3, 4)")


def test_macs_count_loops_as_they_run() -> None:
    looped = model(
        "(float[2, 2] x, int64 n) => (float[2, 2] y)"
        "{ t = Constant<value = bool {1}>() y = Loop(n, t, x)"
        "<body = b (int64 i, bool c, float[2, 2] p) => (bool d, float[2, 2] q)"
        " { d = Identity(c) q = MatMul(p, p) }> }"
    )
    assert count_macs(looped)[0] is None
    assert count_macs(looped, {"x": ones(2, 2), "n": np.array(5)})[0] == 40


def test_parameters_are_weights_and_not_grids_or_shapes() -> None:
    w = ones(4, 6)
    w[0, :3] = 0
    found = model(
        "(float[N, 4] x) => (float[N, 6] y){ a = MatMul(x, w) b = Add(a, c) y = Reshape(b, s) }",
        w=w,
        c=ones(6),
        s=np.array([-1, 6]),
    )
    assert count_parameters(found) == (30, 27)


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantized_parameters_count_against_their_zero_point(per_channel: bool) -> None:
    shape = (4,) if per_channel else ()
    codes = np.full((3, 4), 128, np.uint8)
    codes[0] = 7
    found = model(
        "(float[N, 3] x) => (float[N, 4] y)"
        "{ w = DequantizeLinear<axis = 1>(q, scale, zero) y = MatMul(x, w) }",
        q=codes,
        scale=np.ones(shape, np.float32),
        zero=np.full(shape, 128, np.uint8),
    )
    assert count_parameters(found) == (12, 4)


def test_parameters_of_a_stored_model_are_those_of_the_dense_one() -> None:
    codes = model(
        "(float[N, 4] x) => (float[N, 6] y) { w = Gather(t, i) y = MatMul(x, w) }",
        t=ones(2),
        i=np.zeros((4, 6), np.int64),
    )
    dense = model("(float[N, 4] x) => (float[N, 6] y) { y = MatMul(x, w) }", w=ones(4, 6))
    size = measure_size(codes, dense=dense, zstd=False)
    assert (size.parameters, size.nonzero_parameters) == (24, 24)
    assert size.file_bytes == measure_size(codes, zstd=False).file_bytes


def test_bytes_and_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model("(float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }", w=ones(64, 64))
    found.save(tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    size = measure_size(found, tmp_path / "m.onnx")
    assert size.file_bytes == len(content)
    assert size.zstd_bytes == len(zstandard.ZstdCompressor(level=19).compress(content))
    assert size.parameters == size.nonzero_parameters == 4096
    assert measure_size(found) == size
    assert measure_size(found, zstd=False).zstd_bytes is None
    monkeypatch.setattr(sizes, "ZSTD_LIMIT_BYTES", 1000)
    assert measure_size(found).zstd_bytes is None
    assert measure_size(found, zstd=True).zstd_bytes == size.zstd_bytes


def test_external_data_is_counted_once(tmp_path: Path) -> None:
    found = model(
        "(float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w) y = MatMul(a, v) }",
        w=ones(64, 64),
        v=ones(64, 64) * 2,
    )
    found.save(tmp_path / "m.onnx", external=True)
    files = model_files(tmp_path / "m.onnx")
    assert sorted(f.name for f in files) == sorted(f.name for f in tmp_path.iterdir())
    assert len(files) == 2
    size = measure_size(found, tmp_path / "m.onnx")
    assert size.file_bytes == sum(f.stat().st_size for f in files)
    assert size.zstd_bytes is not None
