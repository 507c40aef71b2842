"""The tools that are compared, and the commands that run them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnxslim_passes.recipe import ready_recipes
from peers.cases import Case

Kind = Literal["static", "dynamic", "weights"]

OWN = "onnxslim_passes"


@dataclass(frozen=True)
class Tool:
    """One recipe of one program.

    Attributes:
        program: whose it is.
        recipe: its name in the program's worker.
        kind: what it quantizes: both weights and activations, the latter at run time, or weights.
        tells_transformer: whether the worker has a variant of the recipe for transformers.
    """

    program: str
    recipe: str
    kind: Kind
    tells_transformer: bool = False

    @property
    def name(self) -> str:
        """`program:recipe`."""
        return f"{self.program}:{self.recipe}"

    def fits(self, case: Case) -> bool:
        """Whether its kind is one that users would try on the model."""
        return self.kind == "static" or (
            case.dynamic if self.kind == "dynamic" else case.transformer
        )

    def command(
        self, case: Case, interpreter: Path, source: Path, samples: Path, target: Path
    ) -> list[str | Path]:
        """What to run."""
        stem = "own" if self.program == OWN else self.program
        marked = self.tells_transformer and case.transformer
        recipe = f"{self.recipe}-transformer" if marked else self.recipe
        return [interpreter, "-m", f"peers.{stem}_worker", recipe, source, samples, target]


TOOLS = (
    Tool(OWN, "int8", "static"),
    Tool(OWN, "int8-accurate", "static"),
    Tool("onnxruntime", "static", "static"),
    Tool("onnxruntime", "static-weight-operators", "static"),
    Tool("nncf", "mixed", "static", tells_transformer=True),
    Tool("nncf", "mixed-full-correction", "static", tells_transformer=True),
    Tool(OWN, "int8-dynamic", "dynamic"),
    Tool("onnxruntime", "dynamic", "dynamic"),
    Tool(OWN, "int8-weights", "weights"),
    Tool(OWN, "int4-weights", "weights"),
    Tool(OWN, "int4-rounded", "weights"),
    Tool("onnxruntime", "matmul-8bit", "weights"),
    Tool("onnxruntime", "matmul-4bit", "weights"),
    Tool("nncf", "weights-8bit", "weights"),
)


def missing_recipes() -> list[str]:
    """Recipes above that this version of the package does not have."""
    ready = ready_recipes()
    return [tool.recipe for tool in TOOLS if tool.program == OWN and tool.recipe not in ready]
