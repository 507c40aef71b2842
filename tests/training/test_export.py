"""The folder: that its example runs as written, and that what was trained comes back."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest

from onnxslim_passes.errors import InvalidModelError, UsageError
from onnxslim_passes.model import load
from onnxslim_passes.training.checkpoint import read_tensors, write_tensors
from onnxslim_passes.training.export import export, open_program
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import build
from tests.training.nets import MLP, mlp, points, with_weights

WIDE = MLP.replace("5]", "90]").replace("[5,", "[90,")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(with_weights(WIDE), path)
    return path


@pytest.fixture
def folder(tmp_path, source):
    """With a teacher, whose weights are in a file of their own."""
    program = build(
        load(source),
        objective=Objective(loss="cross-entropy"),
        update=Update(optimizer="sgd"),
        parameters=Parameters(),
        teacher=mlp(WIDE, seed=1),
        with_gradients=True,
    )
    export(program, tmp_path / "training")
    return tmp_path / "training"


def test_the_example_runs_as_written_and_trains(folder, tmp_path):
    x, labels = points(64)
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    before, _ = read_tensors(folder / "checkpoint.safetensors")
    argv = [sys.executable, str(folder / "train.py"), str(tmp_path / "data.npz"), "4", "0.05"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch {n}" for n in (1, 2, 3, 4)]
    losses = [float(line.split()[3].rstrip(",")) for line in lines]
    assert losses[-1] < losses[0]
    after, _ = read_tensors(folder / "checkpoint.safetensors")
    assert after.keys() == before.keys()
    assert not np.array_equal(after["w1/value"], before["w1/value"])


def test_the_example_needs_no_other_package(folder):
    text = (folder / "train.py").read_text()
    assert {line.split()[1] for line in text.splitlines() if line.startswith("import ")} == {
        "json",
        "sys",
        "numpy",
        "onnxruntime",
    }


def test_files_and_layout(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "checkpoint.safetensors",
        "evaluation.onnx",
        "frozen.safetensors",
        "gradients.onnx",
        "train.py",
        "training.json",
        "training.onnx",
    ]
    layout = json.loads((folder / "training.json").read_text())
    moving, _ = read_tensors(folder / "checkpoint.safetensors")
    frozen, _ = read_tensors(folder / "frozen.safetensors")
    assert {spec["input"] for spec in layout["state"]} == moving.keys() | frozen.keys()
    assert frozen.keys() == {"teacher/w1", "teacher/w2"}
    assert (folder / "training.onnx").stat().st_size < 30_000


def test_a_program_comes_back_with_its_checkpoint(folder, source):
    moving, texts = read_tensors(folder / "checkpoint.safetensors")
    moving["w1/value"] = moving["w1/value"] + 1
    write_tensors(folder / "checkpoint.safetensors", moving, texts)
    program = open_program(folder, load(source))
    np.testing.assert_array_equal(program.state["w1/value"], moving["w1/value"])
    assert [constraint.where for constraint in program.constraints] == ["w1", "b1", "w2", "b2"]


def test_another_model_is_refused(folder, tmp_path):
    other = tmp_path / "other.onnx"
    onnx.save(with_weights(WIDE, seed=5), other)
    with pytest.raises(UsageError, match=r"was made of net\.onnx with another content"):
        open_program(folder, load(other))


def test_a_damaged_folder_is_refused(folder, source):
    moving, _ = read_tensors(folder / "checkpoint.safetensors")
    write_tensors(folder / "checkpoint.safetensors", moving | {"b1/value": np.zeros(2, "f4")})
    with pytest.raises(InvalidModelError, match=r"'b1/value' is float32 \(2,\), expected"):
        open_program(folder, load(source))
    (folder / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidModelError, match="cannot be read as safetensors"):
        open_program(folder, load(source))
    (folder / "training.json").write_text("{}")
    with pytest.raises(InvalidModelError, match="is damaged"):
        open_program(folder, load(source))


def test_branches_that_sizes_decide_come_back_with_the_program(tmp_path):
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    net (float[N, width] x) => (float[N, M] y)
    <int64[1] wide = {4}> {
        width = Shape <start = 1> (x)
        same = Equal (width, wide)
        decision = Squeeze (same)
        y = If (decision) <
            then_branch = four () => (float[N, 3] a)
                <float[4, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 2.0, 3.0}>
                { a = MatMul (x, w) },
            else_branch = other () => (float[N, M] b) { b = Neg (x) }
        >
    }
    """
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text.replace("width] x", "K] x")), path)
    program = build(
        load(path),
        objective=Objective(loss="mse"),
        update=Update(),
        parameters=Parameters(),
        sizes={"x": [None, 4]},
    )
    export(program, tmp_path / "training")
    again = open_program(tmp_path / "training", load(path))
    assert [constraint.where for constraint in again.constraints] == [
        constraint.where for constraint in program.constraints
    ]
    assert any("then_branch" in constraint.where for constraint in again.constraints)
