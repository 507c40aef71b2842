"""`correct-bias`: takes the mean error of quantized layers out of their biases.

Rounding weights and clipping activations shifts the mean of a layer's output, channel by channel.
The shift is known from samples, and a bias takes it back at no cost at run time.

    b' = b + E[y] - E[y'],    y the float layer's output, y' the quantized one's

The layers behind must see corrected inputs (Nagel et al., section 4.2.1), else each takes back the
errors of all before it once more. The float model gives the channel means E[y] of all layers for
each feed; the quantized one takes them as inputs, and behind each layer adds E[y] - E[y'] of this
feed to y' itself, so that all layers behind see it. The corrections of all feeds, weighted by the
number of values, are averaged: one run over the data, whatever the number of layers. A feed's own
mean is not that of all feeds; a second run sees what the first one left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.layer_means import Layer, with_feedback, with_means
from onnxslim_passes.runtime import InputSpec, Session, open_session

Array = npt.NDArray[Any]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INT32_LIMIT = (1 << 31) - 1
# Feeds that means are taken from: 64 corrected no better than 32 on PP-OCR, at twice the time. The
# float model's means of each are kept, so that further runs need not ask it again.
_FEEDS = 32


@dataclass(frozen=True)
class _Wanted:
    """What the float model's layers make.

    Attributes:
        inputs: the float model's inputs.
        means: for each feed, the channel means of all layers, float32 (C,), and how many values of
            a channel each is the mean of.
    """

    inputs: tuple[InputSpec, ...]
    means: tuple[tuple[Sequence[Array], Sequence[int]], ...]


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
        wanted = _float_means(floating, layers, context)
        for _ in range(self.runs):
            moved = _run(model, wanted, layers, context)
            said = {where: _stronger(said.get(where), new) for where, new in moved.items()}
            if not any(decision.taken for decision in moved.values()):
                break
        decisions.extend(said.values())
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed=changed, decisions=tuple(decisions))


# ---------------- layers


def _find_layers(model: Model, floating: Model) -> tuple[list[Layer], list[Decision]]:
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


def _layer(node: Node, output: Variable, original: str) -> Layer:
    return Layer(
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


def _float_means(floating: Model, layers: Sequence[Layer], context: Context) -> _Wanted:
    """Runs the float model on the feeds."""
    samples = context.samples
    assert samples is not None  # `apply` saw to it
    found = []
    with open_session(with_means(floating, layers), lean=True) as session:
        feeds = samples.feeds(session.inputs, most=_FEEDS)
        for feed in context.progress.track(feeds, "Averaging layers", total=_count(samples)):
            values = list(session.run(feed).values())
            counts = [int(s) // n.channels for s, n in zip(values[1::2], layers, strict=True)]
            found.append((values[::2], counts))
        return _Wanted(session.inputs, tuple(found))


def _count(samples: Samples) -> int | None:
    """How many feeds are used, for progress."""
    return None if samples.feed_count is None else min(samples.feed_count, _FEEDS)


def _run(
    model: Model,
    wanted: _Wanted,
    layers: Sequence[Layer],
    context: Context,
) -> dict[str, Decision]:
    """Corrects all layers by one run over the feeds."""
    with open_session(with_feedback(model, layers), lean=True) as session:
        corrections = _average(wanted, session, layers, context)
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
    wanted: _Wanted,
    session: Session,
    layers: Sequence[Layer],
    context: Context,
) -> dict[str, Array]:
    """The correction of each layer, float64 (C,), by the name of its output."""
    samples = context.samples
    assert samples is not None  # `apply` saw to it
    means = {layer.output: _Mean(np.zeros(layer.channels)) for layer in layers}
    inputs, targets = session.inputs[: -len(layers)], session.inputs[-len(layers) :]
    feeds = context.progress.track(
        samples.feeds(wanted.inputs, most=_FEEDS), "Correcting biases", total=_count(samples)
    )
    for feed, (expected, counts) in zip(feeds, wanted.means, strict=True):
        known = {spec.name: feed[spec.name] for spec in inputs}
        aims = {spec.name: mean for spec, mean in zip(targets, expected, strict=True)}
        results = session.run(known | aims).values()
        for layer, count, correction in zip(layers, counts, results, strict=True):
            means[layer.output].update(correction, count)
    return {name: mean.value() for name, mean in means.items()}


# ---------------- edits


def _correct(model: Model, layer: Layer, node: Node, correction: Array) -> Decision:
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
