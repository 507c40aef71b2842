"""`split-residuals`: residual sums stay apart from the LayerNormalization behind them.

ONNX Runtime fuses Add and LayerNormalization to SkipLayerNormalization, which on CPUs is slower
than the two kernels (`docs/passes/split-residuals.md` has figures). It looks for Add; Sum of two
tensors is the same number and is left alone.
"""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from onnxslim_passes.model import Constant, Model, Node, Types
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.placement import find_target

__all__ = ["SplitResiduals"]


@pass_options
class SplitResiduals(Pass):
    """Add in front of LayerNormalization becomes Sum, where the result is to run on a CPU."""

    name: ClassVar[str] = "split-residuals"
    # After passes that look for Add; it changes no value.
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = (
        "residual sums that the CPU would fuse into a slower LayerNormalization"
    )
    lossless: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Rewrites in all graphs; see `docs/passes/split-residuals.md`."""
        residuals = [node for node in model.nodes() if _is_residual(node)]
        if not residuals:
            return PassResult(changed=False)
        types = model.types()
        obstacle = ""
        if not find_target(context.target).runs_here:
            obstacle = f"target {context.target} has kernels of its own; this is for CPUs"
        decisions = tuple(_decide(node, types, obstacle) for node in residuals)
        return PassResult(any(decision.taken for decision in decisions), decisions)


def _is_residual(node: Node) -> bool:
    """Whether it adds two computed tensors for a LayerNormalization."""
    if node.op != "Add" or node.domain or any(isinstance(t, Constant) for t in node.inputs):
        return False
    takers: Iterable[Node] = node.outputs[0].outputs
    return any(taker.op == "LayerNormalization" and not taker.domain for taker in takers)


def _decide(node: Node, types: Types, obstacle: str) -> Decision:
    known = types.of(node.outputs[0])
    if not obstacle and (known is None or known.dtype != np.float32):
        obstacle = "only sums of float32 are fused on CPUs"
    if obstacle:
        return Decision(where=node.where, taken=False, reason=obstacle)
    node.op = "Sum"
    reason = "written as Sum, so that LayerNormalization keeps its own, faster kernel"
    return Decision(where=node.where, taken=True, reason=reason)
