"""The models that must survive a round trip, and the inputs to run them with."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests

Feed = dict[str, Any]  # input name -> array, list (sequence), dict (map) or None (optional)

BACKEND_DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
BACKEND_FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")

# Models that `load` refuses on purpose: name -> words of the message. Each has a reason in
# docs/design/round-trip.md. Anything else that fails to load is a failure of the suite.
EXPECTED_REFUSALS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Case:
    """One model; `feeds` makes the inputs to run it with, given a session of the original."""

    name: str
    model: Callable[[], onnx.ModelProto]
    feeds: Callable[[onnx.ModelProto, ort.InferenceSession], list[Feed]]


@functools.cache
def node_cases() -> tuple[Case, ...]:
    """ONNX's models of one operator each, with their test data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about the casts that ONNX makes its data with
        tests = load_model_tests(kind="node")
    return tuple(
        Case(test.name, functools.partial(_given, test.model), functools.partial(_data, test))
        for test in tests
    )


def folder_cases(kind: str) -> tuple[Case, ...]:
    """ONNX's models that are stored as folders of model and data: one of `BACKEND_FOLDERS`."""
    return tuple(
        Case(
            folder.name,
            functools.partial(onnx.load, folder / "model.onnx"),
            functools.partial(_stored_data, folder),
        )
        for folder in sorted((BACKEND_DATA / kind).iterdir())
    )


def light_cases() -> tuple[Case, ...]:
    """ONNX's well-known networks with weights of one value (made by ConstantOfShape)."""
    files = sorted((BACKEND_DATA / "light").glob("*.onnx"))
    return tuple(file_case(path) for path in files)


def file_case(path: Path, dims: Mapping[str, int] | None = None) -> Case:
    """A model file that runs on random inputs; `dims` maps symbolic dimensions to sizes."""
    return Case(
        path.stem,
        functools.partial(onnx.load, path),
        lambda _, session: [random_feed(session, dims)],
    )


def proto_case(name: str, build: Callable[[], onnx.ModelProto]) -> Case:
    """A model built in code that runs on random inputs."""
    return Case(name, build, lambda _, session: [random_feed(session)])


def random_feed(session: ort.InferenceSession, dims: Mapping[str, int] | None = None) -> Feed:
    """Seeded random inputs; dimensions without a size and not in `dims` become 2."""
    generator = np.random.default_rng(0)
    return {
        spec.name: _random_input(spec.type, _sizes(spec.shape, dims or {}), generator)
        for spec in session.get_inputs()
    }


def _sizes(shape: list[int | str | None], dims: Mapping[str, int]) -> list[int]:
    return [d if isinstance(d, int) and d >= 0 else dims.get(str(d), 2) for d in shape]


def _random_input(kind: str, shape: list[int], generator: np.random.Generator) -> Any:
    """A value of an ONNX Runtime type such as "tensor(float)" or "optional(seq(tensor(int64)))"."""
    outer, _, inner = kind.partition("(")
    inner = inner.removesuffix(")")
    if outer == "optional":
        return _random_input(inner, shape, generator)
    if outer == "seq":
        return [_random_input(inner, shape, generator) for _ in range(2)]
    if outer == "map":
        key, _, value = inner.partition(",")
        item = _random_input(value, [], generator)
        return {("a" if key == "string" else 0): item.item()}
    return _random_array(inner, shape, generator)


def _random_array(elem_type: str, shape: list[int], generator: np.random.Generator) -> Any:
    names = {"float": "float32", "double": "float64"}
    if elem_type == "string":
        return np.full(shape, "word", object)
    if elem_type == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if elem_type in ("float", "double", "float16"):
        return generator.standard_normal(shape).astype(names.get(elem_type, elem_type))
    values = np.asarray(generator.integers(0, 2, shape))
    if elem_type in ("complex64", "complex128", "int64", "int32", "int16", "int8"):
        return values.astype(elem_type)
    if elem_type.startswith("uint") and int(elem_type[4:]) >= 8:
        return values.astype(elem_type)
    onnx_type = TensorProto.DataType.Value(elem_type.upper())
    array = values.astype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx_type)


def _given(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def _data(test: Any, model: onnx.ModelProto, _: ort.InferenceSession) -> list[Feed]:
    names = [value.name for value in model.graph.input]
    sets = []
    for inputs, _outputs in test.data_sets:
        arrays = [numpy_helper.to_array(x) if isinstance(x, TensorProto) else x for x in inputs]
        sets.append(dict(zip(names, map(_as_input, arrays), strict=False)))
    return sets


def _as_input(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, np.generic) else value


def _stored_data(folder: Path, model: onnx.ModelProto, _: ort.InferenceSession) -> list[Feed]:
    return [_read_set(data, model) for data in sorted(folder.glob("test_data_set_*"))]


def _read_set(folder: Path, model: onnx.ModelProto) -> Feed:
    feed = {}
    for index, value in enumerate(model.graph.input):
        path = folder / f"input_{index}.pb"
        if not path.is_file():
            break
        if value.type.HasField("sequence_type"):
            sequence = onnx.SequenceProto.FromString(path.read_bytes())
            feed[value.name] = numpy_helper.to_list(sequence)
        else:
            feed[value.name] = numpy_helper.to_array(TensorProto.FromString(path.read_bytes()))
    return feed


def chunks(cases: tuple[Case, ...], count: int) -> Iterator[tuple[Case, ...]]:
    """`cases` in `count` groups of about equal size."""
    for start in range(count):
        yield cases[start::count]
