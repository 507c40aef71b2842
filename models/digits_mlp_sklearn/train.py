# /// script
# requires-python = ">=3.11"
# dependencies = ["scikit-learn==1.9.1", "skl2onnx==1.20.0", "onnx==1.23.2", "numpy==2.4.6"]
# ///
"""Trains a scikit-learn pipeline on 8 x 8 digits and exports it with skl2onnx.

`python models/digits_mlp_sklearn/train.py` takes a few seconds and writes model.onnx beside this
script: opset 21 with ai.onnx.ml, input `features` float32 (batch, 64) in [0, 1]. The outputs are
those that scikit-learn users get: `output_label` int64 (batch,), and `output_probability`, a
sequence of maps from class to probability, made by a ZipMap node.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "calibration"


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) and labels of a file of the folder calibration."""
    with np.load(DATA / name) as data:
        return data["image"].reshape(-1, 64), data["labels"]


def main() -> None:
    """Trains, exports, prints the test accuracy."""
    net = make_pipeline(
        StandardScaler(), MLPClassifier((256, 128), alpha=1.0, max_iter=300, random_state=0)
    )
    net.fit(*load("digits.npz"))
    print("top1", net.score(*load("digits_test.npz")))
    model = to_onnx(
        net,
        initial_types=[("features", FloatTensorType([None, 64]))],
        target_opset={"": 21, "ai.onnx.ml": 3},
    )
    (HERE / "model.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
