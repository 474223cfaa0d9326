"""How faithful the runtime is to the simulation that was evaluated (`prefixquant bench FOLDER --text FILE`).

In float64 both compute the same: `compare_exactly` runs each on its own, the runtime by its operators' references, and
finds the same logits. With fewer bits, two computations of one 4-bit model that round differently anywhere soon have
nothing but their statistics in common: a value on the edge between two codes tips over, what it changes tips others,
and after a few hundred tokens over thirty blocks the two are as far apart as two samples of the quantization noise. In
float64 no value lies so close to an edge. So `compare_with_simulation`, for the kernels and types that are used, tells
three things:

- block by block, each block of the runtime given what the simulation gives it: the difference that the runtime makes;
- run on their own, as they are used;
- the simulation against itself, its embeddings changed by a millionth: what two runs on their own can have in common.

Letters: N windows, T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.kernels.dispatch import references
from prefixquant.tasks.export import load_quantized
from prefixquant.tasks.runtime.model import QuantizedCausalLM

CHANGE = 1e-6
"""Relative change of each value of the embeddings, times a normal number, in the simulation that is compared with
itself."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """What simulation and runtime have in common in float64, each running on its own."""

    tokens: int
    same_argmax: float
    """Share of tokens with the same most likely next token."""

    logit_error: float
    """Largest difference of two logits, over the root mean square of a window's."""

    ppl_simulation: float
    ppl_runtime: float

    def to_json(self) -> dict[str, float]:
        """Return it as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """Return it in lines."""
        change = self.ppl_runtime / self.ppl_simulation - 1
        return (
            f"{self.tokens} tokens, on their own: same argmax on {self.same_argmax:.3%}, largest logit error "
            f"{self.logit_error:.1e}\n"
            f"  perplexity {self.ppl_runtime:.10f} against {self.ppl_simulation:.10f} in the simulation ({change:+.1e})"
        )


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """What two computations of one model have in common. Shares are of tokens."""

    tokens: int
    same_argmax: float
    """The same most likely next token, all that the runtime's blocks change added up, each given the simulation's
    input."""

    block_error: float
    """Largest difference of a block's output, over what the block adds to the stream; root mean squares."""

    same_argmax_free: float
    """The same most likely next token, each running on its own."""

    same_argmax_control: float
    """Likewise the simulation and the simulation with changed embeddings."""

    ppl_simulation: float
    ppl_runtime: float
    ppl_control: float
    change: float
    """Of the embeddings in the control, relative."""

    def to_json(self) -> dict[str, float]:
        """Return it as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """Return it in lines."""
        runtime, control = (each / self.ppl_simulation - 1 for each in (self.ppl_runtime, self.ppl_control))
        return (
            f"{self.tokens} tokens; block by block: same argmax on {self.same_argmax:.3%}, largest block error "
            f"{self.block_error:.2%}\n"
            f"  on their own: same argmax on {self.same_argmax_free:.3%}, perplexity {self.ppl_runtime:.4f} against "
            f"{self.ppl_simulation:.4f} in the simulation ({runtime:+.3%})\n"
            f"  simulation with embeddings changed by {self.change:.0e}: same argmax on "
            f"{self.same_argmax_control:.3%}, perplexity {self.ppl_control:.4f} ({control:+.3%})"
        )


@torch.inference_mode()
def compare_exactly(folder: Path, windows_NT: Tensor, *, device: torch.device) -> Exactness:
    """Compare the runtime with the simulation, both in float64; the operators of both run as their references."""
    simulation = load_quantized(folder, device=device, dtype=torch.float64)
    runtime = QuantizedCausalLM.load(folder, device=device, dtype=torch.float64)
    runtime.recording = False  # graphs hold kernels
    same, losses, errors = 0, [0.0, 0.0], []
    for window_T in windows_NT.to(device):
        with references():
            logits = [model(input_ids=window_T.unsqueeze(0)).logits[0] for model in (simulation, runtime)]
        wanted_TV, found_TV = logits
        same += int((found_TV.argmax(-1) == wanted_TV.argmax(-1)).sum())
        errors.append(float((found_TV - wanted_TV).abs().max() / wanted_TV.square().mean().sqrt()))
        losses = [before + _loss(each_TV, window_T) for before, each_TV in zip(losses, logits, strict=True)]
    return Exactness(windows_NT.numel(), same / windows_NT.numel(), max(errors), *_perplexities(losses, windows_NT))


@torch.inference_mode()
def compare_with_simulation(
    folder: Path, windows_NT: Tensor, *, device: torch.device, dtype: torch.dtype
) -> Faithfulness:
    """Compare the runtime, in `dtype` between the products, with the simulation in the type it was exported in."""
    simulation = load_quantized(folder, device=device)
    runtime = QuantizedCausalLM.load(folder, device=device, dtype=dtype)
    runtime.recording = False  # hooks are to see each forward
    same, losses = [0, 0, 0], [0.0, 0.0, 0.0]
    errors: list[float] = []
    for window_T in windows_NT.to(device):
        ids = window_T.unsqueeze(0)
        with seen_streams(simulation) as streams:
            wanted_TV = simulation(input_ids=ids).logits[0].float()
        with _changed_embeddings(simulation):
            control_TV = simulation(input_ids=ids).logits[0].float()
        free_TV = runtime(input_ids=ids).logits[0].float()
        with given_streams(runtime, streams[:-1]) as outputs:
            runtime(input_ids=ids)
        last_TD, change_TD = streams[-1], torch.zeros_like(streams[-1])
        for before_TD, after_TD, found_TD in zip(streams, streams[1:], outputs, strict=False):
            error_TD = found_TD.to(after_TD.dtype) - after_TD
            change_TD += error_TD
            errors.append(float(error_TD.norm() / (after_TD - before_TD).norm()))
        added_TV = simulation.get_output_embeddings()(simulation.base_model.norm(last_TD + change_TD))[0].float()
        best_T = wanted_TV.argmax(-1)
        for index, each_TV in enumerate((added_TV, free_TV, control_TV)):
            same[index] += int((each_TV.argmax(-1) == best_T).sum())
        for index, each_TV in enumerate((wanted_TV, free_TV, control_TV)):
            losses[index] += _loss(each_TV, window_T)
    together, free, control = (each / windows_NT.numel() for each in same)
    simulated, computed, changed = _perplexities(losses, windows_NT)
    change = _change_in(simulation.get_input_embeddings().weight.dtype)
    return Faithfulness(
        windows_NT.numel(), together, max(errors), free, control, simulated, computed, changed, change=change
    )


def _loss(logits_TV: Tensor, window_T: Tensor) -> float:
    """Return the sum of the window's losses, of all tokens but the first."""
    return float(F.cross_entropy(logits_TV[:-1], window_T[1:], reduction="sum"))


def _perplexities(losses: list[float], windows_NT: Tensor) -> list[float]:
    return [math.exp(each / (windows_NT.numel() - len(windows_NT))) for each in losses]


@contextmanager
def seen_streams(model: Any) -> Iterator[list[Tensor]]:
    """Give the list that the next forward fills with what enters each block, and with what leaves the last."""
    streams: list[Tensor] = []
    layers = model.base_model.layers
    handles = [layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda _, args, output: streams.append(output)))
    try:
        yield streams
    finally:
        for each in handles:
            each.remove()


@contextmanager
def given_streams(model: Any, streams: list[Tensor]) -> Iterator[list[Tensor]]:
    """Have each block take one of the streams, and give the list that the next forward fills with their outputs."""
    outputs: list[Tensor] = []
    handles = []
    for layer, stream in zip(model.base_model.layers, streams, strict=True):
        given = stream.to(model.device, model.dtype)
        handles.append(layer.register_forward_pre_hook(lambda _, args, given=given: (given, *args[1:])))
        handles.append(layer.register_forward_hook(lambda _, args, output: outputs.append(output)))
    try:
        yield outputs
    finally:
        for each in handles:
            each.remove()


def _change_in(dtype: torch.dtype) -> float:
    """Return `CHANGE`, or the least change that a type with fewer digits shows."""
    return max(CHANGE, torch.finfo(dtype).eps)


@contextmanager
def _changed_embeddings(model: Any) -> Iterator[None]:
    def change(_module: Any, _args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator(output.device).manual_seed(0)
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        return (output * (1 + _change_in(output.dtype) * noise)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
