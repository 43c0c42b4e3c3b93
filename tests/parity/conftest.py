from typing import Any

import pytest


@pytest.fixture
def torch() -> Any:
    """torch, where it and transformers are installed; the test is skipped elsewhere."""
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")
