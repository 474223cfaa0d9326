"""Time the training of one block with random weights: `python -m prefixquant.tasks.bench_training --shape llama-3-8b`.

Prints seconds a step and an epoch, the share of the GPU's peak that the products reach, and the memory it took. With
`--variants` the same for older ways of taking the step, beside the default; each is checked first, the default as well:
its loss and the gradient of every weight must be as near to those of the step in float32 as they are in the older ways,
not compiled.

    lower-right      attention behind the prefix under a mask aligned to the last query and key
    plain-products   no forward products in fp8; differs from the default with --compile alone
    older            both
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from prefixquant.tasks.losses import mse
from prefixquant.tasks.model.block import Block, Prefix, block_shapes
from prefixquant.tasks.model.families import FAMILIES
from prefixquant.tasks.model.quantizer import round_to_nearest
from prefixquant.tasks.model.shapes import SHAPES, ModelShape
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.trainable import make_trainable
from prefixquant.tasks.model.ways import StepWays
from prefixquant.tasks.parallel import ParameterGroup
from prefixquant.tasks.steps import SingleRank
from prefixquant.tasks.train_block import BlockLoss

PREFIX_TOKENS = 3

VARIANTS = {
    "default": StepWays(),
    "lower-right": StepWays(attention="lower_right"),
    "plain-products": StepWays(code_products=False),
    "older": StepWays(attention="lower_right", code_products=False),
}

WIDTH = max(map(len, VARIANTS))

TOLERANCE = 1.25, 0.02
"""A way may be further from the step in float32 than the older ways are, by this factor and this much. All are far, for
values on the border of two codes fall to either side, and one in a hundred is worth a tenth of a gradient."""


def build(
    shape: ModelShape, device: torch.device, prefix_tokens: int = PREFIX_TOKENS
) -> tuple[Block, Prefix | None, list[ParameterGroup]]:
    """Return a trainable W4A4KV4 static block with random weights, a prefix for it, and its parameter groups."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=1,
        max_position_embeddings=8192,
        vocab_size=32,
    )
    family, quantize = FAMILIES["llama"], QuantizeConfig()
    generator = torch.Generator(device).manual_seed(0)
    weights = {
        name: torch.randn(size, generator=generator, device=device) * size[-1] ** -0.5
        if len(size) > 1
        else torch.ones(size, device=device)
        for name, size in block_shapes(config, 0).items()
    }
    transforms = OnlineTransforms(r3=True, r4=True)
    block = Block(config, family, 0, weights, transforms=transforms, quantize=quantize, device=device)
    for site in block.sites.values():
        assert site.quantizer is not None
        site.quantizer.scale.fill_(0.4)
    assert quantize.weights is not None
    originals = {role: weights.pop(f"{role}.weight") for role in family.linears}
    grids = {role: round_to_nearest(originals[role], quantize.weights, 0.7) for role in originals}
    trainables = make_trainable(block, originals, grids, quantize.weights)
    head_dim = shape.hidden // shape.heads
    keys = torch.randn(2, shape.kv_heads, prefix_tokens, head_dim, generator=generator, device=device)
    for each in trainables:
        each.parameter.requires_grad_(True)
    return (
        block,
        (keys[0], keys[1]) if prefix_tokens else None,
        [ParameterGroup([each.parameter]) for each in trainables],
    )


def multiply_adds(shape: ModelShape, sequences: int, length: int) -> float:
    """Return the operations of one step: 6 a weight and token, and causal attention's products three times."""
    head_dim = shape.hidden // shape.heads
    parameters = shape.hidden * (2 * (shape.heads + shape.kv_heads) * head_dim + 3 * shape.intermediate)
    attention = 3 * 2 * 2 * sequences * shape.hidden * length * length / 2
    return 6.0 * parameters * sequences * length + attention


@dataclass(frozen=True, slots=True)
class Step:
    """Loss and gradients of a first step, before clipping."""

    loss: float
    gradients: dict[str, Tensor]
    """By parameter, on the CPU."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a first step is from the same one in float32, each number relative."""

    loss: float
    weights: dict[str, float]
    """Norm of the difference over the norm, of each weight's gradient."""

    others: float
    """The largest of those of scales and gains."""

    def __str__(self) -> str:
        worst = max(self.weights, key=self.weights.__getitem__)
        where = worst.rpartition("layers.0.")[2]
        return (
            f"loss {self.loss:.1e}, gradients of weights up to {self.weights[worst]:.3f} ({where}), "
            f"of scales and gains {self.others:.3f}"
        )

    def agrees(self, wanted: "Distance") -> bool:
        """Return whether this is no further than the other, as far as can be told."""
        factor, more = TOLERANCE
        fits = all(each <= factor * wanted.weights[name] + more for name, each in self.weights.items())
        return fits and self.loss <= factor * wanted.loss + more


@dataclass(frozen=True, slots=True)
class Timing:
    """What many steps took."""

    losses: tuple[float, ...]
    """Of the steps before those that were timed."""

    seconds: float
    """A step, median of the rounds."""

    peak_bytes: int
    """Of GPU memory while stepping."""

    attention: str
    """The attention kernel of a step that ran longest; empty on the CPU."""


def problem(
    ways: StepWays, args: argparse.Namespace, device: torch.device, *, compiled: bool
) -> tuple[BlockLoss, list[ParameterGroup], list[Tensor]]:
    """Return the block as a loss, its parameter groups and a batch, always the same."""
    shape = SHAPES[args.shape]
    block, prefix, groups = build(shape, device, args.prefix_tokens)
    block.take_ways(ways)
    generator = torch.Generator(device).manual_seed(1)
    size = args.batch_size, args.length, shape.hidden
    # In bfloat16, as streams of a bfloat16 model are kept.
    batch = [torch.randn(size, generator=generator, device=device).bfloat16() for _ in "xy"]
    return BlockLoss(block, prefix, mse, compiled=compiled), groups, batch


def first_step(module: BlockLoss, batch: Sequence[Tensor], *, exact: bool = False) -> Step:
    """Return the loss and the gradients of a step under autocast, `exact`: in float32; no gradient stays behind."""
    names = {name: each for name, each in module.named_parameters() if each.requires_grad}
    for each in names.values():  # as the stepper has it, so that nothing is compiled twice
        each.grad_dtype = None
    with torch.autocast(batch[0].device.type, dtype=torch.bfloat16, enabled=not exact):
        loss: Tensor = module(*batch)
    loss.backward()
    gradients = {name: each.grad.cpu() for name, each in names.items() if each.grad is not None}
    module.zero_grad(set_to_none=True)
    return Step(float(loss.detach()), gradients)


def distance(mine: Step, exact: Step, device: torch.device) -> Distance:
    """Return how far a step is from the one in float32. Raises ValueError if one lacks a gradient of the other."""
    if mine.gradients.keys() != exact.gradients.keys():
        raise ValueError(f"gradients of {', '.join(mine.gradients.keys() ^ exact.gradients.keys())} are missing")
    apart = {}
    for name, value in exact.gradients.items():
        wanted, got = value.to(device).float(), mine.gradients[name].to(device).float()
        apart[name] = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    weights = {name: each for name, each in apart.items() if name.endswith("_proj.weight")}
    others = max(each for name, each in apart.items() if name not in weights)
    return Distance(abs(mine.loss / exact.loss - 1), weights, others)


def time_steps(
    module: BlockLoss,
    groups: list[ParameterGroup],
    batch: Sequence[Tensor],
    args: argparse.Namespace,
    device: torch.device,
) -> Timing:
    """Take steps and time them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stepper = SingleRank(cuda_graph=not args.eager).stepper(module, groups, gradient_clip=0.3, precision="bf16")
    stepper.set_learning_rates([1e-5] * len(groups))
    losses = tuple(float(stepper.step(*batch)[0]) for _ in range(3))
    rounds = []
    for _ in range(3):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(args.steps):
            stepper.step(*batch)
        _synchronize(device)
        rounds.append((time.perf_counter() - start) / args.steps)
    seconds = statistics.median(rounds)
    if device.type != "cuda":
        return Timing(losses, seconds, 0, "")
    peak = torch.cuda.max_memory_allocated(device)
    with torch.profiler.profile() as profile:
        stepper.step(*batch)
        _synchronize(device)
    averages = profile.key_averages()
    if args.profile:
        print(averages.table(sort_by="self_device_time_total", row_limit=args.profile, max_name_column_width=90))
    return Timing(losses, seconds, peak, _attention_kernel(averages))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _attention_kernel(averages: Any) -> str:
    """Return the name of the attention kernel that took longest."""
    known = ("flash", "fmha", "sdpa", "cudnn_generated", "attention")
    found = [each for each in averages if each.device_type.name == "CUDA" and any(k in each.key.lower() for k in known)]
    return max(found, key=lambda each: each.self_device_time_total).key[:60] if found else "none found"


def main() -> None:
    """Parse the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prefix-tokens", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of each of three rounds")
    parser.add_argument("--eager", action="store_true", help="without a CUDA graph")
    parser.add_argument("--compile", action="store_true", help="torch.compile the block")
    parser.add_argument(
        "--variants", nargs="+", choices=(*VARIANTS, "all"), default=["default"], help="ways of a step, compared"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N kernels that take longest")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bf16, dense")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[args.shape]
    chosen = list(VARIANTS) if "all" in args.variants else list(dict.fromkeys(["default", *args.variants]))
    flops = multiply_adds(shape, args.batch_size, args.length)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    how = ("eager" if args.eager else "CUDA graph") + (", compiled" if args.compile else "")
    print(
        f"{args.shape}: {args.batch_size} x {args.length} tokens a step behind {args.prefix_tokens} tokens on {name}, "
        f"torch {torch.__version__}, {how}",
        flush=True,
    )
    exact: Step | None = None
    if len(chosen) > 1:
        module, groups, batch = problem(VARIANTS["older"], args, device, compiled=False)
        exact = first_step(module, batch, exact=True)
        allowed = distance(first_step(module, batch), exact, device)
        del module, groups, batch  # the weights must not count in what the variants take
        print(f"older, not compiled; from float32: {allowed}", flush=True)
    wrong = []
    for variant in chosen:
        start = time.perf_counter()
        module, groups, batch = problem(VARIANTS[variant], args, device, compiled=args.compile)
        apart = None if exact is None else distance(first_step(module, batch), exact, device)
        found = time_steps(module, groups, batch, args, device)
        tflops = flops / found.seconds / 1e12
        print(
            f"{variant:{WIDTH}} {found.seconds * 1e3:8.2f} ms a step, "
            f"{found.seconds * 512 * 1024 / (args.batch_size * args.length):.2f} s an epoch of 512 x 1024 tokens, "
            f"{tflops:.0f} TFLOP/s, {tflops / args.peak_tflops * 100:.1f} % of {args.peak_tflops:.0f}, "
            f"{found.peak_bytes / 1e9:.2f} GB\n"
            f"{'':{WIDTH}} loss {found.losses[0]:.6f} -> {found.losses[-1]:.6f} in 3 steps; "
            f"{time.perf_counter() - start:.0f} s all told"
            + (f"; attention: {found.attention}" if found.attention else ""),
            flush=True,
        )
        if apart is not None:
            agrees = apart.agrees(allowed)
            wrong += [] if agrees else [variant]
            print(f"{'':{WIDTH}} {'right' if agrees else 'WRONG'}; from float32: {apart}", flush=True)
        del module, groups, batch
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if wrong:
        raise SystemExit(f"not the same step: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
