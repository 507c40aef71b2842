"""The networks of models/ are what their expected.json says, before and after recipes."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.runtime import open_session

ROOT = Path(__file__).resolve().parents[2]
MODELS, CALIBRATION = ROOT / "models", ROOT / "calibration"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/model.onnx"))
PRODUCERS = {
    "digits_cnn_keras": "tf2onnx",
    "digits_cnn_torch": "pytorch",
    "digits_mlp_sklearn": "skl2onnx",
    "digits_vit_jax": "jax2onnx",
    "sentences_transformer_torch": "pytorch",
    "waves_lstm_torch": "pytorch",
}


def about(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "expected.json").read_text(encoding="utf-8"))


def measured_recipes() -> list[tuple[str, str]]:
    return [
        (name, recipe)
        for name in NAMES
        for recipe, figures in about(name)["recipes"].items()
        if "top1" in figures
    ]


def samples(spec: str) -> Samples:
    return Samples.open(f"{CALIBRATION}/{spec}")


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def right_answers(output: np.ndarray, labels: np.ndarray) -> int:
    found = output if output.ndim == 1 else output.argmax(axis=1)
    return int((found == labels).sum())


def test_the_networks_come_from_four_frameworks() -> None:
    producers = {name: onnx.load(MODELS / name / "model.onnx").producer_name for name in NAMES}
    assert producers == PRODUCERS


@pytest.mark.parametrize("name", NAMES)
def test_file_is_valid_small_and_holds_no_local_paths(name: str) -> None:
    path = MODELS / name / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    content = path.read_bytes()
    assert len(content) <= 500_000
    assert not re.search(rb"/(?:home|root|tmp|usr|Users|site-packages)/", content)


def test_folders_stay_small() -> None:
    def size(folder: Path, pattern: str) -> int:
        return sum(path.stat().st_size for path in folder.rglob(pattern))

    assert size(MODELS, "*.onnx") <= 2_000_000
    assert size(CALIBRATION, "*.np[yz]") <= 300_000


@pytest.mark.parametrize("name", NAMES)
def test_float_accuracy_is_the_stored_one(name: str) -> None:
    session = ort.InferenceSession(MODELS / name / "model.onnx", providers=["CPUExecutionProvider"])
    tests = samples(about(name)["evaluation"])
    right = total = 0
    for feed, labels in tests.labelled(open_session(MODELS / name / "model.onnx").inputs):
        right += right_answers(session.run(None, feed)[0], labels)
        total += len(labels)
    stored = about(name)["float"]
    # Another processor sums in another order: one sample on the edge may fall the other way.
    assert 100 * right / total == pytest.approx(stored["top1"], abs=stored["tolerance"])
    assert 100 * right / total >= 95
    assert (MODELS / name / "model.onnx").stat().st_size == stored["file_bytes"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_any_batch_size_gives_the_same_outputs(name: str, batch: int) -> None:
    session = open_session(MODELS / name / "model.onnx")
    feed = next(samples(about(name)["calibration"]).feeds(session.inputs))
    ((input_name, array),) = feed.items()
    output_name = session.outputs[0].name
    whole = session.run(feed)[output_name]
    part = session.run({input_name: array[:batch]})[output_name]
    # Kernels sum in another order for another batch size.
    np.testing.assert_allclose(part, whole[:batch], rtol=1e-3, atol=1e-4)


def test_scikit_learn_model_gives_a_sequence_of_maps() -> None:
    session = open_session(MODELS / "digits_mlp_sklearn" / "model.onnx")
    feed = next(samples("readers.py:digits_flat").feeds(session.inputs))
    found = session.run(feed)
    label, probability = found["output_label"], found["output_probability"]
    assert [max(row, key=row.get) for row in probability] == label.tolist()
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-5) for row in probability)


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("digits_cnn_torch", {"Conv", "BatchNormalization", "MaxPool", "Gemm", "Add"}),
        ("digits_cnn_keras", {"Conv", "Mul", "Clip", "MatMul", "GlobalAveragePool"}),
        ("digits_mlp_sklearn", {"Scaler", "MatMul", "ZipMap"}),
        ("digits_vit_jax", {"Einsum", "MatMul", "Softmax"}),
        ("sentences_transformer_torch", {"Gather", "LayerNormalization", "Gelu", "MatMul"}),
        ("waves_lstm_torch", {"Conv", "LSTM", "GRU", "Gemm", "Constant"}),
    ],
)
def test_networks_hold_what_they_are_there_for(name: str, operators: set[str]) -> None:
    graph = onnx.load(MODELS / name / "model.onnx").graph
    assert operators <= {node.op_type for node in graph.node}


@pytest.mark.parametrize("name", NAMES)
def test_training_script_states_its_dependencies(name: str) -> None:
    script = (MODELS / name / "train.py").read_text(encoding="utf-8")
    assert script.startswith("# /// script\n")
    assert re.search(r'"onnx==[\d.]+"', script)


@pytest.mark.parametrize("folder", [MODELS, CALIBRATION])
def test_readme_names_everything_in_its_folder(folder: Path) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    entries = {path.name for path in folder.iterdir() if not path.name.startswith(("_", "."))}
    assert [name for name in entries - {"README.md"} if name not in readme] == []


@pytest.mark.long
@pytest.mark.parametrize(("name", "recipe"), measured_recipes())
def test_recipe_gives_the_stored_figures(name: str, recipe: str) -> None:
    measure = load_script(MODELS / "measure.py")
    stored = about(name)["recipes"][recipe]
    assert measure.shortfalls(stored, measure.measure(name, recipe)) == []
