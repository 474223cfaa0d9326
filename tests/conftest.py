"""Fixtures that several folders share; makes tests/tiny.py importable as `tiny` and finds the real model."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixquant.cluster.ray_session import RaySession, connect

# As `connect` does, but before a test imports Ray: every socket of it on loopback.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# A job that a shell starts in the background ignores SIGINT and hands that down; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """A local Ray of two CPUs and no GPU, one for the whole test run."""
    with connect(num_cpus=2, num_gpus=0, object_store_bytes=100 * 2**20) as session:
        yield session


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF file: PREFIXQUANT_TEST_MODEL, or where `make model` puts it."""
    default = TESTS.parent / ".cache" / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("PREFIXQUANT_TEST_MODEL", default))
    if not path.is_file():
        pytest.skip(f"{path} is missing: run make model")
    return path
