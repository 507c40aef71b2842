"""Every encoding is undone by one mechanism, in every place a weight can stand."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Site
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.unpacking import unpack_weights
from onnxslim_passes.storage.writer import Replacement, Writer, short_names
from tests.storage.test_encodings import identity_model
from tests.zoo_small import SMALL

SITE = Site(21, ir_version=10, functions=True)


def matmul(values: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N, {values.shape[0]}] x) => (float[N, {values.shape[1]}] y) {{
            y = MatMul(x, w)
        }}""")
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    return Model.from_proto(proto)


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_undone(name: str) -> None:
    rng = np.random.default_rng(0)
    fewer = rng.integers(0, 3, (64, 48)) * rng.integers(0, 2, (64, 48))
    tables = {
        "fill": np.full((64, 48), 3.5),
        "grid": rng.integers(-7, 8, (64, 48)) * (1 + rng.random((64, 1))),
        "narrow": rng.integers(-90, 90, (64, 48)),
    }
    values = tables.get(name, fewer).astype(np.float32)
    plans = list(ENCODINGS[name].plans(Contents(values), SITE))
    if not plans:
        pytest.skip("needs other values; see its own tests")
    for plan in plans:
        model = matmul(values)
        before = model.to_proto()
        (constant,) = model.constants()
        Replacement(constant, plan.root, Writer(model, model.graph, short_names())).apply()
        unpacked = unpack_weights(model)
        assert [each.where for each in unpacked] == ([] if name == "dense" else ["w"])
        assert model.to_proto() == before


# Its own graph computes a weight from float16: that, too, is unpacked.
STORED_ALREADY = ("computed_weights",)


def contents(model: Model, *, named: bool) -> Counter[tuple[str, bytes]]:
    """Every constant's bytes; with its name, unless that was shortened."""
    return Counter(
        (str(constant.name) if named else "", constant.values.tobytes())
        for constant in model.constants()
    )


@pytest.mark.parametrize("name", [name for name in SMALL if name not in STORED_ALREADY])
@pytest.mark.parametrize("level", ["portable", "smallest"])
def test_models_of_all_kinds(name: str, level: str) -> None:
    model = Model.from_proto(SMALL[name]().proto)
    for weight in model.weights():
        if weight.size > 30 and weight.dtype == np.float32:
            weight.values = np.round(np.clip(weight.values * 2, -2, 2)) + np.float32(0)
    dense = contents(model, named=level != "smallest")
    StoreWeights(level=level, min_elements=2).apply(model, Context())
    unpack_weights(model)
    assert contents(model, named=level != "smallest") == dense
    assert not any(constant.sparse for constant in model.constants())


def test_what_is_no_decoder_stays() -> None:
    values = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    model = identity_model(values, SITE)
    before = model.to_proto()
    assert unpack_weights(model) == []
    assert model.to_proto() == before
