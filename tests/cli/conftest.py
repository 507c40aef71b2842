"""What the command-line tests share: running it in this process, and a small trained-like model."""

import dataclasses
import json

import numpy as np
import onnx
import pytest

from onnxslim_passes.cli import main

MODEL_TEXT = """
<ir_version: 9, opset_import: ["" : 17], producer_name: "test">
net (float[batch, 1, 8, 8] image) => (float[batch, 10] scores)
<float[16, 1, 3, 3] conv_weight, float[16] conv_bias, float[576, 10] head_weight,
 float[10] head_bias>
{
    [conv] maps = Conv <kernel_shape = [3, 3]> (image, conv_weight, conv_bias)
    [relu] active = Relu (maps)
    [flatten] flat = Flatten (active)
    [head] scores = Gemm (flat, head_weight, head_bias)
}
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What one command said."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line in this process: `run("inspect", path)`."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*argv):
        capsys.readouterr()
        code = main([str(part) for part in argv])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(tmp_path):
    """A convolution and a Gemm with random weights."""
    proto = onnx.parser.parse_model(MODEL_TEXT)
    random = np.random.default_rng(0)
    for declared in list(proto.graph.value_info):
        shape = [dim.dim_value for dim in declared.type.tensor_type.shape.dim]
        values = random.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:]) or 1)
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), declared.name)
        proto.graph.initializer.append(tensor)
    del proto.graph.value_info[:]
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def samples(tmp_path):
    """48 images with labels."""
    random = np.random.default_rng(1)
    path = tmp_path / "samples.npz"
    np.savez(
        path,
        image=random.standard_normal((48, 1, 8, 8), np.float32),
        labels=random.integers(0, 10, 48),
    )
    return path
