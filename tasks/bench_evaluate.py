"""Time the perplexity of a whole model on one process and on several, each with a GPU of its own:
`python -m prefixquant.tasks.bench_evaluate --shape llama-3-8b --processes 2`.

Prints the seconds of both, their ratio to ideal (1.00: N processes take an Nth of the time), and whether the numbers
are the same; ends with status 1 if they are not. Needs neither Ray nor lm-eval.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from prefixquant.tasks.evaluate import Perplexity, merge_perplexity, model_nlls, share_of, windows_a_batch
from prefixquant.tasks.model.block import Block, block_shapes
from prefixquant.tasks.model.families import FAMILIES
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.whole import build_model
from prefixquant.tasks.processes import run_shards
from prefixquant.tasks.rotate import Ends

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"num_hidden_layers": 2, "vocab_size": 256},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"num_hidden_layers": 30, "vocab_size": 49152},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256},
}
PREFIX_TOKENS = 3


def random_model(shape: str, device: torch.device) -> Any:
    """Return a W4A4KV4 static model of a known shape with random weights and prefix, simulated as every one of ours."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    family, quantize, transforms = FAMILIES["llama"], QuantizeConfig(), OnlineTransforms(r3=True, r4=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shapes = block_shapes(config, 0)

    def matrix(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype) * size[-1] ** -0.5

    def blocks() -> Iterator[tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]]:
        for index in range(config.num_hidden_layers):
            weights = {n: matrix(*s) if len(s) > 1 else torch.ones(s, dtype=dtype) for n, s in shapes.items()}
            block = Block(config, family, index, weights, transforms=transforms, quantize=quantize, device=device)
            sites: dict[str, dict[str, Tensor]] = {}
            for name, site in block.sites.items():
                assert site.quantizer is not None
                site.quantizer.scale.fill_(0.4)
                sites[name] = site.quantizer.state_dict()
            yield weights, sites

    vocabulary, hidden, heads = config.vocab_size, config.hidden_size, config.num_key_value_heads
    ends = Ends(matrix(vocabulary, hidden), torch.ones(hidden, dtype=dtype), matrix(vocabulary, hidden))
    channels = hidden // config.num_attention_heads
    keys, values = (matrix(config.num_hidden_layers, heads, PREFIX_TOKENS, channels) for _ in "kv")
    return build_model(
        config, family, blocks(), ends, (keys, values), quantize=quantize, transforms=transforms, devices=[device]
    )


def load(source: str, device: torch.device) -> Any:
    """Return the model of a known shape, of an exported folder, or of any Hugging Face folder."""
    if source in SHAPES:
        return random_model(source, device)
    if Path(source, "prefixquant.json").is_file():
        from prefixquant.tasks.export import load_quantized

        return load_quantized(source, device=device)
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval().to(device)


@dataclass(frozen=True, slots=True)
class Share:
    """What one process did; times are of the machine's clock."""

    nlls: Tensor
    begun: float
    ended: float
    name: str
    peak_bytes: int


def meet(folder: Path, shard: int, shards: int, deadline_s: float = 540.0) -> None:
    """Return when all processes have come here, so that no one's loading disturbs another's measuring."""
    (folder / str(shard)).touch()
    end = time.monotonic() + deadline_s
    while len(list(folder.iterdir())) < shards:
        if time.monotonic() > end:
            raise TimeoutError(f"process {shard}: the other {shards - 1} have not loaded within {deadline_s:.0f} s")
        time.sleep(0.002)


def measure(
    shard: int, shards: int, devices: Sequence[torch.device], source: str, windows_NT: Tensor, folder: Path
) -> Share:
    """Load the model, warm up with one batch, wait for the others, then take this share of the windows."""
    device = devices[0]
    model = load(source, device)
    model_nlls(model, windows_NT[: windows_a_batch(windows_NT.shape[1])])
    meet(folder, shard, shards)
    begun = time.time()
    nll_N = model_nlls(model, share_of(windows_NT, shard, shards))  # ends on the CPU: the device is done by then
    ended = time.time()
    if device.type != "cuda":
        return Share(nll_N, begun, ended, "CPU", 0)
    peak = torch.cuda.max_memory_allocated(device)
    del model
    gc.collect()
    torch.cuda.empty_cache()  # a single share runs in the main process, and the next ones need the GPU
    return Share(nll_N, begun, ended, torch.cuda.get_device_name(device), peak)


def run(processes: int, device: str, source: str, windows_NT: Tensor) -> tuple[float, float, Perplexity, Share]:
    """Return seconds from the first start to the last end of evaluating, seconds of all, the result and one share."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        shares = run_shards(measure, source, windows_NT, Path(folder), shards=processes, device=device)
    whole = time.time() - start
    seconds = max(each.ended for each in shares) - min(each.begun for each in shares)
    return seconds, whole, merge_perplexity([each.nlls for each in shares], windows_NT.shape[1]), shares[0]


def main() -> None:
    """Parse the arguments, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="random weights of this shape")
    parser.add_argument("--model", help="a folder instead: one of ours, or any Hugging Face one")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="each count is compared with one")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    source = args.model or args.shape
    vocabulary = SHAPES[source]["vocab_size"] if source in SHAPES else AutoConfig.from_pretrained(source).vocab_size
    generator = torch.Generator().manual_seed(1)
    windows_NT = torch.randint(vocabulary, (args.windows, args.window), generator=generator)
    if args.device == "cpu":
        torch.set_num_threads(1)  # as many as a process has when several share the cores
    batches = -(-args.windows // windows_a_batch(args.window))
    one, one_whole, wanted, share = run(1, args.device, source, windows_NT)
    print(
        f"{source}: {args.windows} windows of {args.window} tokens in {batches} batches, {share.name}, "
        f"torch {torch.__version__}, {share.peak_bytes / 1e9:.1f} GB\n"
        f"1 process: {one:.2f} s evaluating, {one_whole:.1f} s with start and loading"
    )
    same = True
    for processes in args.processes:
        seconds, whole, found, _ = run(processes, args.device, source, windows_NT)
        ideal = -(-batches // processes) / batches
        same = same and found == wanted
        print(
            f"{processes} processes: {seconds:.2f} s evaluating, {whole:.1f} s with start and loading; "
            f"{seconds * processes / one:.3f} of ideal ({ideal * processes:.3f} is what whole batches allow); "
            f"the same numbers: {'yes' if found == wanted else f'no, {found.ppl!r} instead of {wanted.ppl!r}'}"
        )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
