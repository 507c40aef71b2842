"""A whole ONNX model: its graphs, every question passes ask of it, and edits that span graphs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, version_converter
from onnx.version_converter import ConvertError

from onnxslim_passes.errors import InvalidModelError, UnsupportedModelError
from onnxslim_passes.model.exporting import (
    FIRST_IR_WITH_FREE_INITIALIZERS,
    Exporter,
    TensorWriter,
    captured_inputs,
    copy_fields,
    held,
    sorted_nodes,
)
from onnxslim_passes.model.importing import DEFAULT_DOMAINS, Importer, PayloadReader
from onnxslim_passes.model.ir import Constant, Graph, Node, Variable
from onnxslim_passes.model.payload import (
    ExternalPayload,
    Payload,
    TensorPayload,
    external_payload,
)
from onnxslim_passes.model.types import Types, infer_types
from onnxslim_passes.model.weights import Weight, find_weights
from onnxslim_passes.model.writing import save

# Constants up to this size keep their values where shapes are inferred or opsets converted:
# shape arithmetic is made of such, weights are not.
SMALL_BYTES = 4096

KNOWN_ELEM_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}

_PLACEHOLDER = "onnxslim_passes:payload"


class Model:
    """An ONNX model that passes edit.

    Attributes:
        graph: the main graph.
        functions: the bodies of model-local functions.
        proto: the model message less its graph and functions: versions, metadata, training info.
        path: where it was loaded from, if it was a file.
    """

    def __init__(self, proto: onnx.ModelProto, read: PayloadReader, path: Path | None) -> None:
        self.path = path
        self._read_from(proto, read)

    @classmethod
    def from_proto(
        cls,
        proto: onnx.ModelProto,
        folder: Path | None = None,
        path: Path | None = None,
        lifted: Callable[[TensorProto], Payload | None] = lambda tensor: None,
    ) -> "Model":
        """Takes over a model message.

        Args:
            proto: the message.
            folder: where external data is looked for.
            path: where the message was read from, if it was a file.
            lifted: values that were taken out of the message before; None for other tensors.
        """

        def read(tensor: TensorProto) -> Payload:
            if tensor.data_type not in KNOWN_ELEM_TYPES:
                raise InvalidModelError(
                    f"Tensor {tensor.name!r} has element type {tensor.data_type}, which the "
                    f"installed onnx {onnx.__version__} does not know; update onnx."
                )
            behind = lifted(tensor)
            if behind is not None:
                return behind
            if tensor.data_location == TensorProto.EXTERNAL:
                return external_payload(tensor, folder)
            return TensorPayload(tensor)

        return cls(proto, read, path)

    def _read_from(self, proto: onnx.ModelProto, read: PayloadReader) -> None:
        self.proto = onnx.ModelProto()
        copy_fields(proto, self.proto, but=("graph", "functions"))
        importer = Importer(_default_opset(self.proto), read)
        self.functions = [
            importer.function(function, _default_opset(function, self.opset))
            for function in proto.functions
        ]
        self.graph = importer.main_graph(proto.graph)
        self._names = importer.names

    # ---- what it is

    @property
    def opsets(self) -> dict[str, int]:
        """Operator set versions by domain; the default domain is ``""``."""
        return {
            "" if entry.domain in DEFAULT_DOMAINS else entry.domain: entry.version
            for entry in self.proto.opset_import
        }

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return _default_opset(self.proto)

    @property
    def ir_version(self) -> int:
        """Version of the file format."""
        return int(self.proto.ir_version)

    @ir_version.setter
    def ir_version(self, version: int) -> None:
        self.proto.ir_version = version

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata_props, a copy; edit them with `set_metadata`."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    def set_metadata(self, key: str, value: str) -> None:
        """Adds or replaces one entry of metadata_props."""
        kept = [entry for entry in self.proto.metadata_props if entry.key != key]
        del self.proto.metadata_props[:]
        self.proto.metadata_props.extend(kept)
        self.proto.metadata_props.add(key=key, value=value)

    def graphs(self) -> Iterator[Graph]:
        """The main graph, its bodies depth first, then each function and its bodies."""
        pending = [self.graph, *self.functions][::-1]
        while pending:
            graph = pending.pop()
            yield graph
            bodies = [body for node in graph.nodes for _, body in node.bodies()]
            pending.extend(reversed(bodies))

    def nodes(self) -> Iterator[Node]:
        """The nodes of all graphs."""
        for graph in self.graphs():
            yield from graph.nodes

    def constants(self) -> Iterator[Constant]:
        """The constants of all graphs."""
        for graph in self.graphs():
            yield from graph.initializers

    def external_files(self) -> list[Path]:
        """The files beside the model that hold values not read yet, each once."""
        payloads = (constant.payload for constant in self.constants())
        return list(dict.fromkeys(p.path for p in payloads if isinstance(p, ExternalPayload)))

    def weights(self) -> list[Weight]:
        """Every floating-point constant that a node takes, shared ones once."""
        return find_weights(self.constants(), self.functions)

    def called_function(self, node: Node) -> Graph | None:
        """The model-local function that a node calls, or None."""
        for function in self.functions:
            if _function_key(function) == (node.domain, node.op, node.overload):
                return function
        return None

    def types(self) -> Types:
        """Element types and shapes of all tensors, as far as ONNX infers them, as of now."""
        return infer_types(self, self.to_proto_without_weights())

    def nbytes(self) -> int:
        """Bytes of the file with everything in it, without building it."""
        outline = self._export(_outline)
        payloads = {id(constant.payload): constant for constant in self.constants()}
        held_bytes = sum(constant.nbytes for constant in payloads.values() if not constant.sparse)
        return int(outline.ByteSize()) + held_bytes

    def extract(
        self,
        graph: Graph,
        nodes: Collection[Node],
        constants: Collection[Constant],
        outputs: Sequence[Variable],
    ) -> onnx.ModelProto:
        """A model of its own, without inputs, of nodes that depend on constants alone.

        Args:
            graph: the graph, body or function that holds the nodes.
            nodes: all that the outputs need.
            constants: all that the nodes take.
            outputs: what the model gives; their types are left to inference.
        """
        # Initializers that are no inputs came with version 4, sparse ones with 6, functions with 8.
        proto = onnx.ModelProto(ir_version=max(self.ir_version, 8))
        opsets = {**self.opsets, "": graph.opset}
        proto.opset_import.extend(helper.make_opsetid(*each) for each in opsets.items())
        exporter = Exporter(proto.ir_version)
        called = {(node.domain, node.op) for node in nodes}
        for function in self.functions:
            if _function_key(function)[:2] in called:
                exporter.function(function, proto.functions.add())
        part = Graph("decoders", opset=graph.opset, names=set())
        part.nodes = [node for node in graph.nodes if node in nodes]
        for node in sorted_nodes(part):
            proto.graph.node.append(exporter.node(node))
        for constant in constants:
            exporter.initializer(constant, proto.graph)
        proto.graph.name = part.name
        proto.graph.output.extend(
            helper.make_empty_tensor_value_info(tensor.name) for tensor in outputs
        )
        return proto

    # ---- functions

    def add_function(self, proto: onnx.FunctionProto) -> None:
        """Adds a model-local function of version 1 of its domain, unless it is there.

        Its tensors have names of their own, which do not count among those of the model.
        """
        key = (proto.domain, proto.name, proto.overload)
        if any(_function_key(function) == key for function in self.functions):
            return
        importer = Importer(_default_opset(proto, self.opset), TensorPayload)
        self.functions.append(importer.function(proto, _default_opset(proto, self.opset)))
        if proto.domain not in self.opsets:
            self.proto.opset_import.add(domain=proto.domain, version=1)

    def remove_unused_function(self, domain: str, name: str) -> None:
        """Removes a function that nobody calls, and its domain with the last one of it."""
        if any((node.domain, node.op) == (domain, name) for node in self.nodes()):
            return
        self.functions = [
            function for function in self.functions if _function_key(function)[:2] != (domain, name)
        ]
        if any(_function_key(function)[0] == domain for function in self.functions):
            return
        kept = [entry for entry in self.proto.opset_import if entry.domain != domain]
        del self.proto.opset_import[:]
        self.proto.opset_import.extend(kept)

    # ---- edits that span graphs

    def fresh_name(self, hint: str) -> str:
        """A tensor name like `hint` that nothing in the model has."""
        return self.graph.fresh_name(hint)

    def replace_uses(
        self,
        old: Variable | Constant,
        new: Variable | Constant,
        *,
        only: Collection[Node] | None = None,
    ) -> int:
        """Lets the consumers of `old` take `new`; returns how many inputs were changed.

        With `only`, just these consumers. Without, graph outputs too: they keep their names, so
        that `new` takes over the name (or an Identity is put between, where it cannot).
        """
        changed = 0
        for node in dict.fromkeys(old.outputs):
            if only is not None and node not in only:
                continue
            for index, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[index] = new
                    changed += 1
        if only is None:
            for graph in self.graphs():
                if old in graph.outputs:
                    changed += 1
                    self._replace_output(graph, old, new)
        return changed

    def _replace_output(
        self, graph: Graph, old: Variable | Constant, new: Variable | Constant
    ) -> None:
        movable = (
            isinstance(new, Variable)
            and new.inputs
            and new.inputs[0].graph is graph
            and new not in graph.outputs
        )
        if not movable:
            fed = Variable(old.name)
            old.name = graph.fresh_name(f"{old.name}_replaced")
            graph.add_node("Identity", [new], outputs=[fed])
            new = fed
        else:
            old.name, new.name = new.name, old.name
        graph.outputs = [new if tensor is old else tensor for tensor in graph.outputs]

    def remove_unused(self) -> int:
        """Takes out nodes whose outputs nobody takes, and constants without a use.

        Returns:
            How many nodes and constants were removed.
        """
        graphs = list(self.graphs())
        kept = {id(tensor) for graph in graphs for tensor in graph.outputs}
        removed = 0
        pending = [node for graph in graphs for node in graph.nodes]
        gone: set[int] = set()
        while pending:
            node = pending.pop()
            idle = node.outputs and all(
                not tensor.outputs and id(tensor) not in kept for tensor in node.outputs
            )
            if id(node) in gone or not idle:
                continue
            makers = [maker for tensor in captured_inputs(node) for maker in tensor.inputs]
            gone.update(id(inner) for _, body in node.bodies() for inner in body.nodes)
            gone.add(id(node))
            node.graph.remove_node(node)
            removed += 1
            pending.extend(makers)
        for graph in self.graphs():
            used = [
                constant
                for constant in graph.initializers
                if constant.outputs or id(constant) in kept or constant.input_info is not None
            ]
            removed += len(graph.initializers) - len(used)
            graph.initializers = used
        return removed

    def fix_overridable_weights(self) -> list[Constant]:
        """Makes initializers that are also inputs plain initializers; returns those.

        Old exporters declare every weight as an input; as long as a caller may override it,
        neither ONNX Runtime nor a pass may rely on its value.
        """
        fixed = []
        for graph in self.graphs():
            for constant in graph.initializers:
                if constant.input_info is not None:
                    constant.input_info = None
                    fixed.append(constant)
            graph.declared_inputs = list(graph.inputs)
        if fixed and self.ir_version < FIRST_IR_WITH_FREE_INITIALIZERS:
            self.ir_version = FIRST_IR_WITH_FREE_INITIALIZERS
        return fixed

    def convert_opset(self, version: int) -> None:
        """Converts to a newer default opset with ONNX's own converter.

        Raises:
            UnsupportedModelError: if the converter cannot, with its reason.
        """
        if version == self.opset:
            return
        if self.functions:
            raise UnsupportedModelError(
                f"The model has functions of its own, which ONNX cannot convert from opset "
                f"{self.opset} to {version}; put them in line first (the pass inline-functions)."
            )
        table: list[Constant] = []
        outline = self._export(lambda constant: _placeholder(constant, table, keep_small=True))
        try:
            converted = version_converter.convert_version(outline, version)
        except (ConvertError, RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UnsupportedModelError(
                f"ONNX cannot convert this model from opset {self.opset} to {version}: {reason}"
            ) from error
        by_name = {constant.name: constant for constant in table}
        self._after_conversion(converted, by_name)

    def _after_conversion(self, converted: onnx.ModelProto, by_name: dict[str, Constant]) -> None:
        before = self.proto
        sources = {node.name: node.proto for node in self.nodes() if node.name and node.proto}
        restored = onnx.ModelProto()
        copy_fields(before, restored, but=("opset_import", "graph", "functions", "ir_version"))
        restored.opset_import.extend(converted.opset_import)
        restored.graph.CopyFrom(converted.graph)
        if self.graph.proto is not None:
            restored.graph.ClearField("doc_string")
            copy_fields(
                self.graph.proto,
                restored.graph,
                but=[
                    field.name
                    for field in onnx.GraphProto.DESCRIPTOR.fields
                    if field.name not in ("doc_string", "metadata_props", "quantization_annotation")
                ],
            )
        for node in restored.graph.node:
            source = sources.get(node.name)
            if source is not None:
                node.doc_string = source.doc_string
                del node.metadata_props[:]
                node.metadata_props.extend(source.metadata_props)
        wanted = helper.find_min_ir_version_for(list(restored.opset_import), ignore_unknown=True)
        restored.ir_version = max(before.ir_version, wanted)

        def read(tensor: TensorProto) -> Payload:
            known = by_name.get(tensor.name)
            return known.payload if known is not None else TensorPayload(tensor)

        named = self.graph
        self._read_from(restored, read)
        _keep_labels(named, self.graph)

    def at_least_opset(self, version: int) -> bool:
        """Converts to `version` if the opset is older; returns whether it was."""
        if self.opset >= version:
            return False
        self.convert_opset(version)
        return True

    # ---- copies and messages

    def become(self, other: "Model") -> None:
        """Takes over the graph, functions and versions of another model, which is used up."""
        self.proto, self.graph, self.functions = other.proto, other.graph, other.functions
        self._names = other._names

    def copy(self) -> "Model":
        """A model to edit that shares the payloads, which are never written into."""
        table: list[Constant] = []
        proto = self._export(lambda constant: _placeholder(constant, table), keep_sparse=False)

        def read(tensor: TensorProto) -> Payload:
            number = _placeholder_number(tensor)
            return table[number].payload if number is not None else TensorPayload(tensor)

        copied = Model(proto, read, self.path)
        _keep_labels(self.graph, copied.graph)
        for mine, theirs in zip(self.functions, copied.functions, strict=True):
            _keep_labels(mine, theirs)
        return copied

    def save(self, path: str | Path, *, external: bool | None = None) -> None:
        """Writes a file; nothing appears at `path` before all of it is written.

        Args:
            path: the model file.
            external: whether values go into a second file, ``<path>.data``; by default only above
                1 GiB.

        Raises:
            OutputError: if it cannot be written; whatever was there before is still there.
        """
        save(self, path, external=external)

    def to_proto(self, *, dense: bool = False) -> onnx.ModelProto:
        """The model as one message that holds all values.

        Args:
            dense: write sparse initializers as dense ones; shape inference and version
                conversion need it.
        """
        return self._export(held, dense=dense)

    def to_proto_without_weights(self) -> onnx.ModelProto:
        """The model as a message in which large constants have a type and a shape but no values."""
        return self._export(_without_large_values, dense=True)

    def export(self, write: TensorWriter) -> onnx.ModelProto:
        """The model as a message whose dense tensors are written by `write`."""
        return self._export(write)

    def _export(
        self, write: TensorWriter, *, dense: bool = False, keep_sparse: bool = True
    ) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        exporter = Exporter(self.ir_version, write, dense=dense or not keep_sparse)
        exporter.graph(self.graph, proto.graph)
        for function in self.functions:
            exporter.function(function, proto.functions.add())
        return proto


def _function_key(function: Graph) -> tuple[str, str, str]:
    """What calls of a function must agree with."""
    proto = function.proto
    return proto.domain, proto.name, proto.overload


def _keep_labels(graph: Graph, copied: Graph) -> None:
    """Lets the nodes of a copy or a conversion be called what they are called in the file."""
    pending = [(graph, copied)]
    while pending:
        mine, theirs = pending.pop()
        theirs.path = mine.path
        nodes = {tuple(tensor.name for tensor in node.outputs): node for node in mine.nodes}
        for twin in theirs.nodes:
            node = nodes.get(tuple(tensor.name for tensor in twin.outputs))
            if node is None:
                twin.file_index = -1
                continue
            twin.file_index = node.file_index
            bodies = zip(node.bodies(), twin.bodies(), strict=True)
            pending.extend((body, other) for (_, body), (_, other) in bodies)


def _default_opset(proto: Any, otherwise: int | None = None) -> int:
    versions = [entry.version for entry in proto.opset_import if entry.domain in DEFAULT_DOMAINS]
    if versions:
        return int(versions[0])
    # A model of custom operators only need not import the default domain.
    return otherwise if otherwise is not None else onnx.defs.onnx_opset_version()


def _outline(constant: Constant) -> TensorProto:
    """Name and shape of a tensor, without values or what describes them."""
    return TensorProto(name=constant.name, dims=constant.shape, data_type=constant.elem_type)


def _without_large_values(constant: Constant) -> TensorProto:
    small = constant.size * 8 <= SMALL_BYTES and not isinstance(constant.payload, ExternalPayload)
    return held(constant) if small else _outline(constant)


def _placeholder(
    constant: Constant, table: list[Constant], *, keep_small: bool = False
) -> TensorProto:
    """A tensor message that stands for the constant by its number in `table`."""
    if keep_small and constant.size * 8 <= SMALL_BYTES:
        return held(constant)
    proto = _outline(constant)
    if not keep_small:
        proto.data_location = TensorProto.EXTERNAL
        proto.external_data.add(key=_PLACEHOLDER, value=str(len(table)))
    table.append(constant)
    return proto


def _placeholder_number(tensor: TensorProto) -> int | None:
    for entry in tensor.external_data:
        if entry.key == _PLACEHOLDER:
            return int(entry.value)
    return None
