"""Which ONNX Runtime a stored file needs.

Three things decide: the operator set of the model, its IR version, and the oldest release with
which an encoding was found to fold to the same bits (`benchmarks/storage_runtimes.py` prints the
table). Releases older than the oldest one tested may well do, but nobody has looked.
"""

import re
from collections.abc import Iterable

Release = tuple[int, int]

OLDEST_TESTED: Release = (1, 17)

# The first release that takes each operator set, by ONNX Runtime's own table of compatibility.
_OPSETS: dict[int, Release] = {
    18: (1, 14),
    19: (1, 15),
    20: (1, 17),
    21: (1, 18),
    22: (1, 21),
    23: (1, 22),
    24: (1, 23),
    25: (1, 24),
}
# The first release that takes each IR version; benchmarks' environments agree.
_IR_VERSIONS: dict[int, Release] = {10: (1, 18), 11: (1, 22), 12: (1, 24)}
# Encodings that need more than the oldest release tested.
_ENCODINGS: dict[str, Release] = {"codebook-uint4": (1, 23), "codebook-uint2": (1, 24)}


def parse_release(text: str) -> Release:
    """The first two numbers of a version such as ``1.17`` or ``1.17.3``.

    Raises:
        ValueError: it is no version.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a version of ONNX Runtime, such as 1.17")
    return int(match[1]), int(match[2])


def encoding_release(encoding: str) -> Release:
    """The oldest release with which an encoding was found to fold; dense needs none."""
    return (0, 0) if encoding == "dense" else _ENCODINGS.get(encoding, OLDEST_TESTED)


def file_release(opset: int, ir_version: int, encodings: Iterable[str]) -> Release:
    """The release that a file needs."""
    needed = [version for at, version in _OPSETS.items() if at <= opset]
    needed += [version for at, version in _IR_VERSIONS.items() if at <= ir_version]
    return max([(0, 0), *needed, *map(encoding_release, encodings)])


def release_text(release: Release) -> str:
    """``1.17``."""
    return f"{release[0]}.{release[1]}"
