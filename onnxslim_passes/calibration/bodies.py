"""What bodies of If, Loop and Scan are fed while their model runs.

The runtime does not show what happens in a body. But the graph around it can be asked for what its
control-flow node takes and for what the body captures; a feed of the body follows by the rules of
the operator: an If takes one of two bodies, a Loop and a Scan run theirs once a step on what the
step before left. So bodies have samples as models have, nested ones too, and all that reads samples
works on them. Nothing is held but the feed at hand; each level of nesting costs one more run of the
graphs around it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxslim_passes.calibration.samples import Feed, Samples
from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Constant, Graph, Model, Node
from onnxslim_passes.model.bodies import body_model, captured, holder
from onnxslim_passes.runtime import InputSpec, Session, open_session

__all__ = ["body_samples"]

Values = Mapping[str, Any]

_SCAN_OPSET = 9  # before, a Scan had a batch axis and lengths
_BRANCHES = {"then_branch": True, "else_branch": False}


def body_samples(model: Model, body: Graph, samples: Samples) -> Samples | None:
    """The feeds of a body while its model runs on samples; None if it never runs.

    Args:
        model: must stay as it is while the feeds are read.
        body: of `model`, at any depth, but not of a function.
        samples: of `model`.

    Returns:
        Feeds of `body_model(model, body)`, one for each time that the body runs.

    Raises:
        UnsupportedModelError: the body hangs on another operator than If, Loop and Scan, or a type
            is not known.
        RuntimeRefusedError: the model does not run on the samples.
    """
    levels: list[_Level] = []
    graph: Graph = body
    while graph is not model.graph:
        levels.insert(0, _Level(model, graph))
        graph = levels[0].node.graph

    def feeds() -> Iterator[Feed]:
        for feed in samples.feeds(levels[0].inputs):
            yield from _descend(levels, feed)

    if next(feeds(), None) is None:
        return None
    return Samples.from_feeds(feeds, name=f"{samples.name}, in {body.path}", trusted=True)


def _descend(levels: "Sequence[_Level]", feed: Feed) -> Iterator[Feed]:
    """The feeds of the last level's body, from one of the first level's graph."""
    for inner in levels[0].feeds(feed):
        if len(levels) == 1:
            yield inner
        else:
            yield from _descend(levels[1:], inner)


class _Level:
    """A control-flow node with one of its bodies.

    Attributes:
        node: the node.
        inputs: what the graph around it is fed.
    """

    def __init__(self, model: Model, body: Graph) -> None:
        self.node, key = holder(model, body)
        self._drive = _driver(self.node, key)
        inner = [tensor for tensor in captured(body) if not isinstance(tensor, Constant)]
        taken = [tensor for tensor in self.node.inputs if not tensor.is_empty()]
        self._constants = {t.name: t.values for t in taken if isinstance(t, Constant)}
        self._captured = [str(tensor.name) for tensor in inner]
        outer = self.node.graph
        around = model.copy() if outer is model.graph else body_model(model, outer)
        variables = [t.name for t in (*inner, *taken) if t.name not in self._constants]
        self._around = _session_of(around, variables)
        self.inputs = self._around.inputs
        self._inside = open_session(body_model(model, body), lean=True)

    def feeds(self, feed: Feed) -> Iterator[Feed]:
        """The feeds of the body in one run of the graph around it."""
        values = {**self._constants, **feed, **self._around.run(feed)}
        given = [values.get(tensor.name) for tensor in self.node.inputs]
        shared = {name: values[name] for name in self._captured}
        yield from self._drive(self.node, given, shared, self._inside)


def _session_of(around: Model, names: Sequence[str]) -> Session:
    """A session that makes some tensors of the main graph, those left out that are inputs."""
    made = {t.name: t for node in around.graph.nodes for t in node.outputs}
    around.graph.outputs = [made[name] for name in dict.fromkeys(names) if name in made]
    if not around.graph.outputs:  # the runtime wants one
        nothing = around.graph.add_constant("nothing", np.zeros(1, np.int64))
        around.graph.outputs = list(around.graph.add_node("Identity", [nothing]).outputs)
    around.remove_unused()
    return open_session(around, lean=True)


Driver = Callable[[Node, list[Any], Values, Session], Iterator[Feed]]


def _driver(node: Node, key: str) -> Driver:
    """How the operator of a node feeds its body."""
    if node.op == "If" and not node.domain:
        wanted = _BRANCHES[key]

        def branch(_: Node, given: list[Any], shared: Values, __: Session) -> Iterator[Feed]:
            if bool(np.reshape(given[0], -1)[0]) == wanted:
                yield dict(shared)

        return branch
    if node.op == "Loop" and not node.domain:
        return _loop
    if node.op == "Scan" and not node.domain and node.graph.opset >= _SCAN_OPSET:
        return _scan
    raise UnsupportedModelError(
        f"{node.where}: bodies of {node.op} of opset {node.graph.opset} are not calibrated."
    )


def _loop(_: Node, given: list[Any], shared: Values, body: Session) -> Iterator[Feed]:
    """`given`: the number of steps or None, whether to start or None, the state."""
    steps, going, *state = given
    count, most = 0, None if steps is None else int(np.reshape(steps, -1)[0])
    condition = np.asarray(True if going is None else going)
    own = _own(body, shared)
    while (most is None or count < most) and bool(condition.reshape(-1)[0]):
        step = np.full(_ones(own[0]), count, np.int64)
        start = np.full(_ones(own[1]), True)
        values = zip(own, [step, start, *state], strict=True)
        feed = {spec.name: value for spec, value in values} | dict(shared)
        yield feed
        condition, *left = body.run(feed).values()
        state = left[: len(state)]
        count += 1


def _scan(node: Node, given: list[Any], shared: Values, body: Session) -> Iterator[Feed]:
    """`given`: the state, then what is scanned, a slice a step."""
    number = int(node.attr("num_scan_inputs"))
    state, scanned = given[: len(given) - number], given[len(given) - number :]
    axes = node.attr("scan_input_axes") or [0] * number
    backwards = node.attr("scan_input_directions") or [0] * number
    own = _own(body, shared)
    for step in range(np.shape(scanned[0])[axes[0]]):
        slices = [
            np.take(whole, -1 - step if back else step, axis)
            for whole, axis, back in zip(scanned, axes, backwards, strict=True)
        ]
        values = zip(own, [*state, *slices], strict=True)
        feed = {spec.name: value for spec, value in values} | dict(shared)
        yield feed
        state = list(body.run(feed).values())[: len(state)]


def _ones(spec: InputSpec) -> tuple[int, ...]:
    """The shape of a number that a body takes as a scalar or as a list of one."""
    return (1,) * len(spec.shape)


def _own(body: Session, shared: Values) -> list[InputSpec]:
    """The inputs that a body has by itself, in order."""
    return [spec for spec in body.inputs if spec.name not in shared]
