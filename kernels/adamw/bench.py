"""Times an AdamW update against torch's fused one on one GPU: `python -m prefixquant.kernels.adamw.bench`."""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]  # has no types

from prefixquant.kernels.timing import median_ms, record

from . import adamw_step, total_norm

SHAPES = {
    "gate_proj of Llama-3-8B": (14336, 4096),
    "o_proj of Llama-3-8B": (4096, 4096),
    "up_proj of SmolLM2-135M": (1536, 576),
}
BETAS, EPS, RATE = (0.9, 0.999), 1e-8, 1e-4


def main() -> None:
    """Print a line for every shape and type of gradient."""
    if not torch.cuda.is_available():
        raise SystemExit("adamw.bench needs a CUDA GPU, found none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("medians; GB/s of the bytes that must move: four tensors read, three of them written")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            _compare(f"{name}, {dtype}".replace("torch.", ""), shape, dtype)


def _compare(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, device="cuda", generator=generator))
    gradient = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    rate = torch.tensor(RATE, device="cuda")
    theirs = torch.optim.AdamW(
        [parameter], lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True, capturable=True
    )
    parameter.grad = gradient.float()
    own = parameter.detach().clone()
    moments = [torch.zeros_like(own), torch.zeros_like(own)]
    step, divisor = torch.ones((), device="cuda"), torch.ones((), device="cuda")

    def ours() -> None:
        adamw_step(
            [own], [gradient], [moments[0]], [moments[1]],
            rates=[rate], decays=[0.0], step=step, divisor=divisor, betas=BETAS, eps=EPS,
        )  # fmt: skip

    ours()
    theirs.step()
    error = float((own - parameter.detach()).abs().max())
    if not error <= 1e-2 * RATE:  # of the first update, which moves every value by about the rate
        print(f"{name}: off by {error:.2g} from torch; not timed")
        return
    size = own.numel()
    num_bytes = size * (24 + gradient.element_size())
    calls = ours, theirs.step, lambda: total_norm([gradient])
    ms, torch_ms, norm_ms = (median_ms(record(call).replay, rounds=30, warmup=5) for call in calls)
    print(
        f"{name}: {ms:.3f} ms, {num_bytes / ms / 1e6:.0f} GB/s; torch's fused on float32 {torch_ms:.3f} ms, "
        f"{28 * size / torch_ms / 1e6:.0f} GB/s; norm {norm_ms:.3f} ms, {gradient.nbytes / norm_ms / 1e6:.0f} GB/s"
    )


if __name__ == "__main__":
    main()
