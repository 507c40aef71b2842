"""`quantize-static` in the bodies of If, Loop and Scan: each is a model of its own, fed as it runs.

Ranges of a body's activations come from the feeds that it gets while the whole model runs on the
samples. Inner bodies go before outer ones, whose copies take them along.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from onnxslim_passes.calibration.bodies import body_samples
from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Graph, Model, Node
from onnxslim_passes.model.bodies import bodies, body_model, put_back, twin
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.placement import Survey
from onnxslim_passes.passes.placement.operators import WEIGHT_OPERATORS

if TYPE_CHECKING:
    from onnxslim_passes.passes.quantize_static import QuantizeStatic

__all__ = ["StaticBodies", "parts"]


def _with_weights(model: Model) -> dict[Graph, list[Node]]:
    """The bodies in which there is something to decide, and the nodes that it is about."""
    layers = {
        use.node
        for weight in model.weights()
        for use in weight.uses
        if use.role in ("weight", "recurrent")
    }
    found = {
        body: [n for n in body.nodes if n in layers or (n.op in WEIGHT_OPERATORS and not n.domain)]
        for body in bodies(model)
    }
    return {body: nodes for body, nodes in found.items() if nodes}


def parts(model: Model) -> Iterator[Model]:
    """The model, and copies of its bodies that have nodes with weights, where types are known."""
    yield model
    for body in _with_weights(model):
        try:
            yield body_model(model, body)
        except UnsupportedModelError:
            continue  # `StaticBodies` says why


class StaticBodies:
    """The bodies of a model, to be quantized after its main graph.

    Args:
        model: before any edit.
        options: of the pass, none left open.
    """

    def __init__(self, model: Model, options: "QuantizeStatic") -> None:
        self._options = options
        found = _with_weights(model)
        self._floating = model.copy() if found else model
        self._labels = {
            twin(self._floating, model, body): [node.where for node in nodes]
            for body, nodes in found.items()
        }

    def quantize(self, model: Model, context: Context) -> list[PassResult]:
        """Quantizes them in place; a result for each.

        Raises:
            SamplesError: there are candidates but no samples.
        """
        inner_first = reversed(self._labels.items())
        return [self._quantize(model, *each, context) for each in inner_first][::-1]

    def _quantize(
        self, model: Model, floating: Graph, labels: list[str], context: Context
    ) -> PassResult:
        try:
            part = body_model(model, twin(model, self._floating, floating))
            found = self._options.survey(part)
            if not found.sites:
                return PassResult(changed=False, decisions=found.refusals)
            samples = self._options.samples_of(context)
            inner = body_samples(self._floating, floating, samples)
        except UnsupportedModelError as error:
            return _refused(labels, str(error))
        if inner is None:
            return _never_run(found)
        # To know what a body is fed, the model has to be run: a cache could not save that.
        within = replace(context, samples=inner, cache=None, reference=None, floating=None)
        result = self._options.quantize_sites(part, within)
        if result.changed:
            model.at_least_opset(part.opset)
            put_back(model, twin(model, self._floating, floating), part)
        return result


def _refused(labels: list[str], reason: str) -> PassResult:
    decisions = [Decision(where=label, taken=False, reason=reason) for label in labels]
    return PassResult(changed=False, decisions=tuple(decisions))


def _never_run(found: Survey) -> PassResult:
    reason = (
        "the samples never reach the body that it stands in, so that nothing is known of its "
        "activations; give samples that do"
    )
    decisions = [Decision(where=s.where, taken=False, reason=reason) for s in found.sites]
    return PassResult(changed=False, decisions=(*found.refusals, *decisions))
