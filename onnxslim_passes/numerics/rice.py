"""Rice codes of positions: where the non-zeros of a sparse tensor stand, in about the entropy.

Between two non-zeros lie ``gap`` zeros. A gap is split at bit k: the low k bits are written as they
are, ``gap >> k`` in unary, as so many zero bits and a one. With random zeros gaps are geometric,
for which this code, with the best k, is within about 3% of the entropy (Golomb 1966, Rice 1979).
With k = 0 the unary stream is the mask of the non-zeros itself.

Position i follows from the place ``P[i]`` of the i-th one in the unary stream by sums alone:

    position[i] = 2^k P[i] + sum over j <= i of (low[j] - (2^k - 1))

For this to hold from the first position on, its gap is counted from place ``1 - 2^k``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]

MAX_PARAMETER = 16


@dataclass(frozen=True)
class RiceSize:
    """What a Rice code takes.

    Attributes:
        parameter: k, bits of the low part.
        unary_bits: length of the unary stream.
        count: number of positions.
    """

    parameter: int
    unary_bits: int
    count: int

    @property
    def bits(self) -> int:
        """Bits of both streams together."""
        return self.unary_bits + self.parameter * self.count


def rice_size(positions: Positions, parameter: int) -> RiceSize:
    """The size of a code without making it.

    Args:
        positions: int64, strictly ascending, >= 0, shape (n,), n > 0.
        parameter: k, 0 to `MAX_PARAMETER`.
    """
    quotients = _gaps(positions, parameter) >> parameter
    return RiceSize(parameter, int(quotients.sum()) + positions.size, positions.size)


def best_rice(positions: Positions) -> RiceSize:
    """The smallest code of these positions (as `rice_size` takes them).

    The optimal k is next to log2 of ln 2 times the mean gap, so that three are tried.
    """
    mean = (int(positions[-1]) + 1 - positions.size) / positions.size
    guess = min(round(np.log2(max(np.log(2) * mean, 1))), MAX_PARAMETER)
    tried = range(max(0, guess - 1), min(MAX_PARAMETER, guess + 1) + 1)
    return min((rice_size(positions, k) for k in tried), key=lambda size: size.bits)


def rice_unary(positions: Positions, parameter: int) -> npt.NDArray[np.uint8]:
    """The unary stream, packed: bit j is bit ``j % 8`` of byte ``j // 8``; it ends with a one."""
    ends = np.cumsum((_gaps(positions, parameter) >> parameter) + 1)
    stream = np.zeros(int(ends[-1]), np.bool_)
    stream[ends - 1] = True
    return np.packbits(stream, bitorder="little")


def rice_low(positions: Positions, parameter: int) -> npt.NDArray[np.uint16]:
    """The low parts: uint16, shape (n,), each below ``2**parameter``."""
    return (_gaps(positions, parameter) & ((1 << parameter) - 1)).astype(np.uint16)


def rice_positions(
    unary: npt.NDArray[np.uint8], low: npt.NDArray[np.uint16], parameter: int
) -> Positions:
    """The positions again; `unary` may have zero bits behind its last one."""
    places = np.flatnonzero(np.unpackbits(unary, bitorder="little")).astype(np.int64)
    return (places << parameter) + np.cumsum(low.astype(np.int64) - ((1 << parameter) - 1))


def _gaps(positions: Positions, parameter: int) -> Positions:
    """Zeros before each position; the first one counted from place ``1 - 2^k``."""
    gaps = np.empty(positions.size, np.int64)
    gaps[0] = positions[0] + (1 << parameter) - 1
    np.subtract(positions[1:], positions[:-1], out=gaps[1:])
    gaps[1:] -= 1
    return gaps
