"""Activations that get more bits than others, because rounding them harms the outputs most."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model, Node, Variable
from onnxslim_passes.numerics.affine import choose_grid
from onnxslim_passes.passes.base import Decision, Progress
from onnxslim_passes.passes.placement import Format, Ranges, Schemes, Site
from onnxslim_passes.passes.sensitivity import decibels, rounding_errors, tolerable

__all__ = ["Spared", "spared", "spared_decisions", "with_wide"]


@dataclass(frozen=True, kw_only=True)
class Spared:
    """Activations whose rounding harms the outputs most.

    Attributes:
        wide: name -> SQNR in dB of the outputs with it alone in its format; it gets 16 bits.
        floating: name -> the same, with it in the widest format that there is; it stays float.
    """

    wide: Mapping[str, float] = field(default_factory=dict)
    floating: Mapping[str, float] = field(default_factory=dict)

    def touches(self, site: Site) -> bool:
        """Whether an activation that a site would round is to stay float."""
        made = site.outputs if site.integer_output else ()
        return any(str(tensor.name) in self.floating for tensor in (*site.inputs, *made))


def spared(
    model: Model,
    takers: Mapping[Variable, Node | None],
    schemes: Schemes,
    ranges: Ranges,
    samples: Samples,
    *,
    hold_db: float,
    may_be_wide: bool,
    progress: Progress,
) -> Spared:
    """Which activations to leave out so that rounding the others costs no more than a limit.

    Args:
        model: before any pair is put in; stays as it is.
        takers: activations that would be rounded, in the order of the graph, each with the node
            whose format it has.
        schemes: the formats.
        ranges: of these activations; those without one are passed over.
        samples: a few of them are run.
        hold_db: what the SQNR of the outputs has to be with all other activations rounded.
        may_be_wide: whether 16 bits are tried before float.
        progress: is shown the tensors.
    """
    allowed = 10 ** (-hold_db / 10)
    kinds = {
        str(tensor.name): schemes.kind(tensor, node)
        for tensor, node in takers.items()
        if str(tensor.name) in ranges
    }
    narrow = _errors(model, kinds, ranges, samples, allowed, progress)
    harmful = [name for name in kinds if name not in tolerable(narrow, allowed)]
    if not may_be_wide:
        return Spared(floating={name: decibels(narrow[name]) for name in harmful})
    widened = {name: _widened(kinds[name]) for name in harmful}
    wide = _errors(model, widened, ranges, samples, allowed, progress)
    kept = tolerable(wide, allowed)
    return Spared(
        wide={name: decibels(narrow[name]) for name in harmful if name in kept},
        floating={name: decibels(wide[name]) for name in harmful if name not in kept},
    )


def _errors(
    model: Model,
    kinds: Mapping[str, Format],
    ranges: Ranges,
    samples: Samples,
    allowed: float,
    progress: Progress,
) -> dict[str, float]:
    grids = {
        name: choose_grid(*ranges[name], kind.dtype, symmetric=kind.symmetric)
        for name, kind in kinds.items()
    }
    return rounding_errors(model, grids, samples, allowed=allowed, progress=progress)


def with_wide(schemes: Schemes, found: Spared) -> Schemes:
    """The schemes with 16 bits for those activations."""
    kind = _widened(schemes.default.format)
    return replace(schemes, tensors=dict.fromkeys(found.wide, kind))


def _widened(kind: Format) -> Format:
    signed = kind.dtype.kind == "i"
    return Format(np.dtype(np.int16 if signed else np.uint16), kind.symmetric)


def spared_decisions(found: Spared, makers: Mapping[str, Node]) -> list[Decision]:
    """One for each activation that has more bits than others, with what it would have cost."""
    said = [
        (found.wide, True, "has 16 bits: rounded to 8 alone, it leaves"),
        (found.floating, False, "stays float: rounded alone, it leaves"),
    ]
    return [
        Decision(
            where=makers[name].where if name in makers else name,
            taken=taken,
            reason=f"activation {name!r} {words} the outputs {db:.1f} dB (hold_db)",
            figures={"output_db": round(db, 2)},
        )
        for group, taken, words in said
        for name, db in group.items()
    ]
