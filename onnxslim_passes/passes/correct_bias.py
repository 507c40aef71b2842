"""`correct-bias`: takes the mean error of quantized layers out of their biases.

Rounding weights and clipping activations shifts the mean of a layer's output, channel by channel.
The shift is known from samples, and a bias takes it back at no cost at run time.

    b' = b + E[y] - E[y'],    y the float layer's output, y' the quantized one's

The layers behind must see corrected inputs (Nagel et al., section 4.2.1), else each takes back the
errors of all before it once more. Two sessions run on each feed: the float model gives the channel
means E[y] of all layers; the quantized one takes them as inputs, and behind each layer adds
E[y] - E[y'] of this feed to y' itself, so that all layers behind see it. The corrections of all
feeds, weighted by the number of values, are averaged: one run over the data, whatever the number
of layers. A feed's own mean is not that of all feeds; a second run sees what the first one left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper
from pydantic import Field

from onnxslim_passes.errors import SamplesError
from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.runtime import Session, open_session

Array = npt.NDArray[Any]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INT32_LIMIT = (1 << 31) - 1
_REDUCE_AXES_OPSET = 18  # from here on ReduceMean takes its axes as an input


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A quantized layer, by names, so that it is the same in copies of the model.

    Attributes:
        where: the node, for messages.
        made: the name of the node's output.
        output: the name of the output behind the bias; another one where an Add holds the bias.
        original: the name of the same tensor in the float model.
        channels: output channels.
        rank: number of axes where the channels are on axis 1; None where they are on the last.
    """

    where: str
    made: str
    output: str
    original: str
    channels: int
    rank: int | None


@dataclass
class _Mean:
    """The weighted mean of the corrections of one layer so far.

    Attributes:
        total: the sum of correction times count, float64 (C,).
        count: values of a channel.
    """

    total: Array
    count: int = 0

    def update(self, correction: Array, count: int) -> None:
        if count:
            self.total += correction.astype(np.float64) * count
            self.count += count

    def value(self) -> Array:
        return self.total / max(self.count, 1)


@pass_options
class CorrectBias(Pass):
    """Adds the mean error of each quantized layer's output to its bias."""

    name: ClassVar[str] = "correct-bias"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "biases that take back the mean error of quantized layers"
    references: ClassVar[tuple[str, ...]] = (
        "Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, "
        "ICCV 2019, section 4.2",
        "Finkelstein et al., Fighting Quantization Bias With Bias, arXiv:1906.03193",
    )
    needs_samples: ClassVar[bool] = True

    runs: Annotated[int, Field(ge=1, le=16, description="runs over the samples")] = 2

    def apply(self, model: Model, context: Context) -> PassResult:
        """Corrects biases in place; see `docs/passes/correct-bias.md`."""
        floating = context.floating or context.reference
        if context.samples is None or floating is None:
            raise SamplesError(
                "correct-bias compares the quantized model with the float one on calibration "
                "samples; give --calibration DATA and run it in a pipeline, after quantize-static."
            )
        layers, decisions = _find_layers(model, floating)
        if not layers:
            return PassResult(changed=False, decisions=tuple(decisions))
        said: dict[str, Decision] = {}
        with open_session(_with_means(floating, layers), lean=True) as reference:
            for _ in range(self.runs):
                moved = _run(model, reference, layers, context)
                said = {where: _stronger(said.get(where), new) for where, new in moved.items()}
                if not any(decision.taken for decision in moved.values()):
                    break
        decisions.extend(said.values())
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed=changed, decisions=tuple(decisions))


# ---------------- layers


def _find_layers(model: Model, floating: Model) -> tuple[list[_Layer], list[Decision]]:
    """The layers with integer weights and a counterpart, and why others are passed over."""
    originals = {str(t.name) for node in floating.graph.nodes for t in node.outputs}
    layers, decisions = [], []
    for node in model.graph.nodes:
        if node.domain or node.op not in _LAYERS or not _has_integer_weight(node):
            continue
        holder, _ = _bias_place(node)
        output = (holder or node).outputs[0]
        original = _original_name(output)
        reason = _refusal(node, original, originals)
        if reason is not None:
            decisions.append(Decision(where=node.where, taken=False, reason=reason))
            continue
        layers.append(_layer(node, output, original))
    return layers, decisions


def _has_integer_weight(node: Node) -> bool:
    maker = node.inputs[1].inputs[0] if node.inputs[1].inputs else None
    return (
        maker is not None
        and maker.op == "DequantizeLinear"
        and isinstance(maker.inputs[0], Constant)
    )


def _original_name(tensor: Variable) -> str:
    """The name a layer's output had in float: a pair behind it has taken the name over."""
    taker = tensor.outputs[0] if len(tensor.outputs) == 1 else None
    if taker is not None and taker.op == "QuantizeLinear" and taker.outputs[0].outputs:
        restorer = taker.outputs[0].outputs[0]
        if restorer.op == "DequantizeLinear":
            return str(restorer.outputs[0].name)
    return str(tensor.name)


def _refusal(node: Node, original: str, originals: set[str]) -> str | None:
    """Why a layer's bias cannot be corrected, or None."""
    if original not in originals:
        return f"its output {original!r} has no counterpart of this name in the float model"
    holder, index = _bias_place(node)
    if holder is None:
        return "it has no bias, and one more Add would cost time"
    bias = holder.inputs[index] if len(holder.inputs) > index else None
    if bias is None or bias.is_empty():
        return None
    values = _bias_constant(bias)
    if values is None:
        return "its bias is not constant"
    if values.size not in (1, _channels(node)):
        return f"its bias has shape {values.shape}, which is not one number a channel"
    if values.dtype not in (np.dtype(np.float32), np.dtype(np.int32)):
        return f"its bias is {values.dtype.name}; float32 or int32 was expected"
    if values is not bias and _is_offset(bias.inputs[0]):
        return "its bias has a zero point that is not 0"
    return None


def _is_offset(restorer: Node) -> bool:
    """Whether a DequantizeLinear has a zero point other than 0."""
    if len(restorer.inputs) < 3 or restorer.inputs[2].is_empty():
        return False
    zero_point = restorer.inputs[2]
    return not isinstance(zero_point, Constant) or bool(np.any(zero_point.values))


def _layer(node: Node, output: Variable, original: str) -> _Layer:
    return _Layer(
        where=node.where,
        made=str(node.outputs[0].name),
        output=str(output.name),
        original=original,
        channels=_channels(node),
        rank=len(_codes(node).shape) if node.op in ("Conv", "ConvTranspose") else None,
    )


def _codes(node: Node) -> Constant:
    """The integer weight of a layer."""
    codes: Constant = node.inputs[1].inputs[0].inputs[0]
    return codes


def _channels(node: Node) -> int:
    """How many output channels a layer has."""
    shape = _codes(node).shape
    if node.op == "Conv" or (node.op == "Gemm" and node.attr("transB", 0)):
        return shape[0]
    if node.op == "ConvTranspose":
        return shape[1] * int(node.attr("group", 1))
    return shape[-1]


def _bias_place(node: Node) -> tuple[Node | None, int]:
    """The node and the input that hold, or can hold, a layer's bias."""
    if node.op != "MatMul":
        return node, 2
    taker = node.outputs[0].outputs[0] if len(node.outputs[0].outputs) == 1 else None
    if taker is None or taker.op != "Add" or taker.domain or node.outputs[0] in node.graph.outputs:
        return None, 0
    for index, tensor in enumerate(taker.inputs):
        values = _bias_constant(tensor)
        if values is not None and len(values.shape) == 1:
            return taker, index
    return None, 0


def _bias_constant(bias: Variable | Constant) -> Constant | None:
    """The stored numbers of a bias: itself, or the codes behind its DequantizeLinear."""
    if isinstance(bias, Constant):
        return bias
    maker = bias.inputs[0] if bias.inputs else None
    if maker is not None and maker.op == "DequantizeLinear":
        codes = maker.inputs[0]
        return codes if isinstance(codes, Constant) else None
    return None


# ---------------- measurement


def _run(
    model: Model, reference: Session, layers: Sequence[_Layer], context: Context
) -> dict[str, Decision]:
    """Corrects all layers by one run over the samples."""
    with open_session(_with_feedback(model, layers), lean=True) as session:
        corrections = _average(reference, session, layers, context)
    nodes = {str(node.outputs[0].name): node for node in model.graph.nodes if node.outputs}
    decisions = {
        layer.output: _correct(model, layer, nodes[layer.made], corrections[layer.output])
        for layer in layers
    }
    model.remove_unused()
    return decisions


def _stronger(before: Decision | None, now: Decision) -> Decision:
    """What to say of a layer after one more run: that it was corrected, once it was."""
    return before if before is not None and before.taken else now


def _average(
    reference: Session, session: Session, layers: Sequence[_Layer], context: Context
) -> dict[str, Array]:
    """The correction of each layer, float64 (C,), by the name of its output."""
    samples = context.samples
    assert samples is not None  # `apply` saw to it
    means = {layer.output: _Mean(np.zeros(layer.channels)) for layer in layers}
    target_names = [spec.name for spec in session.inputs[-len(layers) :]]
    wanted = {spec.name for spec in session.inputs}
    feeds = context.progress.track(
        samples.feeds(reference.inputs), "Correcting biases", total=samples.feed_count
    )
    for feed in feeds:
        found = list(reference.run(feed).values())
        targets = dict(zip(target_names, found[::2], strict=True))
        sizes = [int(found[2 * i + 1]) for i in range(len(layers))]
        known = {name: array for name, array in feed.items() if name in wanted}
        results = session.run(known | targets).values()
        for layer, size, correction in zip(layers, sizes, results, strict=True):
            means[layer.output].update(correction, size // layer.channels)
    return {name: mean.value() for name, mean in means.items()}


def _with_means(model: Model, layers: Sequence[_Layer]) -> Model:
    """A copy whose outputs are, for each layer, its channel means (C,) and its size."""
    copy = model.copy()
    tensors = {str(t.name): t for node in copy.graph.nodes for t in node.outputs}
    outputs = []
    for layer in layers:
        tensor = tensors[layer.original]
        mean = _channel_means(copy, tensor, layer)
        size = copy.graph.add_node("Size", [tensor]).outputs[0]
        _declare(mean, TensorProto.FLOAT, [layer.channels])
        _declare(size, TensorProto.INT64, [])
        outputs += [mean, size]
    copy.graph.outputs = outputs
    copy.remove_unused()
    return copy


def _with_feedback(model: Model, layers: Sequence[_Layer]) -> Model:
    """A copy with an input for each layer's wanted mean and its correction as output."""
    copy = model.copy()
    graph = copy.graph
    tensors = {str(t.name): t for node in graph.nodes for t in node.outputs}
    outputs, inputs = [], []
    for index, layer in enumerate(layers):
        tensor = tensors[layer.output]
        takers = list(dict.fromkeys(tensor.outputs))
        target = Variable(graph.fresh_name(f"mean_{index}"))
        _declare(target, TensorProto.FLOAT, [layer.channels])
        mean = _channel_means(copy, tensor, layer)
        correction = graph.add_node("Sub", [target, mean]).outputs[0]
        _declare(correction, TensorProto.FLOAT, [layer.channels])
        inputs.append(target)
        outputs.append(correction)
        shift = _aligned(graph, correction, layer)
        corrected = graph.add_node("Add", [tensor, shift]).outputs[0]
        copy.replace_uses(tensor, corrected, only=takers)
    graph.inputs = [*graph.inputs, *inputs]
    graph.declared_inputs = [*graph.declared_inputs, *inputs]
    graph.outputs = outputs
    copy.remove_unused()
    return copy


def _channel_means(model: Model, tensor: Variable, layer: _Layer) -> Variable:
    """The mean over all axes but the channels', float32 (C,)."""
    graph, axes = model.graph, [0]
    if layer.rank is not None:
        axes = [axis for axis in range(layer.rank) if axis != 1]
    else:
        rows = graph.add_constant("rows", np.array([-1, layer.channels], np.int64))
        tensor = graph.add_node("Reshape", [tensor, rows]).outputs[0]
    return _reduced(model, "ReduceMean", tensor, axes)


def _reduced(model: Model, op: str, tensor: Variable, axes: list[int]) -> Variable:
    if model.opset < _REDUCE_AXES_OPSET:
        attrs: dict[str, Any] = {"axes": axes, "keepdims": 0}
        made = model.graph.add_node(op, [tensor], attrs=attrs)
    else:
        held = model.graph.add_constant("axes", np.array(axes, np.int64))
        made = model.graph.add_node(op, [tensor, held], attrs={"keepdims": 0})
    result: Variable = made.outputs[0]
    return result


def _aligned(graph: Graph, row: Variable, layer: _Layer) -> Variable:
    """A row (C,) shaped so that it broadcasts along the layer's channels."""
    if layer.rank is None:
        return row
    shape = np.array([1, layer.channels] + [1] * (layer.rank - 2), np.int64)
    held = graph.add_constant("aligned", shape)
    result: Variable = graph.add_node("Reshape", [row, held]).outputs[0]
    return result


def _declare(tensor: Variable, elem_type: int, shape: Sequence[int]) -> None:
    tensor.info = helper.make_tensor_value_info(tensor.name, elem_type, shape)
    tensor.dtype = helper.tensor_dtype_to_np_dtype(elem_type)


# ---------------- edits


def _correct(model: Model, layer: _Layer, node: Node, correction: Array) -> Decision:
    """Puts one correction into the bias of its layer."""
    if not np.isfinite(correction).all():
        reason = "its outputs hold NaN or infinity on the samples"
        return Decision(where=layer.where, taken=False, reason=reason)
    holder, index = _bias_place(node)
    assert holder is not None  # `_refusal` saw to it
    gain = float(node.attr("beta", 1.0)) if node.op == "Gemm" else 1.0
    if gain == 0:
        reason = "its bias is multiplied by beta = 0"
        return Decision(where=layer.where, taken=False, reason=reason)
    bias = holder.inputs[index] if len(holder.inputs) > index else None
    if bias is None or bias.is_empty():
        added = _new_bias(model.graph, node, correction / gain)
        while len(holder.inputs) <= index:
            holder.inputs.append(added)
        holder.inputs[index] = added
        moved = bool(np.any(correction))
    elif isinstance(bias, Constant):
        values = np.broadcast_to(bias.values.reshape(-1), (layer.channels,)) + correction / gain
        holder.inputs[index] = model.graph.add_constant(
            f"{bias.name}_corrected", values.astype(np.float32)
        )
        moved = not np.array_equal(holder.inputs[index].values, bias.values)
    else:
        moved = _shift_codes(bias.inputs[0], correction / gain, layer.channels)
    figures: Mapping[str, float] = {
        "mean_shift": float(np.sqrt(np.mean(correction**2))),
        "largest_shift": float(np.abs(correction).max(initial=0.0)),
    }
    if not moved:
        reason = "its mean error is less than a step of its bias"
        return Decision(where=layer.where, taken=False, reason=reason, figures=figures)
    reason = "its bias takes back the mean error of its channels"
    return Decision(where=layer.where, taken=True, reason=reason, figures=figures)


def _shift_codes(restorer: Node, shift: Array, channels: int) -> bool:
    """Moves the int32 codes of a bias, on their grid; whether any moved."""
    codes, scale = restorer.inputs[0], restorer.inputs[1].values.astype(np.float64)
    before = np.broadcast_to(codes.values.reshape(-1), (channels,)).astype(np.int64)
    limited = np.clip(before + np.rint(shift / scale), -_INT32_LIMIT, _INT32_LIMIT)
    after = limited.astype(np.int32)
    if np.array_equal(after, before):
        return False
    owner = codes.owner or restorer.graph
    restorer.inputs[0] = owner.add_constant(f"{codes.name}_corrected", after)
    return True


def _new_bias(graph: Graph, node: Node, values: Array) -> Variable | Constant:
    """A bias for a layer that has none: int32 where its data is quantized, else float32."""
    maker = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    hint = f"{node.outputs[0].name}_bias"
    if maker is None or maker.op != "DequantizeLinear":
        return graph.add_constant(hint, values.astype(np.float32))
    data_scale = np.asarray(maker.inputs[1].values, np.float32).reshape(())
    weight_scale = node.inputs[1].inputs[0].inputs[1].values.astype(np.float32)
    scale = np.asarray(data_scale * weight_scale, np.float32)
    codes = np.rint(values / np.maximum(scale.astype(np.float64), np.finfo(np.float32).tiny))
    limited = np.clip(codes, -_INT32_LIMIT, _INT32_LIMIT).astype(np.int32)
    inputs = [
        graph.add_constant(f"{hint}_quantized", limited),
        graph.add_constant(f"{hint}_scale", scale),
    ]
    attrs = {"axis": 0} if scale.ndim else {}
    outputs = [f"{hint}_dequantized"]
    made = graph.add_node("DequantizeLinear", inputs, outputs=outputs, attrs=attrs)
    result: Variable = made.outputs[0]
    return result
