"""Time the training of one block with random weights: `python -m prefixquant.tasks.bench_training --shape llama-3-8b`.

Prints seconds a step and an epoch, the share of the GPU's peak that the products reach, and the memory it took.
"""

import argparse
import time

import torch
from torch import Tensor
from transformers import LlamaConfig

from prefixquant.tasks.losses import mse
from prefixquant.tasks.model.block import Block, block_shapes
from prefixquant.tasks.model.families import FAMILIES
from prefixquant.tasks.model.quantizer import round_to_nearest
from prefixquant.tasks.model.shapes import SHAPES, ModelShape
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.trainable import make_trainable
from prefixquant.tasks.parallel import ParameterGroup
from prefixquant.tasks.steps import SingleRank
from prefixquant.tasks.train_block import BlockLoss

PREFIX_TOKENS = 3


def build(shape: ModelShape, device: torch.device) -> tuple[Block, tuple[Tensor, Tensor], list[ParameterGroup]]:
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
    keys = torch.randn(2, shape.kv_heads, PREFIX_TOKENS, head_dim, generator=generator, device=device)
    for each in trainables:
        each.parameter.requires_grad_(True)
    return block, (keys[0], keys[1]), [ParameterGroup([each.parameter]) for each in trainables]


def multiply_adds(shape: ModelShape, sequences: int, length: int) -> float:
    """Return the operations of one step: 6 a weight and token, and causal attention's products three times."""
    head_dim = shape.hidden // shape.heads
    parameters = shape.hidden * (2 * (shape.heads + shape.kv_heads) * head_dim + 3 * shape.intermediate)
    attention = 3 * 2 * 2 * sequences * shape.hidden * length * length / 2
    return 6.0 * parameters * sequences * length + attention


def main() -> None:
    """Parse the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="without a CUDA graph")
    parser.add_argument("--compile", action="store_true", help="torch.compile the block")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N kernels that take longest")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bf16, dense")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[args.shape]
    block, prefix, groups = build(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    size = args.batch_size, args.length, shape.hidden
    # In bfloat16, as streams of a bfloat16 model are kept.
    batch = [torch.randn(size, generator=generator, device=device).bfloat16() for _ in "xy"]
    module = BlockLoss(block, prefix, mse, compiled=args.compile)
    stepper = SingleRank(cuda_graph=not args.eager).stepper(module, groups, gradient_clip=0.3, precision="bf16")
    stepper.set_learning_rates([1e-5] * len(groups))
    losses = [float(stepper.step(*batch)[0]) for _ in range(3)]

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    synchronize()
    start = time.perf_counter()
    for _ in range(args.steps):
        stepper.step(*batch)
    synchronize()
    seconds = (time.perf_counter() - start) / args.steps
    flops = multiply_adds(shape, args.batch_size, args.length)
    if args.profile:
        with torch.profiler.profile() as profile:
            stepper.step(*batch)
            synchronize()
        averages = profile.key_averages()
        print(averages.table(sort_by="self_device_time_total", row_limit=args.profile, max_name_column_width=90))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    parameters = sum(each.numel() for group in groups for each in group.parameters)
    how = ("eager" if args.eager else "CUDA graph") + (", compiled" if args.compile else "")
    tflops = flops / seconds / 1e12
    print(
        f"{args.shape}: {parameters / 1e6:.1f} M parameters, {args.batch_size} x {args.length} tokens a step on "
        f"{name}, torch {torch.__version__}, {how}\n"
        f"loss {losses[0]:.6f} -> {losses[-1]:.6f} in 3 steps\n"
        f"{seconds * 1e3:.2f} ms a step, {seconds * 512 * 1024 / (args.batch_size * args.length):.2f} s an epoch "
        f"of 512 x 1024 tokens, {tflops:.0f} TFLOP/s, {tflops / args.peak_tflops * 100:.1f} % "
        f"of {args.peak_tflops:.0f}, {peak:.2f} GB"
    )


if __name__ == "__main__":
    main()
