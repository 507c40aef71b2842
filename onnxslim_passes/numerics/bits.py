"""Streams of small codes: 1 to 8 bits each, packed without gaps.

Code i takes bits ``[i * bits, (i + 1) * bits)`` of the stream; bit j of the stream is bit ``j % 8``
(0 = least significant) of byte ``j // 8``. This is the order of ONNX's int4 and int2 tensors (the
first element in the low bits), so 4-bit and 2-bit streams are their raw data. Unused high bits of
the last byte are zero.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_GROUP = 8  # codes: eight of b bits fill exactly b bytes, and fit into one 64-bit word
_BLOCK = _GROUP << 14


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Pack integer codes into bytes.

    Args:
        codes: any integer dtype and shape, each in ``[0, 2**bits)``; read in C order.
        bits: 1 to 8.

    Returns:
        uint8, shape ``(packed_bytes(codes.size, bits),)``.

    Raises:
        ValueError: a code does not fit (with its position), or `bits` is out of range.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    packed = np.empty(packed_bytes(flat.size, bits), np.uint8)
    written = 0
    for start in range(0, flat.size, _BLOCK):
        chunk = _pack_chunk(flat[start : start + _BLOCK], bits, start)
        packed[written : written + chunk.size] = chunk
        written += chunk.size
    return packed


def unpack_bits(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` codes of a stream that `pack_bits` wrote: uint8, shape ``(count,)``.

    Raises:
        ValueError: `data` holds fewer codes, or `bits` is out of range.
    """
    _check_bits(bits)
    needed = packed_bytes(count, bits)
    if data.size < needed:
        raise ValueError(f"{count} codes of {bits} bits need {needed} bytes; got {data.size}")
    codes = np.empty(count, np.uint8)
    block_bytes = _BLOCK // _GROUP * bits
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        offset = start // _GROUP * bits
        chunk = data[offset : min(offset + block_bytes, needed)]
        codes[start:stop] = _unpack_chunk(chunk, bits, stop - start)
    return codes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 1 to 8")


def _pack_chunk(codes: npt.NDArray[Any], bits: int, start: int) -> npt.NDArray[np.uint8]:
    """Pack one chunk; `start` is the position of its first code, for messages."""
    bad = (codes < 0) | (codes >= 1 << bits)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"code {codes[at]} at position {start + at} does not fit into {bits} bits")
    groups = -(-codes.size // _GROUP)
    padded = np.zeros((groups, _GROUP), np.uint64)
    padded.reshape(-1)[: codes.size] = codes
    words = np.bitwise_or.reduce(padded << _shifts(bits), axis=1)
    stream: npt.NDArray[np.uint8] = words.astype("<u8").view(np.uint8).reshape(groups, 8)
    return stream[:, :bits].reshape(-1)[: packed_bytes(codes.size, bits)]


def _unpack_chunk(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Unpack one chunk that begins at a group's first byte."""
    groups = -(-count // _GROUP)
    stream = np.zeros((groups, bits), np.uint8)
    stream.reshape(-1)[: data.size] = data
    wide = np.zeros((groups, 8), np.uint8)
    wide[:, :bits] = stream
    words = wide.view("<u8")
    codes = (words >> _shifts(bits)) & np.uint64((1 << bits) - 1)
    return codes.reshape(-1)[:count].astype(np.uint8)


def _shifts(bits: int) -> npt.NDArray[np.uint64]:
    return np.arange(_GROUP, dtype=np.uint64) * np.uint64(bits)
