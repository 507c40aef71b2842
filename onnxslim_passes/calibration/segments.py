"""The values of inner tensors, feed by feed, without holding those of a whole feed at once.

`stream_values` yields chosen tensors of one feed together, for callers that compare them.
`visit_values` shows each tensor by itself: it cuts the model into segments that run one after the
other, hands over what a segment made and releases it before the next one runs. Both run the model
once a feed; memory grows with the size of a feed, never with their number.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import onnx
from onnx import TensorProto, helper

from onnxslim_passes.calibration.ranges import Progress
from onnxslim_passes.calibration.samples import Feed, Samples
from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Graph, Model, Types, Variable
from onnxslim_passes.runtime import Array, Session, open_session

Visit = Callable[[str, Array, Feed], None]

_SEGMENT_BYTES = 32 << 20  # of chosen tensors in one segment
_NOTHING = "calibration_nothing"


def main_tensors(graph: Graph) -> dict[str, Variable]:
    """The inputs and the node outputs of a graph, without its bodies, by name."""
    made = [t for node in graph.nodes for t in node.outputs if not t.is_empty()]
    return {t.name: t for t in (*graph.inputs, *made) if isinstance(t, Variable)}


def measurable(model: Model, tensors: Iterable[Variable], types: Types) -> dict[str, Variable]:
    """The tensors by name, each once.

    Raises:
        UnsupportedModelError: A tensor is in a body or a function, or holds no real numbers.
    """
    here = main_tensors(model.graph)
    chosen: dict[str, Variable] = {}
    for name in (str(tensor.name) for tensor in tensors):
        if name not in here:
            raise UnsupportedModelError(
                f"Tensor {name!r} cannot be measured: it is not in the main graph."
            )
        chosen[name] = here[name]
        known = types.of(here[name])
        elem_type = int(known.elem_type) if known is not None else 0
        if elem_type in (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            raise UnsupportedModelError(
                f"Tensor {name!r} cannot be measured: it holds "
                f"{helper.tensor_dtype_to_string(elem_type).removeprefix('TensorProto.').lower()}."
            )
    return chosen


def stream_values(
    model: Model,
    tensors: Sequence[Variable],
    samples: Samples,
    *,
    progress: Progress | None = None,
) -> Iterator[dict[str, Array]]:
    """Yields the values of the tensors, by name, once a feed.

    Args:
        model: Stays as it is.
        tensors: Numeric tensors of the main graph, graph inputs included.
        samples: The data.
        progress: Is shown the feeds.

    Raises:
        SamplesError: The data does not fit the model.
        RuntimeRefusedError: The model does not run on the data.
        UnsupportedModelError: A tensor is in a body, or holds no numbers.
    """
    plan = _Plan(model, tensors)
    with open_session(plan.segment(0, len(plan.nodes)), lean=True) as session:
        for feed in shown(samples.feeds(session.inputs), samples, progress):
            yield {**plan.fed(feed), **_run(session, feed)}


def visit_values(
    model: Model,
    tensors: Sequence[Variable],
    samples: Samples,
    visit: Visit,
    *,
    progress: Progress | None = None,
    most: int | None = None,
) -> None:
    """Calls ``visit(name, values, feed)`` for each tensor and feed; `values` must not be kept.

    Arguments and errors as for `stream_values`; `most` feeds at most, evenly spread.
    """
    plan = _Plan(model, tensors)
    segments: list[_Segment] = []
    session = open_session(plan.segment(0, len(plan.nodes), values=False), lean=True)
    for feed in shown(samples.feeds(session.inputs, most=most), samples, progress):
        if not segments:
            segments = plan.cut(_run(session, feed))
            session.close()
        for name, values in plan.fed(feed).items():
            visit(name, values, feed)
        live: dict[str, Any] = dict(feed)
        for segment in segments:
            live.update(segment.run(live))
            for name in segment.chosen:
                visit(name, live[name], feed)
            for name in segment.released:
                del live[name]


def _run(session: Session, feed: Mapping[str, Any]) -> dict[str, Any]:
    """All outputs of a session but the one that stands for none."""
    values = session.run(feed)
    values.pop(_NOTHING, None)
    return values


def shown(feeds: Iterable[Feed], samples: Samples, progress: Progress | None) -> Iterable[Feed]:
    """The feeds, shown to `progress` as they are taken."""
    if progress is None:
        return feeds
    return progress.track(feeds, "Calibrating", total=samples.feed_count)


@dataclass(frozen=True)
class _Segment:
    """A stretch of the model's nodes.

    Attributes:
        session: Runs it.
        chosen: The tensors it makes that are to be visited.
        released: The tensors that nobody needs after it.
    """

    session: Session
    chosen: tuple[str, ...]
    released: tuple[str, ...]

    def run(self, live: Mapping[str, Any]) -> dict[str, Any]:
        """Its outputs, from the tensors made so far and the graph's inputs."""
        return self.session.run({spec.name: live[spec.name] for spec in self.session.inputs})


class _Plan:
    """The nodes needed for the chosen tensors, in order, and where they may be cut.

    Attributes:
        nodes: The nodes, without Constant nodes, which go with whoever needs them.
    """

    def __init__(self, model: Model, tensors: Sequence[Variable]) -> None:
        types = model.types()
        self._chosen = list(measurable(model, tensors, types))
        self._types = {
            name: known.elem_type
            for name, tensor in main_tensors(model.graph).items()
            if (known := types.of(tensor)) is not None and known.elem_type
        }
        self._proto = model.to_proto(dense=True)
        graph = self._proto.graph
        self._initializers = {t.name: t for t in graph.initializer}
        self._inputs = [i for i in graph.input if i.name not in self._initializers]
        fixed = [n for n in graph.node if n.op_type == "Constant" and not n.domain]
        self._fixed = {name: node for node in fixed for name in node.output}
        self.nodes: list[onnx.NodeProto] = _needed(graph, self._chosen, self._fixed)
        self._used = [_names_used(node) for node in self.nodes]
        self._maker = {n: i for i, node in enumerate(self.nodes) for n in node.output if n}
        self._last_use: dict[str, int] = {}
        for index, names in enumerate(self._used):
            self._last_use.update(dict.fromkeys(names, index))

    def fed(self, feed: Feed) -> dict[str, Array]:
        """The chosen graph inputs."""
        return {name: feed[name] for name in self._chosen if name in feed}

    def cut(self, shapes: Mapping[str, Array]) -> list[_Segment]:
        """Opens the segments.

        Args:
            shapes: The shape of each chosen tensor in one feed.
        """
        sizes = dict.fromkeys(self._chosen, 0.0)
        for name, shape in zip(self._made_in(0, len(self.nodes)), shapes.values(), strict=True):
            sizes[name] = 4.0 * float(shape.astype(float).prod())
        bounds, held = [0], 0.0
        for index, node in enumerate(self.nodes):
            made = sum(sizes.get(name, 0.0) for name in node.output)
            if held and held + made > _SEGMENT_BYTES and self._may_cut(index):
                bounds.append(index)
                held = 0.0
            held += made
        bounds.append(len(self.nodes))
        return [self._open(a, b) for a, b in pairwise(bounds) if a < b]

    def _open(self, first: int, last: int) -> _Segment:
        made = [n for node in self.nodes[first:last] for n in node.output]
        passed_on = {n for n in made if self._last_use.get(n, -1) >= last}
        chosen = self._made_in(first, last)
        earlier = {n for names in self._used[first:last] for n in names}
        inputs = {n for n in earlier if self._maker.get(n, last) < first}
        released = {n for n in inputs if self._last_use[n] < last} | (set(chosen) - passed_on)
        session = open_session(self.segment(first, last), lean=True)
        return _Segment(session, tuple(chosen), tuple(released))

    def _made_in(self, first: int, last: int) -> list[str]:
        """The chosen tensors that nodes first to last - 1 make."""
        return [n for n in self._chosen if first <= self._maker.get(n, -1) < last]

    def _may_cut(self, index: int) -> bool:
        """Whether all that passes from before node `index` to it and behind are typed tensors."""
        return all(
            name in self._types
            for name, maker in self._maker.items()
            if maker < index <= self._last_use.get(name, -1)
        )

    def segment(self, first: int, last: int, *, values: bool = True) -> onnx.ModelProto:
        """Nodes first to last - 1 as a model of their own.

        Its inputs are the graph's inputs and what earlier nodes made; its outputs are the chosen
        tensors and what later nodes need. Without `values`, the shapes of the chosen tensors alone.
        """
        nodes = self.nodes[first:last]
        used = {n for names in self._used[first:last] for n in names}
        made = {n for node in nodes for n in node.output if n}
        entering = [n for n in self._maker if n in used and n not in made]
        leaving = [n for n in made if self._last_use.get(n, -1) >= last]
        outputs = list(dict.fromkeys((*self._made_in(first, last), *sorted(leaving))))
        model = onnx.ModelProto()
        model.ir_version = self._proto.ir_version
        model.opset_import.extend(self._proto.opset_import)
        model.functions.extend(self._proto.functions)
        graph = model.graph
        graph.name = "segment"
        graph.node.extend(self._fixed[n] for n in self._fixed if n in used)
        graph.node.extend(nodes)
        graph.initializer.extend(t for n, t in self._initializers.items() if n in used)
        graph.input.extend(self._inputs)
        graph.input.extend(self._info(name) for name in entering)
        if values:
            graph.output.extend(self._info(name) for name in outputs)
        else:
            _add_shapes(graph, outputs)
        if not graph.output:  # graph inputs alone are chosen; the runtime wants an output
            graph.node.append(helper.make_node("Constant", [], [_NOTHING], value=_nothing()))
            graph.output.append(helper.make_tensor_value_info(_NOTHING, TensorProto.INT64, [1]))
        return model

    def _info(self, name: str) -> onnx.ValueInfoProto:
        """A declaration without shape: a declared one may be wrong, the runtime finds its own."""
        if name not in self._types:
            return onnx.ValueInfoProto(name=name)
        return helper.make_tensor_value_info(name, self._types[name], None)


def _nothing() -> onnx.TensorProto:
    return helper.make_tensor(_NOTHING, TensorProto.INT64, [1], [0])


def _add_shapes(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Makes the shapes of some tensors the outputs."""
    for number, name in enumerate(names):
        output = f"calibration_shape_{number}"
        graph.node.append(helper.make_node("Shape", [name], [output]))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.INT64, [None]))


def _needed(
    graph: onnx.GraphProto, chosen: Iterable[str], fixed: Mapping[str, Any]
) -> list[onnx.NodeProto]:
    """The nodes that lead to the chosen tensors, in the order of the graph, which is sorted."""
    wanted = set(chosen)
    kept = []
    for node in reversed(graph.node):
        if node.output and node.output[0] in fixed and node.op_type == "Constant":
            continue
        if wanted.intersection(node.output):
            kept.append(node)
            wanted |= _names_used(node)
    return kept[::-1]


def _names_used(node: onnx.NodeProto) -> set[str]:
    """What a node and its bodies take, names of the bodies' own tensors among them."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                names |= _names_used(inner)
            names |= {output.name for output in body.output}
    return names
