"""Which release a file needs, and what a release that was asked for leaves out."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.storage.runtimes import file_release, parse_release, release_text


def product_of_codes(clusters: int) -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 12, opset_import: ["": 25]>
        g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }"""
    )
    codes = np.random.default_rng(0).integers(1, clusters + 1, (64, 64))
    proto.graph.initializer.append(numpy_helper.from_array(codes.astype(np.float32) / 7, "w"))
    return Model.from_proto(proto)


@pytest.mark.parametrize(
    ("clusters", "min_runtime", "encoding"),
    [
        (4, None, "codebook-uint2"),
        (4, "1.24", "codebook-uint2"),
        (4, "1.23", "codebook-vectors"),
        (14, "1.23", "codebook-uint4"),
        (14, "1.22", "codebook-packed"),
    ],
)
def test_older_releases_get_what_they_fold(
    clusters: int, min_runtime: str | None, encoding: str
) -> None:
    options = StoreWeights(min_runtime=min_runtime)
    result = options.apply(product_of_codes(clusters), Context())
    taken = {decision.where: decision.figures.get("encoding") for decision in result.decisions}
    assert taken["w"] == encoding
    left_out = next(d.reason for d in result.decisions if d.where == "the file")
    assert ("codebook-uint2" in left_out) == (min_runtime in ("1.22", "1.23"))


def test_files_need_what_their_encodings_and_their_opset_need() -> None:
    assert file_release(17, 8, []) == (0, 0)
    assert file_release(17, 8, ["dense", "rice"]) == (1, 17)
    assert file_release(20, 10, ["dense", "rice"]) == (1, 18)
    assert file_release(21, 10, ["codebook-uint4"]) == (1, 23)
    assert file_release(25, 12, ["codebook-uint2"]) == (1, 24)
    assert release_text(parse_release("1.17.3")) == "1.17"
    with pytest.raises(ValueError, match="not a version of ONNX Runtime"):
        parse_release("newest")
