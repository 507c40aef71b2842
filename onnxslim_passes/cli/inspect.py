"""`inspect`: what is in a model, and what each pass could do to it. Needs no data and runs nothing.

One dictionary holds everything; ``--json`` prints it, and the view for a person is made from it.
"""

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.text import Text

from onnxslim_passes.cli.common import JsonFlag, ModelPath, TargetName
from onnxslim_passes.cli.potential import potentials
from onnxslim_passes.model import Constant, Model, Variable, Weight, load
from onnxslim_passes.model.ir import dimension_value
from onnxslim_passes.model.payload import ExternalPayload
from onnxslim_passes.passes.placement import check_target, find_target
from onnxslim_passes.report.manifest import MANIFEST_KEY
from onnxslim_passes.report.terminal import pairs, print_json, result_console, section, table
from onnxslim_passes.report.wording import bytes_text, count_text

__all__ = ["inspect"]

# Above this, counting distinct values would take longer than a person likes to wait.
DISTINCT_ELEMENTS = 1 << 20
SHOWN_DISTINCT = 256


def inspect(
    model: ModelPath,
    /,
    *,
    target: Annotated[
        TargetName | None,
        Parameter(help="List what is not as this target's documentation wants it."),
    ] = None,
    top: Annotated[int, Parameter(help="Weights to list, the largest first; 0 lists all.")] = 12,
    json: JsonFlag = False,
) -> None:
    """What is in a model, and what each pass could do to it."""
    loaded = load(model)
    data = describe(loaded, model)
    if target is not None:
        data["target"] = _target_row(loaded, target)
    if json:
        print_json(data)
    else:
        result_console().print(_view(data, top))


def describe(model: Model, path: Path) -> dict[str, Any]:
    """Everything `inspect` knows, as plain data."""
    weights = sorted(model.weights(), key=lambda weight: (-weight.nbytes, weight.name))
    rows = [_weight_row(weight) for weight in weights]
    header = _header(model)
    return {
        "model": str(path),
        "bytes": path.stat().st_size + header["external_bytes"],
        **header,
        "inputs": [_tensor_row(tensor, tensor.info) for tensor in model.graph.inputs],
        "outputs": [
            _tensor_row(tensor, model.graph.output_infos.get(tensor.name, tensor.info))
            for tensor in model.graph.outputs
        ],
        "operators": _operators(model),
        "quantization": _quantization(model),
        "parameters": sum(row["elements"] for row in rows),
        "nonzero_parameters": sum(row["nonzero"] for row in rows),
        "roles": _roles(model, rows),
        "weights": rows,
        "passes": [potential.to_dict() for potential in potentials(model)],
    }


def _target_row(model: Model, name: str) -> dict[str, Any]:
    """What a target wants otherwise, and what its documentation does not say."""
    target = find_target(name)
    return {
        "name": name,
        "title": target.title,
        "runs_here": target.runs_here,
        "unknown": list(target.unknown),
        "violations": [violation.to_dict() for violation in check_target(model, name)],
    }


def _header(model: Model) -> dict[str, Any]:
    proto = model.proto
    external = [item for item in model.constants() if isinstance(item.payload, ExternalPayload)]
    return {
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "ir_version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in model.opsets.items()},
        "functions": len(model.functions),
        "bodies": sum(1 for graph in model.graphs() if graph.parent is not None),
        "external_bytes": sum(item.nbytes for item in external),
        "metadata": sorted(model.metadata),
        "compressed_by_us": MANIFEST_KEY in model.metadata,
    }


def _tensor_row(tensor: Variable | Constant, info: onnx.ValueInfoProto | None) -> dict[str, str]:
    """Name and type of an input or output; sizes by name or number, ``?`` where open."""
    return {"name": tensor.name, "type": _type_text(info.type) if info else "not said"}


def _type_text(kind: onnx.TypeProto) -> str:
    """A type in words: ``"float32 (batch, 3)"``, ``"sequence of map from int64 to float32"``."""
    match kind.WhichOneof("value"):
        case "sequence_type":
            return f"sequence of {_type_text(kind.sequence_type.elem_type)}"
        case "optional_type":
            return f"optional {_type_text(kind.optional_type.elem_type)}"
        case "map_type":
            key = _element_text(kind.map_type.key_type)
            return f"map from {key} to {_type_text(kind.map_type.value_type)}"
        case "sparse_tensor_type":
            return f"sparse {_tensor_text(kind.sparse_tensor_type)}"
        case "tensor_type":
            return _tensor_text(kind.tensor_type)
        case _:
            return "not said"


def _tensor_text(declared: Any) -> str:
    element = _element_text(declared.elem_type)
    if not declared.HasField("shape"):
        return element
    sizes = [dimension_value(dim) for dim in declared.shape.dim]
    shape = ", ".join("?" if size in (None, -1) else str(size) for size in sizes)
    return f"{element} ({shape})"


def _element_text(elem_type: int) -> str:
    name = str(onnx.TensorProto.DataType.Name(elem_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _operators(model: Model) -> list[dict[str, Any]]:
    counts = collections.Counter(
        f"{node.domain}.{node.op}" if node.domain else node.op for node in model.nodes()
    )
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"op": op, "count": count} for op, count in ordered]


def _quantization(model: Model) -> str:
    """In words, whether and how the model is quantized already; "" if it is not."""
    counts = collections.Counter(node.op for node in model.nodes())
    integer = sum(
        counts[op]
        for op in ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits")
    )
    quantize, dequantize = counts["QuantizeLinear"], counts["DequantizeLinear"]
    stored = sum(
        isinstance(node.inputs[0], Constant)
        for node in model.nodes()
        if node.op == "DequantizeLinear" and node.inputs
    )
    said = []
    if quantize and dequantize:
        said.append(f"Q/DQ: {quantize} QuantizeLinear, {dequantize} DequantizeLinear")
    if stored:
        said.append(f"{stored} weights stored as integers behind DequantizeLinear")
    if counts["DynamicQuantizeLinear"]:
        said.append(f"dynamic: {counts['DynamicQuantizeLinear']} DynamicQuantizeLinear")
    if integer:
        said.append(f"{integer} integer operators")
    return "; ".join(said)


def _weight_row(weight: Weight) -> dict[str, Any]:
    values = weight.values
    nonzero = int(np.count_nonzero(values))
    distinct = int(np.unique(values).size) if weight.size <= DISTINCT_ELEMENTS else None
    return {
        "name": weight.name,
        "where": weight.where,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype),
        "bytes": weight.nbytes,
        "elements": weight.size,
        "nonzero": nonzero,
        "sparsity": (weight.size - nonzero) / max(weight.size, 1),
        "distinct": distinct,
        "role": weight.role,
        "used_by": [{"node": use.node.where, "op": use.node.op} for use in weight.uses],
    }


def _roles(model: Model, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes by role; constants that are not float parameters come last."""
    totals: dict[str, list[int]] = {}
    for row in rows:
        total = totals.setdefault(row["role"], [0, 0, 0])
        for place, amount in enumerate((1, row["elements"], row["bytes"])):
            total[place] += amount
    parameters = {id(weight.constant) for weight in model.weights()}
    rest = [item for item in model.constants() if id(item) not in parameters]
    if rest:
        sizes = sum(item.size for item in rest), sum(item.nbytes for item in rest)
        totals["integers and other"] = [len(rest), *sizes]
    ordered = sorted(totals.items(), key=lambda item: -item[1][2])
    keys = ("count", "elements", "bytes")
    return [{"role": role, **dict(zip(keys, total, strict=True))} for role, total in ordered]


# ---------------- the view


def _view(data: dict[str, Any], top: int) -> RenderableType:
    parts: list[RenderableType] = [_head_view(data), Text()]
    parts.append(_operators_view(data))
    listed = table("role", "tensors", "elements", "bytes", right=["tensors", "elements", "bytes"])
    for row in data["roles"]:
        listed.add_row(
            row["role"], str(row["count"]), count_text(row["elements"]), bytes_text(row["bytes"])
        )
    parts += [section("Constants by role", listed), _weights_view(data, top)]
    parts.append(_passes_view(data))
    if "target" in data:
        parts.append(_target_view(data["target"]))
    return Group(*parts)


def _target_view(target: dict[str, Any]) -> RenderableType:
    """One row for each rule that is broken, with its first place; then what is not known."""
    rules: dict[str, list[dict[str, Any]]] = {}
    for violation in target["violations"]:
        rules.setdefault(violation["rule"], []).append(violation)
    listed = table("rule", "places", "the first", "found", "expected", right=["places"])
    documents = {}
    for name, places in rules.items():
        first = places[0]
        rule = name if first["required"] else f"{name} (recommended)"
        documents[first["reference"]["url"]] = first["reference"]["title"]
        # Converters give names of several hundred letters.
        where = Text(first["where"], no_wrap=True, overflow="ellipsis")
        listed.add_row(rule, str(len(places)), where, Text(first["found"]), Text(first["expected"]))
    lines: list[RenderableType] = [listed if rules else Text("No rule is broken.")]
    lines += [Text(f"{title}: {url}") for url, title in documents.items()]
    if not target["runs_here"]:
        lines.append(Text("Checked by rule, not run; --json lists every place."))
    lines += [Text(f"Not known: {unknown}") for unknown in target["unknown"]]
    return section(f"Target {target['name']}: {target['title']}", Group(*lines))


def _head_view(data: dict[str, Any]) -> RenderableType:
    size = bytes_text(data["bytes"])
    if data["external_bytes"]:
        size += f", of which {bytes_text(data['external_bytes'])} in external data"
    sparsity = 1 - data["nonzero_parameters"] / max(data["parameters"], 1)
    parameters = f"{count_text(data['parameters'])}, {sparsity:.0%} of them zero"
    opsets = ", ".join(f"{domain} {version}" for domain, version in data["opsets"].items())
    rows = [
        ("model", data["model"]),
        ("size", size),
        ("float weights", parameters),
        ("producer", data["producer"] or "not said"),
        ("IR, opsets", f"{data['ir_version']}, {opsets}"),
        *(("input", f"{row['name']}: {row['type']}") for row in data["inputs"]),
        *(("output", f"{row['name']}: {row['type']}") for row in data["outputs"]),
    ]
    if data["functions"] or data["bodies"]:
        bodies = f"{data['functions']} model-local functions, {data['bodies']} If/Loop/Scan bodies"
        rows.append(("holds", bodies))
    if data["quantization"]:
        rows.append(("quantized", data["quantization"]))
    if data["metadata"]:
        rows.append(("metadata", ", ".join(data["metadata"])))
    if data["compressed_by_us"]:
        rows.append(("compressed", f"by this tool: onnxslim-passes explain {data['model']}"))
    return pairs(rows)


def _operators_view(data: dict[str, Any]) -> RenderableType:
    total = sum(row["count"] for row in data["operators"])
    counts = ", ".join(f"{row['op']} {row['count']}" for row in data["operators"])
    return section(f"Operators: {total} nodes", Text(counts))


def _weights_view(data: dict[str, Any], top: int) -> RenderableType:
    rows = data["weights"]
    # Scalars are constants of the arithmetic; they would only push weights off the list.
    shown = [row for row in rows if row["shape"]][:top] if top > 0 else rows
    # A column that says the same of every weight only takes room.
    kinds = {row["dtype"] for row in shown}
    shared = any(_few_values(row) for row in shown)
    columns = ["weight", "shape", *(["type"] if len(kinds) > 1 else []), "role", "bytes", "zeros"]
    columns += [*(["values"] if shared else []), "used by"]
    listed = table(*columns, right=["bytes", "zeros", "values"])
    for row in shown:
        cells = {
            "weight": Text(row["where"]),
            "shape": "x".join(map(str, row["shape"])) or "scalar",
            "type": row["dtype"],
            "role": row["role"],
            "bytes": bytes_text(row["bytes"]),
            "zeros": f"{row['sparsity']:.0%}",
            "values": str(row["distinct"]) if _few_values(row) else "",
            "used by": Text(_users(row["used_by"])),
        }
        listed.add_row(*(cells[column] for column in columns))
    kind = f", all {kinds.pop()}" if len(kinds) == 1 else ""
    hint = f"; --top 0 lists all {len(rows)}" if len(shown) < len(rows) else ""
    return section(f"Largest weights: {len(shown)} of {len(rows)}{kind}{hint}", listed)


def _few_values(row: dict[str, Any]) -> bool:
    """Whether the weight holds so few values that a codebook may be in it."""
    distinct = row["distinct"]
    return distinct is not None and distinct <= min(SHOWN_DISTINCT, row["elements"] // 2)


def _users(uses: list[dict[str, str]]) -> str:
    """The operators that take a weight: ``"Conv"``, ``"Slice x6"``."""
    counts = collections.Counter(use["op"] for use in uses)
    return ", ".join(f"{op} x{count}" if count > 1 else op for op, count in counts.items())


def _passes_view(data: dict[str, Any]) -> RenderableType:
    listed = table("pass", "could change", "file then", "note", right=["could change", "file then"])
    for row in data["passes"]:
        looked_at, then = row["looked_at"], row["bytes_after"]
        could = f"{row['candidates']} of {looked_at}" if looked_at else "nothing"
        size = bytes_text(then) if then is not None and row["candidates"] else ""
        listed.add_row(row["name"], could, size, Text(row["note"]))
    return section("What each pass could do, with its default options", listed)
