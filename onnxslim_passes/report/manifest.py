"""The account that a compressed file carries with it, in `metadata_props`.

JSON under one key: recipe, versions, hash of the source and seed in clear; the decisions, of which
there are hundreds, compressed (DEFLATE with a preset dictionary, then Base85), so that they take a
few bytes each, and few in a file of some kilobytes too. No times and no dates: the same run gives
the same bytes. Manifests of kind 1 have no dictionary; they are read like others.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model import Model
from onnxslim_passes.report.records import SHORT_NAME, Decision, jsonable
from onnxslim_passes.report.vocabulary import VOCABULARY

MANIFEST_KEY = "onnxslim_passes"
MANIFEST_VERSION = 2
# The preset dictionary of each kind of manifest.
_DICTIONARIES = {1: b"", 2: VOCABULARY}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a compressed file says of itself.

    Attributes:
        source: file name of the original, or "".
        source_sha256: its hash.
        versions: of onnxslim-passes, onnx and onnxruntime.
        seed: of everything random.
        recipe: the passes as tables: ``name`` and options.
        counts: how many decisions were taken at load and by each pass of the recipe.
        decisions: pass name and decision, in order.
    """

    source: str
    source_sha256: str
    versions: Mapping[str, str]
    seed: int
    recipe: Sequence[Mapping[str, Any]]
    counts: tuple[int, ...]
    decisions: tuple[tuple[str, Decision], ...]

    @property
    def short_names(self) -> dict[str, str]:
        """Names that weights have in the file -> those they had, where these were shortened."""
        return {
            str(decision.figures[SHORT_NAME]): decision.where
            for _, decision in self.decisions
            if SHORT_NAME in decision.figures
        }

    def to_text(self) -> str:
        """The manifest as compact JSON."""
        names = list(dict.fromkeys(name for name, _ in self.decisions))
        rows = [
            [names.index(name), decision.where, int(decision.taken), decision.reason]
            + ([jsonable(decision.figures)] if decision.figures else [])
            for name, decision in self.decisions
        ]
        told = {"passes": names, "counts": self.counts, "rows": rows}
        packed = _pack(_compact(told), VOCABULARY)
        return _compact(
            {
                "manifest": MANIFEST_VERSION,
                "source": self.source,
                "source_sha256": self.source_sha256,
                "versions": dict(self.versions),
                "seed": self.seed,
                "recipe": jsonable(self.recipe),
                "decisions": packed,
            }
        )

    @classmethod
    def from_text(cls, text: str) -> "Manifest":
        """Reads what `to_text` wrote.

        Raises:
            InvalidModelError: it is damaged, or of a newer kind.
        """
        try:
            plain = json.loads(text)
            kind = plain["manifest"]
            if kind not in _DICTIONARIES:
                raise InvalidModelError(
                    f"The manifest is of kind {kind!r}; this version reads kinds up to "
                    f"{MANIFEST_VERSION}. Update onnxslim-passes."
                )
            packed = json.loads(_unpack(plain["decisions"], _DICTIONARIES[kind]))
            decisions = tuple(_decision(row, packed["passes"]) for row in packed["rows"])
            return cls(
                source=plain["source"],
                source_sha256=plain["source_sha256"],
                versions=plain["versions"],
                seed=plain["seed"],
                recipe=plain["recipe"],
                counts=tuple(packed["counts"]),
                decisions=decisions,
            )
        except (ValueError, KeyError, IndexError, TypeError, zlib.error) as error:
            raise InvalidModelError(
                f"The manifest in this file is damaged ({type(error).__name__}: {error}); another "
                "tool may have rewritten it. Compress the original again."
            ) from error


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _pack(text: str, dictionary: bytes) -> str:
    packing = zlib.compressobj(level=9, zdict=dictionary)
    packed = packing.compress(text.encode()) + packing.flush()
    return base64.b85encode(packed).decode("ascii")


def _unpack(packed: str, dictionary: bytes) -> bytes:
    unpacking = zlib.decompressobj(zdict=dictionary)
    text = unpacking.decompress(base64.b85decode(packed)) + unpacking.flush()
    if not unpacking.eof:
        raise ValueError("the decisions end too early")
    return text


def _decision(row: list[Any], passes: list[str]) -> tuple[str, Decision]:
    name, where, taken, reason, *figures = row
    found = Decision(
        where=where, taken=bool(taken), reason=reason, figures=figures[0] if figures else {}
    )
    return passes[name], found


def read_manifest(model: Model) -> Manifest | None:
    """The manifest of a compressed model, or None if it carries none.

    Raises:
        InvalidModelError: it carries one that is damaged.
    """
    text = model.metadata.get(MANIFEST_KEY)
    return None if text is None else Manifest.from_text(text)


def write_manifest(model: Model, manifest: Manifest) -> None:
    """Puts the manifest into the model's metadata."""
    model.set_metadata(MANIFEST_KEY, manifest.to_text())
