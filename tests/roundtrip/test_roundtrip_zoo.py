"""The zoo: small models with one odd feature each."""

from pathlib import Path

import onnx
import pytest

from onnxslim_passes.model import load

from .cases import proto_case
from .compare import compare_models
from .judge import CONVERSIONS, Tally, judge, open_session, verdicts
from .zoo import ALL_TYPES, EXTERNAL_ZOO, ZOO, typed_constant


@pytest.mark.parametrize("name", ZOO)
def test_odd_model_survives(name: str) -> None:
    tally = Tally()
    for convert in CONVERSIONS.values():
        judge(proto_case(name, ZOO[name]), convert, tally)
    assert not tally.problems, "\n".join(tally.problems)


def test_zoo_is_mostly_runnable() -> None:
    """Models that ONNX Runtime refuses prove less; most must run."""
    runnable = [name for name, build in ZOO.items() if open_session(build())[0] is not None]
    assert len(ZOO) >= 200
    assert len(runnable) >= 0.85 * len(ZOO)


@pytest.mark.parametrize("external", [False, True, None])
@pytest.mark.parametrize("name", EXTERNAL_ZOO)
def test_external_data_survives(name: str, external: bool | None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    path = EXTERNAL_ZOO[name](source)
    target = tmp_path / "target" / "out.onnx"
    target.parent.mkdir()
    load(path).save(target, external=external)
    before, after = (onnx.load(p, load_external_data=False) for p in (path, target))
    differences = compare_models(before, after, expected_folder=source, got_folder=target.parent)
    assert not differences, "\n".join(map(str, differences))
    case = proto_case(name, lambda: onnx.load(path))
    assert not verdicts(case, onnx.load(path), onnx.load(target), Tally())


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("name", ALL_TYPES)
def test_every_type_survives_the_data_file(name: str, touched: bool, tmp_path: Path) -> None:
    """Large enough to be moved out; then read from there, and embedded again."""
    original = typed_constant(name, 8191)
    model = load(original)
    for constant in model.constants() if touched else ():
        constant.values = constant.values.copy()
    model.save(tmp_path / "out.onnx", external=True)
    assert (tmp_path / "out.onnx.data").stat().st_size >= 1024
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert not compare_models(original, written, got_folder=tmp_path)
    again = load(tmp_path / "out.onnx")
    for constant in again.constants() if touched else ():
        constant.values = constant.values.copy()
    for result in (again.to_proto(), again.copy().to_proto()):
        assert not compare_models(original, result)


@pytest.mark.parametrize("name", EXTERNAL_ZOO)
def test_touched_external_data_survives(name: str, tmp_path: Path) -> None:
    path = EXTERNAL_ZOO[name](tmp_path)
    model = load(path)
    for constant in model.constants():
        constant.values = constant.values.copy()
    differences = compare_models(
        onnx.load(path, load_external_data=False), model.to_proto(), expected_folder=tmp_path
    )
    assert not differences, "\n".join(map(str, differences))


@pytest.mark.parametrize("name", ZOO)
def test_edits_of_a_copy_leave_the_original_alone(name: str) -> None:
    model = load(ZOO[name]())
    before = model.to_proto()
    copy = model.copy()
    for constant in copy.constants():
        constant.values = constant.values.reshape(-1)[:0]
        constant.name += "_changed"
    for graph in copy.graphs():
        graph.name += "_changed"
        for node in graph.nodes:
            node.attrs.clear()
            node.name += "_changed"
            node.inputs.clear()
    assert model.to_proto() == before
    assert copy.to_proto() != before
