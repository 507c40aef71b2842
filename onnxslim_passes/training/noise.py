"""Random numbers from a seed that is an input of the graph: the same on every provider.

ONNX's random operators keep their state in the runtime and differ between providers. Here the
number of an element is a hash of its index, of the seed, and of a number for the place in the
graph: the finalizer of MurmurHash3 (Appleby 2011, public domain), whose every input bit changes
every output bit with probability near 1/2. It takes 32-bit integer multiplications, shifts and
exclusive ors, all exact.
"""

import numpy as np

from onnxslim_passes.model import Variable
from onnxslim_passes.training.emitter import Emitter, Tensor

_GOLDEN = 0x9E3779B9
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)
_SHIFTS = (16, 13, 16)
# Float32 holds 24 bits exactly.
_BITS = 24


def uniform(emit: Emitter, like: Tensor, seed: Tensor, place: int) -> Variable:
    """Numbers in [0, 1), multiples of 2**-24, independent for every element, seed and place.

    Args:
        emit: where to.
        like: gives the shape of the result, at most 2**32 elements.
        seed: int64, rank 0, >= 0; another one at every step of training.
        place: number of the use, >= 0; another one for every use in the graph.

    Returns:
        float32 of the shape of `like`.
    """
    count = emit.op("ReduceProd", emit.op("Shape", like), keepdims=0)
    index = emit.op("Range", _int64(emit, 0), count, _int64(emit, 1))
    key = emit.op("Mod", emit.add(seed, _int64(emit, place * _GOLDEN)), _int64(emit, 2**32))
    mixed_key = _mix(emit, emit.cast(key, np.uint32))
    hashed = _mix(emit, emit.op("BitwiseXor", _mix(emit, emit.cast(index, np.uint32)), mixed_key))
    kept = emit.op("BitShift", hashed, _uint32(emit, 32 - _BITS), direction="RIGHT")
    # Cast goes through int32, for which every runtime has a kernel.
    number = emit.cast(emit.cast(kept, np.int32), np.float32)
    scaled = emit.mul(number, emit.constant(np.float32(2.0**-_BITS)))
    return emit.op("Reshape", scaled, emit.op("Shape", like))


def _mix(emit: Emitter, bits: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on uint32."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        shifted = emit.op("BitShift", bits, _uint32(emit, shift), direction="RIGHT")
        bits = emit.op("BitwiseXor", bits, shifted)
        if multiplier is not None:
            bits = emit.mul(bits, _uint32(emit, multiplier))
    return bits


def _uint32(emit: Emitter, value: int) -> Tensor:
    return emit.constant(np.array(value, np.uint32))


def _int64(emit: Emitter, value: int) -> Tensor:
    return emit.constant(np.array(value, np.int64))
