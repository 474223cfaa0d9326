"""What the tests of tasks share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(scope="session")
def smollm2_model(smollm2: Path) -> PreTrainedModel:
    """SmolLM2 as transformers reads it, float32. Not to be changed."""
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models: on busy cores the threads of a small product wait longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("real_model") else 1)
    yield
    torch.set_num_threads(before)
