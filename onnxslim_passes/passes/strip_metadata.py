"""`strip-metadata`: what exporters note on each node, stack traces above all, leaves the file.

A model exported by PyTorch's dynamo carries a kilobyte and more a node: next to int8 weights that
is 2% of a small transformer.
"""

from typing import Any, ClassVar

from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options


@pass_options
class StripMetadata(Pass):
    """Takes documentation and metadata off nodes and declared tensors; the model's own stays."""

    name: ClassVar[str] = "strip-metadata"
    stage: ClassVar[Stage] = Stage.PREPARE
    summary: ClassVar[str] = "no notes of exporters (stack traces) on nodes and tensors"
    references: ClassVar[tuple[str, ...]] = ()
    lossless: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Clears `doc_string` and `metadata_props` in place, in bodies and functions, too."""
        decisions = []
        for graph in model.graphs():
            noted = [node.proto for node in graph.nodes if node.proto is not None]
            tensors = [tensor for node in graph.nodes for tensor in node.outputs]
            # Declarations of the model's inputs and outputs are part of its interface.
            kept = {id(tensor) for tensor in graph.outputs}
            noted += [t.info for t in tensors if t.info is not None and id(t) not in kept]
            cleared = [_clear(message) for message in noted]
            if any(cleared):
                decisions.append(
                    Decision(
                        where=graph.path or "the main graph",
                        taken=True,
                        reason="notes on nodes and tensors, which nothing reads, removed",
                        figures={
                            "notes": sum(1 for size in cleared if size),
                            "before_bytes": sum(cleared),
                        },
                    )
                )
        return PassResult(changed=bool(decisions), decisions=tuple(decisions))


def _clear(message: Any) -> int:
    """Empties the notes of a NodeProto or ValueInfoProto; how many bytes they took."""
    before = int(message.ByteSize())
    message.ClearField("doc_string")
    del message.metadata_props[:]
    return before - int(message.ByteSize())
