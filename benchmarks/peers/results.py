"""Results as JSON lines, so that a second run only measures what is missing."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One tool on one file.

    Attributes:
        model: name of the case.
        variant: "prepared" or "raw".
        tool: "float", or program and recipe.
        cpu_s: CPU seconds of the tool's process.
        peak_mb: its peak resident memory in MB.
        mb: see `measure.Worth`, like the rest.
        failure: why there are no figures; empty if there are.
    """

    model: str
    variant: str
    tool: str
    cpu_s: float | None = None
    peak_mb: float | None = None
    mb: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    score: float | None = None
    speed: float | None = None
    failure: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a row the only one of its kind."""
        return self.model, self.variant, self.tool


Rows = dict[tuple[str, str, str], Row]


def read_rows(path: Path) -> Rows:
    """The last row of each key."""
    if not path.is_file():
        return {}
    rows = (Row(**json.loads(line)) for line in path.read_text().splitlines())
    return {row.key: row for row in rows}


def append_row(path: Path, row: Row) -> None:
    """Adds a line."""
    with path.open("a") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")
