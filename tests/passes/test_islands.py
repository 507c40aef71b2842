"""On real networks no pair is left that the runtime does not fuse."""

from pathlib import Path

import pytest

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import load
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.fold_constants import FoldConstants
from onnxslim_passes.passes.fuse_batch_norm import FuseBatchNorm
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.runtime import open_session, optimized_graph

NETWORKS = (
    "models/lenet5.onnx",
    "models/resnet8_cifar10.onnx",
    "models/ppocr_v4_rec.onnx",
    "models/magika_v3_3.onnx",
    "robust/ppocr_v4_det.onnx",
    "robust/ppocr_cls_paddle_opset11.onnx",
    "robust/ultraface_rfb320.onnx",
    "robust/espcn_x3.onnx",
    "robust/vww_mobilenet_v1_025_tflite.onnx",
)


@pytest.mark.long
@pytest.mark.parametrize("network", NETWORKS)
def test_no_pair_is_left_unfused(network: str, shared_models: Path) -> None:
    model = load(shared_models / network)
    for prepare in (FoldConstants(), FuseBatchNorm()):
        prepare.apply(model, Context())
    with open_session(model) as session:
        samples = Samples.runnable_random(session, count=1)
    QuantizeStatic().apply(model, Context(samples=samples))
    graph = optimized_graph(model, weights=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            # A weight that is made float at each run; a tensor that is rounded for nothing.
            assert node.input[0] not in stored, node.name
            maker = makers.get(node.input[0])
            assert maker is None or maker.op_type != "QuantizeLinear", node.name
