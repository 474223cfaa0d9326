"""Measure the runtime against bf16 transformers on one GPU: `prefixquant bench llama-3-8b`.

Results are checked against the operators' references first; where the check fails no speed-up is printed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, StaticCache

from prefixquant.kernels.dispatch import overlapped_launches, uses_triton
from prefixquant.kernels.timing import copy_rate, median_ms, record, steady_us
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.cache import cache_name
from prefixquant.tasks.model.shapes import SHAPES
from prefixquant.tasks.runtime.check import OperatorCheck
from prefixquant.tasks.runtime.model import QuantizedCausalLM
from prefixquant.tasks.runtime.modules import Coded, CodedBlock, CodedLinear, InputSite
from prefixquant.tasks.runtime.random_model import RandomSource
from prefixquant.tasks.runtime.source import FolderSource, Source

LINEAR_ROWS = (1, 16, 2048)
OVERLAPPED_BATCHES = (1, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What is measured."""

    prompt: int = 2048
    """Tokens of the prompt."""

    batches: tuple[int, ...] = (1, 64)
    """Sequences that are decoded together, each after a prompt."""

    blocks: int | None = None
    """Blocks of a model with random weights; None: as many as the shape has."""

    baseline: bool = True
    """Measure bf16 transformers as well."""

    compiled: bool = True
    """Measure it compiled by torch.compile too, which takes minutes."""

    dynamic: bool = True
    """Measure a scale a token beside static scales (random weights only)."""


@dataclass
class BenchReport:
    """What came out; `lines` is what a person reads, `figures` the same as numbers."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, float | str | bool] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def line(self, text: str) -> None:
        """Add a line, and show it."""
        self.lines.append(text)
        self.say(text)

    def figure(self, name: str, value: float | str | bool, text: str | None = None) -> None:
        """Add a number, and a line if there is one."""
        self.figures[name] = value
        if text:
            self.line(text)


def bench(model: str, config: BenchConfig, say: Callable[[str], None] = print) -> BenchReport:
    """Measure a folder that `prefixquant run --out` wrote, or a shape of `SHAPES` with random weights.

    Raises:
        ConfigError: there is no GPU with Triton, or the model is neither a folder nor a known shape.
    """
    if not torch.cuda.is_available() or not uses_triton(torch.empty(0, device="cuda")):
        raise ConfigError("bench measures kernels on a GPU; this machine has no CUDA GPU, or Triton is missing")
    device = torch.device("cuda")
    report = BenchReport(say=say)
    name = torch.cuda.get_device_name(device)
    report.figure("gpu", name, f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    rate = copy_rate()
    report.figure("copy_tb_s", rate / 1e12, f"copy within the GPU's memory: {rate / 1e12:.2f} TB/s read and written")
    with torch.inference_mode():
        source = _source(model, config, device)
        quantized = QuantizedCausalLM.build(source, device, torch.bfloat16)
        ok = _check(quantized, report) and _takes_the_same_steps(quantized, report)
        kind = "static" if _static(source) else "dynamic"
        _linears(quantized, report, ok, kind)
        _memory(quantized, source, report)
        times = _whole(quantized, config, report, rate, "packed")
        quantized.overlapping, name = False, "packed, launches one by one"
        _linears(quantized, report, ok, f"{kind}, {name}", rows=LINEAR_ROWS[:2])
        times |= _decode(quantized, config, report, rate, name)
        del quantized
        fast = QuantizedCausalLM.build(source, device, torch.bfloat16, fast_prompts=True)
        _linears(fast, report, ok, f"{kind}, weights as fp8 codes too", rows=(2048,))
        times |= _prompt(fast, config, report, "with fp8 codes")
        del fast
        if config.dynamic and isinstance(source, RandomSource) and _static(source):
            other = RandomSource(source.config, device, dynamic=True)
            quantized = QuantizedCausalLM.build(other, device, torch.bfloat16)
            _linears(quantized, report, _check(quantized, report), "dynamic")
            _whole(quantized, config, report, rate, "dynamic")
            del quantized
        if config.baseline:
            _compare(times, _baseline(source.config, config, report), report, ok)
    return report


def _source(model: str, config: BenchConfig, device: torch.device) -> Source:
    if model in SHAPES:
        return RandomSource(SHAPES[model].config(config.blocks), device)
    if Path(model).is_dir():
        return FolderSource(Path(model))
    raise ConfigError(f"{model} is neither a folder nor one of {', '.join(SHAPES)}")


def _static(source: Source) -> bool:
    return source.quantize.activations is not None and source.quantize.activations.mode == "static"


def _check(model: Any, report: BenchReport) -> bool:
    """Return whether every operator of the first block does what its reference does, for prompts and single tokens."""
    block = _blocks(model)[0]
    generator = torch.Generator("cuda").manual_seed(0)
    check = OperatorCheck()
    for tokens in (600, 200, 17, 1):
        size = (1, tokens, model.config.hidden_size)
        x = torch.randn(size, generator=generator, device="cuda").to(torch.bfloat16)
        positions = torch.arange(tokens, device="cuda").unsqueeze(0) + model.num_prefix_tokens
        tables = model.base_model.rotary_emb(x, positions)
        cache = model.new_cache(1, tokens)
        cache.begin(tokens)
        with check:
            block(x, position_embeddings=tables, packed_cache=cache)
    found = ", ".join(f"{name} {error:.2f}" for name, error in sorted(check.errors.items()))
    verdict = "right" if check.ok else "WRONG: no speed-up is printed"
    report.figures |= {f"check/{name}": error for name, error in check.errors.items()}
    report.line(f"operators against their references, difference over what is allowed: {found}: {verdict}")
    return check.ok


def _blocks(model: Any) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, CodedBlock)]


def _linears(model: Any, report: BenchReport, ok: bool, name: str, rows: tuple[int, ...] = LINEAR_ROWS) -> None:
    """Time a block's four products, inputs quantized on the way, beside bf16 products of the same shapes."""
    blocks = _blocks(model)[:4]
    first = _products(blocks[0])
    plain = [[_plain(linear) for linear, _ in _products(block)] for block in blocks]
    for count in rows:
        inputs = [_inputs(count, *each) for each in first]

        def coded(block: Any, inputs: list[Tensor] = inputs) -> None:
            for (linear, site), x in zip(_products(block), inputs, strict=True):
                linear(site(x))

        def bf16(weights: list[Tensor], inputs: list[Tensor] = inputs) -> None:
            for weight, x in zip(weights, inputs, strict=True):
                F.linear(x, weight)

        def alone(block: Any, codes: list[Coded]) -> None:
            for (linear, _), x in zip(_products(block), codes, strict=True):
                linear(x)

        codes = [site(x) for (_, site), x in zip(first, inputs, strict=True)]
        with overlapped_launches(model.overlapping):
            ours = steady_us([partial(coded, block) for block in blocks])
            products = steady_us([partial(alone, block, codes) for block in blocks])
            theirs = steady_us([partial(bf16, weights) for weights in plain])
        report.figures |= {f"linears/{name}/{count}/us": ours, f"linears/{name}/{count}/bf16_us": theirs}
        gain = f"{theirs / ours:.2f}x" if ok else "not compared"
        report.line(
            f"linears of a block, {name}, {count} tokens: {ours:.1f} us (products alone {products:.1f}), "
            f"bf16 {theirs:.1f} us: {gain}"
        )


def _inputs(tokens: int, linear: CodedLinear, site: InputSite) -> Tensor:
    """Return random inputs of a product; their deviation is a third of a static grid."""
    x = torch.randn(1, tokens, _width(linear), device="cuda")
    if site.scale is not None and site.bits is not None:
        x *= site.scale * (2 ** (site.bits - 1) / 3)
    return x.to(torch.bfloat16)


def _products(block: Any) -> list[tuple[CodedLinear, InputSite]]:
    attention, mlp = block.attention, block.mlp
    return [
        (attention.qkv, block.norm1.site),
        (attention.out, attention.site),
        (mlp.gate_up, block.norm2.site),
        (mlp.down, mlp.site),
    ]


def _width(linear: CodedLinear) -> int:
    return linear.weight.shape[1] * (2 if linear.weight.dtype == torch.uint8 else 1)


def _plain(linear: CodedLinear) -> Tensor:
    return torch.randn(linear.weight.shape[0], _width(linear), device="cuda", dtype=torch.bfloat16)


def _memory(model: Any, source: Source, report: BenchReport) -> None:
    """Compare the bytes of weights and of a cache of 2048 tokens with bf16."""
    linears = [linear for block in _blocks(model) for linear, _ in _products(block)]
    held = sum(tensor.nbytes for linear in linears for tensor in linear.buffers())
    plain = sum(2 * linear.weight.shape[0] * _width(linear) for linear in linears)
    cache = model.new_cache(1, 2048)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    ends = sum(model.get_submodule(name).weight.nbytes for name in ("lm_head", "model.embed_tokens"))
    config = source.config
    wide = 2 * 2 * 2048 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    share, whole = (held + kept) / (plain + wide), (held + kept + ends) / (plain + wide + ends)
    report.figures |= {"memory/blocks_share": share, "memory/model_share": whole}
    report.line(
        f"memory: block weights {held / 1e9:.2f} GB + KV of 2048 tokens {kept / 1e9:.3f} GB, {share:.3f} of bf16; "
        f"with 16-bit embedding and head {(held + kept + ends) / 1e9:.2f} GB, {whole:.3f} of bf16"
    )


def _prompt(model: Any, config: BenchConfig, report: BenchReport, name: str) -> dict[str, float]:
    ids = _ids(model.config, 1, config.prompt)

    def prompt() -> None:
        model(input_ids=ids, logits_to_keep=1)

    prompt()
    ms = median_ms(prompt, rounds=15, warmup=20)
    report.figure(f"prompt/{name}/ms", ms, f"prompt of 1 x {config.prompt}, {name}: {ms:.1f} ms")
    return {f"prompt/{name}": ms}


def _takes_the_same_steps(model: Any, report: BenchReport, steps: int = 20) -> bool:
    """Return whether steps with launches overlapped, as they are, give the logits of launches one by one."""
    same = all(_takes_the_same(model, _ids(model.config, batch, 64 + steps), steps) for batch in OVERLAPPED_BATCHES)
    report.figure("check/overlapped", same, f"overlapped launches give the same {steps} steps, to the bit: {same}")
    return same


def _takes_the_same(model: Any, ids: Tensor, steps: int) -> bool:
    def take() -> list[Tensor]:
        cached = {cache_name(model.base_model): model.new_cache(len(ids))}
        model.forward(input_ids=ids[:, :64], **cached)
        return [model(input_ids=ids[:, 64 + index, None], **cached).logits.clone() for index in range(steps)]

    found = take()
    model.overlapping = False
    same = all(torch.equal(*pair) for pair in zip(found, take(), strict=True))
    model.overlapping = True
    return same


def _whole(model: Any, config: BenchConfig, report: BenchReport, rate: float, name: str) -> dict[str, float]:
    """Time a prompt and, for each batch, a decoding step behind it."""
    return _prompt(model, config, report, name) | _decode(model, config, report, rate, name)


def _decode(model: Any, config: BenchConfig, report: BenchReport, rate: float, name: str) -> dict[str, float]:
    """Time a step of each batch behind a prompt's codes, which are random."""
    times = {}
    for batch in config.batches:
        cache = model.new_cache(batch, config.prompt + 64)
        for layer in cache.layers:
            layer.keys.random_(0, 256)
            layer.values.random_(0, 256)
        cache.filled = config.prompt
        cache.length.fill_(config.prompt)
        ids = _ids(model.config, batch, 1)
        step = {"input_ids": ids, cache_name(model.base_model): cache}
        for _ in range(3):  # loads the kernels, records the graph, replays it
            model(**step)
        ms = median_ms(partial(model, **step), rounds=20)
        kept = sum(layer.keys[:, :, : config.prompt].nbytes * 2 for layer in cache.layers)
        weights = sum(t.nbytes for b in _blocks(model) for t in b.buffers()) + model.lm_head.weight.nbytes
        share = (weights + kept) / (ms / 1e3) / rate
        report.figures |= {f"decode/{name}/{batch}/ms": ms, f"decode/{name}/{batch}/share_of_copy_rate": share}
        report.line(
            f"decode, batch {batch} after {config.prompt} tokens, {name}: {ms:.3f} ms a step, {batch / ms * 1e3:.0f} "
            f"tokens/s, reading {(weights + kept) / 1e9:.2f} GB at {share:.0%} of the copy rate"
        )
        times[f"decode/{name}/{batch}"] = ms
        del cache, step
    return times


def _ids(config: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(5, config.vocab_size, (batch, tokens), generator=generator, device="cuda")


def _baseline(config: Any, bench: BenchConfig, report: BenchReport) -> dict[str, float]:
    """Time transformers in bf16 with random weights: prompts eager and compiled, decoding as a CUDA graph."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.to_empty(device="cuda")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to("cuda")
    model.eval()
    times = {}
    ids = _ids(config, 1, bench.prompt)
    name = cache_name(model.base_model)
    compiled = torch.compile(model.forward, dynamic=False) if bench.compiled else None
    for kind, forward in (("eager", model.forward), ("compiled", compiled)):
        if forward is None:
            continue

        def prompt(forward: Any = forward) -> None:
            forward(input_ids=ids, logits_to_keep=1, use_cache=False)

        prompt()
        prompt()
        times[f"prompt/{kind}"] = ms = median_ms(prompt, rounds=15, warmup=20)
        report.figure(f"prompt/bf16 {kind}/ms", ms, f"prompt of 1 x {bench.prompt}, bf16 {kind}: {ms:.1f} ms")
        for batch in bench.batches:
            torch.cuda.empty_cache()
            cache = StaticCache(config=config, max_cache_len=bench.prompt + 64)
            head = torch.zeros(
                batch, config.num_key_value_heads, 1, config.head_dim, device="cuda", dtype=torch.bfloat16
            )
            for layer in cache.layers:
                layer.lazy_initialization(head, head)
                layer.cumulative_length.fill_(bench.prompt)
            token, positions = _ids(config, batch, 1), torch.full((batch, 1), bench.prompt, device="cuda")

            def step(forward: Any = forward, cache: Any = cache, ids: Any = token, at: Any = positions) -> None:
                for layer in cache.layers:
                    layer.cumulative_length.fill_(bench.prompt)
                forward(input_ids=ids, position_ids=at, **{name: cache})

            graph = record(step)
            times[f"decode/{kind}/{batch}"] = ms = median_ms(graph.replay, rounds=20)
            report.figure(
                f"decode/bf16 {kind}/{batch}/ms",
                ms,
                f"decode, batch {batch} after {bench.prompt} tokens, bf16 {kind}, as a CUDA graph: {ms:.3f} ms a step",
            )
            del cache, graph, step
    return times


def _compare(ours: dict[str, float], theirs: dict[str, float], report: BenchReport, ok: bool) -> None:
    if not ok:
        return
    for name, ms in ours.items():
        kind, _, rest = name.partition("/")
        batch = rest.rpartition("/")[2]
        for other, theirs_ms in theirs.items():
            same = other.startswith(kind) and (kind == "prompt" or other.endswith(f"/{batch}"))
            if same:
                report.figure(
                    f"speed-up/{name}/{other}", theirs_ms / ms, f"{name} against bf16 {other}: {theirs_ms / ms:.2f}x"
                )


def main() -> None:
    """Measure a shape with the defaults: `python -m prefixquant.tasks.runtime.bench SHAPE`, where typer is missing."""
    bench(sys.argv[1], BenchConfig(), say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
