"""Worker: a recipe of this package, through its pipeline, verification included.

python -m peers.own_worker RECIPE MODEL SAMPLES OUT
"""

import sys
from pathlib import Path

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import load
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import Recipe


def quantize(recipe: str, source: Path, samples: Path, target: Path) -> None:
    """Writes the result of the recipe."""
    pipeline = Pipeline(Recipe.open(recipe).passes)
    result = pipeline.run(load(source), samples=Samples.open(samples), measure=False)
    result.model.save(target)


if __name__ == "__main__":
    quantize(sys.argv[1], *map(Path, sys.argv[2:5]))
