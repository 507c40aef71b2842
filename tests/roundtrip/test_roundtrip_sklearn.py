"""Models that skl2onnx exports: ZipMap, tree ensembles, strings, maps and sequences."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from sklearn.datasets import load_iris
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from .cases import proto_case
from .judge import CONVERSIONS, Tally, judge

skl2onnx = pytest.importorskip("skl2onnx")
StringTensorType = pytest.importorskip("skl2onnx.common.data_types").StringTensorType


def _iris(estimator: Any, *, zipmap: bool = True) -> onnx.ModelProto:
    """`estimator` trained on iris; class probabilities as a sequence of maps if `zipmap`."""
    features, labels = load_iris(return_X_y=True)
    features = features.astype(np.float32)
    estimator.fit(features, labels)
    options = None if zipmap else {"zipmap": False}
    return skl2onnx.to_onnx(estimator, features[:1], options=options, target_opset=18)


def _texts() -> onnx.ModelProto:
    """String input, string labels; not lower-cased, which needs a locale of the machine."""
    pipeline = make_pipeline(TfidfVectorizer(lowercase=False), LogisticRegression())
    pipeline.fit(["hello world", "bye now", "hi there", "good bye"], ["a", "b", "a", "b"])
    types = [("text", StringTensorType([None, 1]))]
    return skl2onnx.convert_sklearn(pipeline, initial_types=types, target_opset=18)


def _categories() -> onnx.ModelProto:
    encoder = OneHotEncoder(handle_unknown="ignore").fit([["word", "x"], ["other", "y"]])
    types = [("text", StringTensorType([None, 2]))]
    return skl2onnx.convert_sklearn(encoder, initial_types=types, target_opset=18)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "logistic_regression": lambda: _iris(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    ),
    "forest": lambda: _iris(RandomForestClassifier(10, random_state=0)),
    "forest_without_zipmap": lambda: _iris(
        RandomForestClassifier(10, random_state=0), zipmap=False
    ),
    "boosting": lambda: _iris(GradientBoostingClassifier(n_estimators=5, random_state=0)),
    "support_vectors": lambda: _iris(SVC()),
    "neighbours": lambda: _iris(KNeighborsClassifier()),
    "ridge": lambda: _iris(Ridge()),
    "perceptron": lambda: _iris(
        MLPRegressor(hidden_layer_sizes=(8,), max_iter=20, random_state=0, tol=1.0)
    ),
    "texts": _texts,
    "categories": _categories,
}


@functools.cache
def _built(name: str) -> onnx.ModelProto:
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # of skl2onnx and the unconverged estimators
def test_scikit_learn_model_survives(name: str) -> None:
    tally = Tally()
    for convert in CONVERSIONS.values():
        judge(proto_case(name, lambda: _built(name)), convert, tally)
    assert not tally.problems, "\n".join(tally.problems)
    assert tally.run + tally.verbatim == len(CONVERSIONS)
    assert not tally.not_run
