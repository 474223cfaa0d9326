"""Makes tests/tiny.py importable as `tiny` and finds the real model."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF file: PREFIXQUANT_TEST_MODEL, or where `make model` puts it."""
    default = TESTS.parent / ".cache" / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("PREFIXQUANT_TEST_MODEL", default))
    if not path.is_file():
        pytest.skip(f"{path} is missing: run make model")
    return path
