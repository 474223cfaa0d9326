"""What a GPU must not change: run with `pytest -m gpu` on a machine that has one."""

import pytest
import tiny
import torch
from inline import run_inline, small_recipe

from prefixquant.cluster.store import ArtifactStore
from prefixquant.kernels.hadamard import hadamard_transform
from prefixquant.pipeline.access import LazyInputs
from prefixquant.pipeline.materialize import materialize
from prefixquant.pipeline.stages import run_calibrate
from prefixquant.pipeline.worker import TaskContext
from prefixquant.tasks.calibrate import CalibrateConfig, calibrate_blocks
from prefixquant.tasks.evaluate import perplexity
from prefixquant.tasks.export import load_quantized
from prefixquant.tasks.find_prefix import down_input_peaks, prefix_key_values
from prefixquant.tasks.model.block import Block, block_prefix
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.quantize_block import quantize_block
from prefixquant.tasks.rotate import RotateConfig, rotate_block
from prefixquant.tasks.search import SearchConfig
from prefixquant.tasks.streams import Stream, advance, batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")


def block_on(device: torch.device) -> tuple[Block, torch.Tensor]:
    model = tiny.tiny_variant("llama")
    family = tiny.FAMILIES["llama"]
    weights = dict(model.model.layers[0].state_dict())
    rotated = rotate_block(weights, family, 16, 0, RotateConfig(), dtype=torch.float32, device=device)
    transforms = OnlineTransforms(r3=True, r4=True)
    block = Block(model.config, family, 0, rotated, transforms=transforms, quantize=QuantizeConfig(), device=device)
    stream = torch.randn(4, 32, 48, generator=torch.Generator().manual_seed(0))
    return block, stream.to(device)


@pytest.mark.parametrize("n", [64, 1536, 14336])
def test_hadamard_transform_on_gpu_equals_float64_on_cpu(n):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0))
    wanted = hadamard_transform(x.double())
    found = hadamard_transform(x.to(CUDA)).cpu().double()
    assert (found - wanted).norm() / wanted.norm() < 1e-6  # float32 arithmetic


def test_prefix_search_and_keys_on_gpu_equal_cpu():
    for function in (down_peaks, prefix_keys):
        torch.testing.assert_close(function(CUDA), function(tiny.CPU), rtol=1e-4, atol=1e-4)


def down_peaks(device: torch.device) -> torch.Tensor:
    block, stream = block_on(device)
    return down_input_peaks([block], stream, batch_size=2, device=device)


def prefix_keys(device: torch.device) -> torch.Tensor:
    block, stream = block_on(device)
    return prefix_key_values([block], stream[0, :3], device=device)[0]


def test_quantize_block_on_gpu_finds_the_error_of_the_cpu():
    found = []
    for device in (CUDA, tiny.CPU):
        block, stream = block_on(device)
        prefix = prefix_key_values([block], stream[0, :3], device=device)
        ranges = calibrate_blocks([block], prefix, stream, CalibrateConfig(), batch_size=2, device=device)[0]
        own = block_prefix(prefix, 0, device)
        spec = QuantizeConfig().weights
        found.append(quantize_block(block, ranges, stream, own, spec, SearchConfig(), batch_size=2))
    on_gpu, on_cpu = found
    # A GPU divides by a number as it multiplies by its inverse, so scales differ in their last bit, and the largest
    # weight of a row, 7.5 steps, lands on either side of the edge between two codes.
    assert on_gpu.error_before == pytest.approx(on_cpu.error_before, rel=0.06)
    assert on_gpu.error == pytest.approx(on_cpu.error, rel=0.06)


def test_perplexity_on_gpu_equals_cpu():
    model = tiny.tiny_variant("llama")
    windows = tiny.random_ids(3, 24)
    found = []
    for device in (CUDA, tiny.CPU):
        blocks = [(block.to(device), None) for block in tiny.build_blocks(model, RotateConfig(), None)]
        found.append(perplexity(blocks, tiny.build_ends(model, RotateConfig()), 1e-3, windows, device=device).ppl)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_loaded_model_on_gpu_equals_cpu(tmp_path):
    tiny.write_tiny_model(tmp_path / "model", blocks=2)
    store = ArtifactStore(str(tmp_path / "store"))
    graph, _, _ = run_inline(small_recipe(tmp_path, tmp_path / "model"), store)
    materialize(graph, store, tmp_path / "out", 2)
    ids = tiny.random_ids(2, 24)
    on_gpu = load_quantized(tmp_path / "out", device="cuda")(input_ids=ids.to(CUDA)).logits.cpu()
    on_cpu = load_quantized(tmp_path / "out")(input_ids=ids).logits
    # a value on a rounding boundary may move one code; a wrong device or scale would be far off
    assert (on_gpu - on_cpu).norm() / on_cpu.norm() < 0.05


def test_a_stream_in_host_memory_is_pinned_to_its_size_and_feeds_the_gpu():
    data = torch.randn(5, 100, 48, generator=torch.Generator().manual_seed(0))
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    stream = Stream.empty(data.shape, data.dtype, "host", CUDA)
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before  # not from torch's own allocator
    stream.data.copy_(data)
    assert stream.data.is_pinned()
    assert stream.data[2:].is_pinned()
    advance(lambda part: part * 2, stream, stream, 2, "here")
    torch.testing.assert_close(stream.data, data * 2)
    (part,) = next(iter(batches([stream], [1], 3)))
    torch.testing.assert_close(part.cpu(), data[1:4] * 2)


def test_what_outgrows_the_gpu_fits_in_two_parts_and_gives_the_same(tmp_path):
    tiny.write_tiny_model(tmp_path / "model", blocks=1, hidden_size=512, intermediate_size=4096)
    store = ArtifactStore(str(tmp_path / "store"))
    windows = {"sequences": 64, "length": 128}  # the 8192 tokens of one forward
    recipe = small_recipe(tmp_path, tmp_path / "model")
    recipe["data"]["statistics"] = windows
    graph, _, _ = run_inline(recipe | {"search": None}, store)
    node, keys = graph.nodes["calibrate"], graph.input_keys("calibrate")

    def calibrate(parts: int) -> dict[str, torch.Tensor]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        context = TaskContext(config=node.config, inputs=LazyInputs(store, keys), device=CUDA, parts=parts)
        return dict(run_calibrate(context).artifact.tensors)

    wanted = calibrate(1)
    whole = torch.cuda.max_memory_reserved()
    calibrate(2)
    halves = torch.cuda.max_memory_reserved()
    assert halves < 0.8 * whole
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((whole + halves) / 2 / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            calibrate(1)
        found = calibrate(2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():  # cuBLAS may add in another order where half as many rows pass at once
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
