"""What ONNX Runtime made of the Q/DQ pairs: which were fused, and which stayed.

Node names of Q/DQ and names of initializers survive the runtime's optimizations, so that what is
left can be found by name in its optimized graph.
"""

import re
from collections.abc import Iterable

import onnx

from onnxslim_passes.passes.placement.insertion import Inserted
from onnxslim_passes.passes.placement.sites import Site
from onnxslim_passes.report.records import Decision

_MADE_UP = re.compile(r"_token_\d+$")
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def unfused_sites(optimized: onnx.GraphProto, inserted: Inserted) -> list[Site]:
    """The sites that still run in float although they were given integers.

    A site is unfused if the QuantizeLinear behind it is still there, or if its weight is still
    dequantized.
    """
    left = {node.name for node in optimized.node if node.op_type == "QuantizeLinear"}
    sites = [site for name, site in inserted.makers.items() if name in left]
    takers: dict[str, list[str]] = {}
    for node in optimized.node:
        for name in node.input:
            takers.setdefault(name, []).append(node.op_type)
    for name, users in inserted.weights.items():
        dequantized = takers.get(name, []).count("DequantizeLinear")
        if dequantized:
            # With several users some may be fused; without a way to tell, all are given up.
            sites.extend(users)
    return list(dict.fromkeys(sites))


def border_decisions(optimized: onnx.GraphProto) -> list[Decision]:
    """One decision for each conversion of an activation that the runtime still executes."""
    makers = {name: node for node in optimized.node for name in node.output}
    takers: dict[str, list[onnx.NodeProto]] = {}
    for node in optimized.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in optimized.initializer}
    decisions = []
    for node in optimized.node:
        if node.op_type in _CONVERSIONS and node.input[0] not in constants:
            maker = makers.get(node.input[0])
            behind = takers.get(node.output[0], [])
            decisions.append(
                Decision(where=node.name, taken=True, reason=_border(node, maker, behind))
            )
    return decisions


def _border(
    node: onnx.NodeProto, maker: onnx.NodeProto | None, behind: Iterable[onnx.NodeProto]
) -> str:
    start = _called(maker) if maker is not None else "an input of the model"
    end = ", ".join(sorted(_called(taker) for taker in behind)) or "the model's output"
    return f"{node.op_type} stays, at the border from {start} to {end}"


def _called(node: onnx.NodeProto) -> str:
    """The node, without the number in a name of the runtime, which differs from run to run."""
    return f"{node.op_type} {_MADE_UP.sub('', node.name)!r}"
