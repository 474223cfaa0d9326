"""Fixtures that several folders share."""

from collections.abc import Iterator

import pytest

from prefixquant.cluster.ray_session import RaySession, connect


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """A local Ray of two CPUs and no GPU, one for the whole test run."""
    with connect(num_cpus=2, num_gpus=0, object_store_bytes=100 * 2**20) as session:
        yield session
