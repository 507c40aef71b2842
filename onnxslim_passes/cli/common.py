"""What several commands share: kinds of arguments, and opening samples and metrics."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

JsonFlag = Annotated[bool, Parameter(negative="", help="Print the result as JSON.")]
ModelPath = Annotated[Path, Parameter(help="An ONNX model.")]
