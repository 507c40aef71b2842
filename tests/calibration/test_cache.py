"""The cache of ranges."""

import math
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from onnxslim_passes.calibration import ObserverOptions, RangeCache, Samples, TensorRange
from onnxslim_passes.errors import OutputError
from onnxslim_passes.model import Model, load

RANGES = {
    "a": TensorRange(-1.1, 1 / 3, 7, 2),
    "empty": TensorRange(math.nan, math.nan, 0, 1),
    "bad": TensorRange(-1e300, 5e-324, 3, 0, finite=False),
}


def model(weight: float = 2) -> Model:
    return load(
        onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 18]>
        g (float[N] x) => (float[N] y) <float[1] w = {{{weight}}}> {{ y = Mul(x, w) }}""")
    )


def samples(value: float = 1) -> Samples:
    return Samples.from_feeds([{"x": np.full(3, value, np.float32)}])


def test_what_is_stored_comes_back_bit_for_bit(tmp_path: Path) -> None:
    RangeCache(tmp_path / "new" / "folder").store("k", RANGES)
    found = RangeCache(tmp_path / "new" / "folder").load("k")
    assert repr(found) == repr(RANGES)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["k.json"]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"ranges": 3}',
        '{"ranges": {"a": 3}}',
        '{"ranges": {"a": {"lo": 1}}}',
        '{"ranges": {"a": {"lo": 2, "hi": 1, "seen": 1, "rank": 1, "finite": true}}}',
        '{"ranges": {"a": {"lo": "x", "hi": 1, "seen": 1, "rank": 1, "finite": true}}}',
        "\x00\xff",
    ],
)
def test_damaged_entries_count_as_absent(tmp_path: Path, damage: str) -> None:
    cache = RangeCache(tmp_path)
    (tmp_path / "k.json").write_bytes(damage.encode("latin-1"))
    assert cache.load("k") is None
    cache.store("k", RANGES)
    assert repr(cache.load("k")) == repr(RANGES)


def test_a_missing_entry(tmp_path: Path) -> None:
    assert RangeCache(tmp_path).load("k") is None


def test_the_key_depends_on_all_that_the_ranges_depend_on() -> None:
    cache = RangeCache("unused")
    options = ObserverOptions()
    base = (model(), ["y"], samples(), "mse", options)
    assert cache.key(*base) == cache.key(model(), ["y"], samples(), "mse", ObserverOptions())
    others = [
        (model(3), *base[1:]),
        (base[0], ["x"], *base[2:]),
        (*base[:2], samples(2), *base[3:]),
        (*base[:3], "entropy", options),
        (*base[:4], ObserverOptions(levels=16)),
    ]
    keys = {cache.key(*about) for about in (base, *others)}
    assert len(keys) == 6
    assert all(len(key) == 64 for key in keys)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Calibration cache"):
        RangeCache(tmp_path / "file").store("k", RANGES)
