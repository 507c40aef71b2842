"""Reports and manifests as text and back."""

import hashlib
import json
import math
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.errors import InvalidModelError, OutputError, UsageError
from onnxslim_passes.model import load
from onnxslim_passes.report.manifest import Manifest, read_manifest, write_manifest
from onnxslim_passes.report.records import Decision, PassRecord, Report
from onnxslim_passes.report.vocabulary import VOCABULARY

DECISIONS = st.builds(
    Decision,
    where=st.text(min_size=1),
    taken=st.booleans(),
    reason=st.text(min_size=1),
    figures=st.dictionaries(
        st.text(min_size=1), st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    ),
)


def manifest(decisions: tuple[tuple[str, Decision], ...]) -> Manifest:
    return Manifest(
        source="model.onnx",
        source_sha256="00",
        versions={"onnx": "1"},
        seed=3,
        recipe=[{"name": "prune-magnitude", "sparsity": 0.8}],
        counts=(0, len(decisions)),
        decisions=decisions,
    )


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), DECISIONS)))
def test_a_manifest_comes_back_from_its_text(decisions: list[tuple[str, Decision]]) -> None:
    written = manifest(tuple(decisions))
    assert Manifest.from_text(written.to_text()) == written


def test_hundreds_of_decisions_take_a_few_bytes_each() -> None:
    decisions = tuple(
        (
            "prune-magnitude",
            Decision(
                where=f"/model/layer.{i}/MatMul",
                taken=True,
                reason="the smallest half of its magnitudes became zero",
                figures={"sparsity": 0.5},
            ),
        )
        for i in range(500)
    )
    assert len(manifest(decisions).to_text()) / 500 < 12


def test_a_model_carries_its_manifest() -> None:
    model = load(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 18]> g (float[1] x) => (float[1] y) {y = Relu(x)}'
        )
    )
    assert read_manifest(model) is None
    write_manifest(model, manifest(()))
    assert read_manifest(load(model.to_proto())) == manifest(())


def test_few_decisions_take_few_bytes() -> None:
    decisions = tuple(
        Decision(
            where=f"fc{number}.{kind}",
            taken=kind == "weight",
            reason="the smallest 0.9 of its magnitudes became zero"
            if kind == "weight"
            else "a bias (taken by Gemm): left as it is",
        )
        for number in (1, 2, 3)
        for kind in ("weight", "bias")
    )
    empty = len(manifest(()).to_text())
    told = len(manifest(tuple(("prune-magnitude", each) for each in decisions)).to_text())
    # DEFLATE alone takes 190 more.
    assert told - empty < 100


def test_manifests_of_the_first_kind_are_read() -> None:
    text = (
        '{"manifest":1,"source":"model.onnx","source_sha256":"00","versions":{"onnx":"1"},"seed":3,'
        '"recipe":[{"name":"prune-magnitude","sparsity":0.8}],"decisions":"c-j@o!45?*5Cza*Y3_Om3md'
        ";8T?}u~gtqClkw^SHmM7;zWK~i017a#(s+||_a`_1?VG70PFB@uKrf__Cg#*+QR^Db4X5+FMW#V1TDJg(1Xyl|W|"
        'Is&fcUyZuV`n1?"}'
    )
    decision = Decision(
        where="w", taken=True, reason="half of it became zero", figures={"sparsity": 0.5}
    )
    assert Manifest.from_text(text) == manifest((("prune-magnitude", decision),))


def test_the_vocabulary_stays() -> None:
    """Manifests in files can be read with it alone: a change needs another kind of manifest."""
    assert hashlib.sha256(VOCABULARY).hexdigest()[:16] == "467367134e4589bb"


def test_a_newer_kind_is_refused() -> None:
    text = manifest(()).to_text().replace('"manifest":2', '"manifest":3')
    with pytest.raises(InvalidModelError, match="of kind 3; this version reads kinds up to 2"):
        Manifest.from_text(text)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"manifest": 1}', '{"manifest": [1]}', manifest(()).to_text()[:-9]]
)
def test_a_damaged_manifest_is_refused(text: str) -> None:
    with pytest.raises(InvalidModelError, match="damaged"):
        Manifest.from_text(text)


def report() -> Report:
    record = PassRecord(
        name="prune-magnitude",
        options={"sparsity": 0.8},
        changed=True,
        seconds=0.5,
        before_bytes=100,
        after_bytes=100,
        decisions=(
            Decision(where="w", taken=True, reason="pruned"),
            Decision(where="b", taken=False, reason="a bias is never pruned"),
        ),
    )
    return Report(
        source="model.onnx",
        source_sha256="00",
        versions={},
        seed=0,
        target="cpu",
        samples="4 feeds of calib.npz",
        passes=(record,),
        fidelity={"sqnr_db": math.inf},
        before={"file_bytes": 100},
        after={"file_bytes": 25},
    )


def test_a_report_is_json_with_infinities_as_text(tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text())
    assert plain["fidelity"]["sqnr_db"] == "inf"
    assert plain["passes"][0]["decisions"][1]["reason"] == "a bias is never pruned"
    assert (report().ratio, report().passes[0].taken) == (4.0, 1)


def test_a_report_is_json_or_html(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a report is \.json or \.html"):
        report().save(tmp_path / "report.txt")
    with pytest.raises(OutputError, match="No such file"):
        report().save(tmp_path / "missing" / "report.json")
