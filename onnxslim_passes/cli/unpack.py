"""`unpack`: every stored weight dense again, for tools that do not fold decoders.

No value changes. That is proved before the file is written: ONNX Runtime makes the same graph with
the same constants of both models.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Group
from rich.text import Text

from onnxslim_passes.cli.common import JsonFlag, ModelPath, check_output
from onnxslim_passes.errors import UsageError, VerificationError
from onnxslim_passes.model import check_model, load, restore_names
from onnxslim_passes.report.manifest import read_manifest
from onnxslim_passes.report.terminal import print_json, result_console, table
from onnxslim_passes.report.wording import bytes_text
from onnxslim_passes.storage.folding import folded
from onnxslim_passes.storage.unpacking import UnpackedWeight, unpack_weights

__all__ = ["unpack"]


def unpack(
    model: ModelPath,
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(
            name=["--output", "-o"],
            negative="",
            help="The file to write; never the input itself.",
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Make every stored weight of a model dense again, bit for bit."""
    if output is None:
        raise UsageError("-o OUT is missing: where to write the dense model")
    check_output(output, [model])
    loaded = load(model)
    expected = folded(loaded)
    manifest = read_manifest(loaded)
    short = manifest.short_names if manifest is not None else {}
    if short:
        restore_names(loaded, short)
    unpacked = unpack_weights(loaded)
    if not folded(loaded).same_as(expected):
        raise VerificationError(
            f"{model}: unpacked, ONNX Runtime would run other operators or constants; nothing was "
            "written. Please report it with the model."
        )
    check_model(loaded)
    loaded.save(output)
    sizes = {"before_bytes": model.stat().st_size, "after_bytes": loaded.nbytes()}
    if json:
        weights = [asdict(weight) for weight in unpacked]
        print_json({"output": str(output), **sizes, "weights": weights})
        return
    console = result_console()
    head = (
        f"{output.name}: {len(unpacked)} weights dense again, {bytes_text(sizes['before_bytes'])} "
        f"to {bytes_text(sizes['after_bytes'])}"
    )
    console.print(Text(head, "bold"), soft_wrap=True)
    if unpacked:
        console.print(_listing(unpacked))
    if short:
        note = (
            f"{len(short)} weights have the names they had before level=smallest shortened them; "
            "nodes and other inner tensors keep the short ones."
        )
        console.print(Text(note))


def _listing(unpacked: list[UnpackedWeight]) -> Group:
    listed = table("weight", "was", "dense bytes")
    for weight in unpacked:
        was = f"a decoder of {weight.operators} nodes" if weight.operators else "sparse"
        listed.add_row(weight.where, was, bytes_text(weight.nbytes))
    return Group(listed, Text("Outputs are the same, bit for bit: only the file is larger."))
