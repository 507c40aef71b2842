"""What `onnxslim_passes` offers at its top."""

import subprocess
import sys

import pytest

import onnxslim_passes


@pytest.mark.parametrize("name", onnxslim_passes.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(onnxslim_passes, name).__name__ == name if name != "PASSES" else True


def test_every_pass_is_public() -> None:
    kinds = {kind.__name__ for kind in onnxslim_passes.PASSES.values()}
    assert kinds <= set(onnxslim_passes.__all__)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = onnxslim_passes.Nothing


def test_the_top_imports_nothing_heavy() -> None:
    code = "import sys, onnxslim_passes as p; print({'onnx', 'onnxruntime'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_recipes_without_clusters_or_placement_import_neither_of_their_libraries() -> None:
    """scikit-learn takes a second and 75 MB, which is more than quantizing a small model takes."""
    code = (
        "import sys; import onnxslim_passes.pipeline, onnxslim_passes.recipe as r; "
        "r.Recipe.open('int8'); heavy = {'sklearn', 'scipy', 'onnxslim_passes.training'}; "
        "print(heavy & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
