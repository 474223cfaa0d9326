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
def _one_thread() -> Iterator[None]:
    """One thread: on busy cores the threads of a small product wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
