"""ONNX's own one-operator models, as cases for the check of gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxslim_passes import runtime
from onnxslim_passes.errors import OnnxSlimError, RuntimeRefusedError
from onnxslim_passes.training.gradients import RULES, STOPS
from tests.roundtrip.cases import node_cases
from tests.training.gradients.checking import Comparison, Feed, compare

# Inputs that are floating-point but not differentiated: settings, not data.
SETTINGS: Mapping[str, frozenset[int]] = {
    "CastLike": frozenset((1,)),
    "Dropout": frozenset((1,)),
    "OneHot": frozenset((1,)),
    "Range": frozenset((0, 1, 2)),
    "Resize": frozenset((1, 2)),
}
# Operators that are only defined on part of the numbers; data moves into it.
DOMAINS: Mapping[str, tuple[float, float]] = {
    "Acos": (-0.95, 0.95),
    "Acosh": (1.1, 100),
    "Asin": (-0.95, 0.95),
    "Atanh": (-0.95, 0.95),
    "Tan": (-1.3, 1.3),
}
# Outputs behind the first have no gradient: statistics, and state of the runtime.
ONE_OUTPUT = frozenset(("BatchNormalization",))
# The gradient that they are given is by intention not that of finite differences.
STRAIGHT_THROUGH = frozenset(("DynamicQuantizeLinear", "QuantizeLinear", "Round"))
NOISE = 0.05


@dataclass(frozen=True)
class GradientCase:
    """One model of one operator.

    Attributes:
        name: as ONNX calls it.
        operator: what it is of.
        model: the model.
        feed: inputs, moved a little so that no two are equal and none on a corner.
        wrt: the inputs that are differentiated.
        outputs: how many of the outputs make the loss; all if None.
    """

    name: str
    operator: str
    model: onnx.ModelProto
    feed: Feed
    wrt: tuple[str, ...]
    outputs: int | None

    def runs(self) -> bool:
        """Whether ONNX Runtime can run it at all."""
        try:
            with runtime.open_session(self.model, optimize="none") as session:
                session.run(self.feed)
        except RuntimeRefusedError:
            return False
        return True

    def compare(self) -> Comparison:
        """Gradient and finite differences."""
        return compare(self.model, self.feed, self.wrt, outputs=self.outputs)

    def verdict(self) -> str:
        """Empty if the gradient is right, else why not."""
        try:
            found = self.compare()
        except OnnxSlimError as error:
            return str(error)
        return "" if found.holds else f"relative error {found.error:.1e}"


@functools.cache
def gradient_cases() -> tuple[GradientCase, ...]:
    """The node tests of ONNX with floating-point inputs and outputs that have a derivative."""
    found = []
    for case in node_cases():
        model = case.model()
        if "expanded" in case.name or len(model.graph.node) != 1:
            continue
        node = model.graph.node[0]
        untested = node.op_type in STOPS or node.op_type in STRAIGHT_THROUGH
        if node.domain not in ("", "ai.onnx") or untested or "training_dropout" in case.name:
            continue
        made = _case(case.name, model, node, case.feeds(model, None))
        if made is not None:
            found.append(made)
    return tuple(found)


def _case(
    name: str, model: onnx.ModelProto, node: onnx.NodeProto, feeds: list[Feed]
) -> GradientCase | None:
    if not feeds or not all(isinstance(value, np.ndarray) for value in feeds[0].values()):
        return None
    settings = SETTINGS.get(node.op_type, frozenset())
    place = {given: index for index, given in reversed(list(enumerate(node.input)))}
    wrt = tuple(
        given
        for given, value in feeds[0].items()
        if value.dtype in (np.float32, np.float64)
        and place.get(given, -1) not in settings
        and not (node.op_type == "Attention" and np.isinf(value).any())  # a mask
    )
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    if any(feeds[0][given].size == 0 for given in wrt):
        return None
    if not wrt or all(o.type.tensor_type.elem_type not in kinds for o in model.graph.output):
        return None
    generator = np.random.default_rng(0)
    feed = {
        given: _moved(value, generator, node.op_type) if given in wrt else value
        for given, value in feeds[0].items()
    }
    outputs = 1 if node.op_type in ONE_OUTPUT else None
    return GradientCase(name, node.op_type, model, feed, wrt, outputs)


def _moved(value: np.ndarray, generator: np.random.Generator, operator: str) -> np.ndarray:
    finite = np.where(np.isfinite(value), value, 0.5)
    factor = 1 + NOISE * generator.uniform(0.2, 1, value.shape)
    shift = NOISE * generator.uniform(0.2, 1, value.shape)
    moved = finite * factor + shift
    if operator in DOMAINS:
        moved = np.clip(moved, *DOMAINS[operator])
    return np.asarray(moved, value.dtype)


# Operators whose gradients are promised: all with a rule, and some that ONNX defines by others.
LISTED = frozenset(RULES) - STRAIGHT_THROUGH | {
    "Attention",
    "CenterCropPad",
    "GroupNormalization",
    "MeanVarianceNormalization",
    "NegativeLogLikelihoodLoss",
    "RotaryEmbedding",
    "Shrink",
    "SoftmaxCrossEntropyLoss",
}
