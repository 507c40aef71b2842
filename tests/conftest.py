"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

SHARED_MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of large real models that lies beside a developer's checkout, if it is there."""
    if not (SHARED_MODELS / "tasks.py").is_file():
        pytest.skip("the folder of real models is not beside this checkout")
    return SHARED_MODELS
