"""Lower rooms never import higher ones."""

import ast
from pathlib import Path

import pytest

import onnxslim_passes

PACKAGE = Path(onnxslim_passes.__file__).parent

# From the lowest to the highest.
ROOMS = (
    "errors",
    "heap",
    "numerics",
    "model",
    "runtime",
    "report",
    "evaluation",
    "calibration",
    "storage",
    "training",
    "passes",
    "verification",
    "pipeline",
    "search",  # runs whole pipelines again, with other passes
    "recipe",
    "cli",
)

# Templates are copied to users, and never imported.
FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py" and "templates" not in path.parts
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    inside = [name.split(".") for name in names if name.startswith("onnxslim_passes.")]
    return {parts[1] for parts in inside} & set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS
    higher = {name for name in imported_rooms(path) if ROOMS.index(name) > ROOMS.index(room)}
    assert not higher


def test_only_the_model_room_knows_graphsurgeon() -> None:
    knowing = {room_of(path) for path in FILES if "onnx_graphsurgeon" in path.read_text()}
    assert knowing == {"model"}


def test_only_runtime_imports_onnx_runtime() -> None:
    knowing = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            if any(module.split(".")[0] == "onnxruntime" for module in modules):
                knowing.add(room_of(path))
    assert knowing == {"runtime"}
