"""Removes neurons and channels that pruning left without input or without output.

For a layer y = W * x + b, whose output channel o goes through activations, normalizations and
poolings to the layers behind:

- If all weights behind that take o are zero, nothing depends on it: it goes.
- If all weights W[o] are zero, y[o] = b[o] whatever the input. So is what an activation f makes of
  it, v = f(b[o]); a layer behind with weights V takes ``sum over k of V[p, o, k] v`` into its bias
  b[p], and o goes. A convolution that pads does not see v at its edges but zeros: there o can go
  only if v = 0.

Both spread: a channel that only dead channels take is dead, and one that takes nothing but
constants is a constant. Residual sums, concatenations, shared weights and flattened maps tie
channels together; these go together or stay.

Outputs are those of the model before, but for the rounding of the sums that went into biases (and
where a zero weight had met an infinity).
"""

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.channels import (
    Layer,
    Trace,
    constant_channels,
    cut_channels,
    fold_into_bias,
    trace_channels,
)
from onnxslim_passes.passes.channels.constants import Values

__all__ = ["RemoveDeadChannels"]

Flags = npt.NDArray[np.bool_]


@pass_options
class RemoveDeadChannels(Pass):
    """Channels without input or output go; tensors shrink, outputs stay."""

    name: ClassVar[str] = "remove-dead-channels"
    stage: ClassVar[Stage] = Stage.PRUNE
    summary: ClassVar[str] = "channels that pruning left without input or output are removed"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Pool, Tran and Dally 2015, Learning both Weights and Connections for Efficient "
        "Neural Networks, section 3.5, arXiv:1506.02626",
    )
    lossless: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Removes them; a decision for every layer."""
        trace = trace_channels(model)
        search = _Search(trace)
        search.run()
        decisions = tuple(search.decisions())
        if not any(decision.taken for decision in decisions):
            return PassResult(False, decisions)
        shifts = {layer: search.shift(layer) for layer in trace.layers}
        cut_channels(trace, search.live)
        for layer, shift in shifts.items():
            if shift is not None:
                fold_into_bias(layer, shift)
        return PassResult(True, decisions)


class _Search:
    """Which channels are dead.

    Attributes:
        live: by root of a label, whether the channel stays.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._values = constant_channels(trace)
        self._pinned = trace.labels.pinned()
        self._inputs = {layer: trace.labels.roots(layer.inputs) for layer in trace.layers}
        self._outputs = {layer: trace.labels.roots(layer.outputs) for layer in trace.layers}
        self._takes = {layer: self._taken(layer) for layer in trace.layers}
        self.live: Flags = np.zeros(trace.labels.count, np.bool_)

    def run(self) -> None:
        """Finds the channels that something depends on, from the outputs of the model back."""
        self.live[list(self._pinned)] = True
        groups = [np.unique(group) for group in self._trace.labels.groups() if group.size]
        while True:
            self._spread()
            emptied = [group[0] for group in groups if not self.live[group].any()]
            if not emptied:
                return
            # No operator works without any channel: the first one stays as it is.
            self.live[emptied[0]] = True

    def _spread(self) -> None:
        """Lets everything live whose value a live channel of a layer takes."""
        changed = True
        while changed:
            changed = False
            for layer in reversed(self._trace.layers):
                taken = self._takes[layer][self.live[self._outputs[layer]]].any(axis=0)
                roots = self._inputs[layer][taken]
                if not self.live[roots].all():
                    self.live[roots] = True
                    changed = True

    def _taken(self, layer: Layer) -> Flags:
        """Which input channels each output channel depends on, (O, I): constants excepted."""
        used: Flags = (layer.matrix() != 0).any(axis=2)
        return used & ~self._foldable(layer)

    def _foldable(self, layer: Layer) -> Flags:
        """Which input channels are constants that the bias can take over, shape (I,)."""
        values = self._constants(layer)
        return np.isfinite(values) if layer.shows_constants else values == 0

    def _constants(self, layer: Layer) -> Values:
        return self._values.get(layer.node.inputs[0], np.full(layer.inputs.size, np.nan))

    def shift(self, layer: Layer) -> npt.NDArray[np.float64] | None:
        """What the channels that go add to the outputs that stay; None if nothing."""
        values = self._constants(layer)
        gone = ~self.live[self._inputs[layer]] & (np.nan_to_num(values) != 0)
        if not gone.any():
            return None
        stays = self.live[self._outputs[layer]]
        kernels = layer.matrix()[stays][:, gone].sum(axis=2, dtype=np.float64)
        shift: npt.NDArray[np.float64] = layer.factor * (kernels @ values[gone])
        return shift if shift.any() else None

    # ---- the account

    def decisions(self) -> Iterator[Decision]:
        """One for each layer, those that are not traced included."""
        for node in self._trace.order:
            if node in self._trace.untraced:
                reason = f"{self._trace.untraced[node]}: its channels stay"
                yield Decision(where=node.where, taken=False, reason=reason)
        for layer in self._trace.layers:
            yield self._decision(layer)

    def _decision(self, layer: Layer) -> Decision:
        stays = self.live[self._outputs[layer]]
        silent = ~(layer.matrix() != 0).any(axis=(1, 2))
        figures: dict[str, int | float | str] = {
            "channels": int(stays.size),
            "removed": int((~stays).sum()),
        }
        if not stays.all():
            figures["without_input"] = int((silent & ~stays).sum())
            reason = f"{figures['removed']} of {stays.size} channels have no effect and went"
        elif not silent.any():
            reason = f"all {stays.size} channels have an effect"
        else:
            figures["without_input"] = int(silent.sum())
            reason = f"{silent.sum()} channels without input stay: {self._why(layer, silent)}"
        return Decision(
            where=layer.node.where, taken=not stays.all(), reason=reason, figures=figures
        )

    def _why(self, layer: Layer, silent: Flags) -> str:
        """The commonest reason why channels without input stay."""
        roots = self._outputs[layer][silent].tolist()
        pins = Counter(self._pinned[root] for root in roots if root in self._pinned)
        if pins:
            return pins.most_common(1)[0][0]
        return (
            "tied to channels that have one, padded by a convolution behind, or the last of a layer"
        )
