import resource
import tempfile
from collections.abc import Iterator

import pytest
import tiny
import torch
from torch import Tensor

from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.streams import Stream, advance, batches, choose_place


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def stream_of(data: Tensor, place: str = "host") -> Stream:
    stream = Stream.empty(data.shape, data.dtype, place, tiny.CPU)
    stream.data.copy_(data)
    return stream


def numbers(count: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(count * 6, dtype=dtype).reshape(count, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_and_disk_hold_the_same(temporary, dtype):
    data = numbers(dtype=dtype)
    host, disk = stream_of(data, "host"), stream_of(data, "disk")
    for stream in (host, disk):
        assert len(stream) == 7
        assert stream.data.dtype == dtype
        advance(lambda part: part * 2 + 1, stream, stream, 3, "here")
    assert torch.equal(host.data, disk.data)
    assert torch.equal(disk.part(2, 5), data[2:5] * 2 + 1)


def test_a_stream_on_disk_leaves_no_file(temporary):
    stream = stream_of(numbers(), "disk")
    assert list(temporary.iterdir()) == []
    assert torch.equal(stream.data, numbers())


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of at most a megabyte: what a full disk is to a larger one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_on_disk_is_an_error_before_anything_is_written(temporary, small_files):
    with pytest.raises(OSError, match=r"\[Errno"):
        Stream.empty((2**10, 2**10), torch.float32, "disk", tiny.CPU)
    assert list(temporary.iterdir()) == []
    Stream.empty((2**7, 2**10), torch.float32, "disk", tiny.CPU)


def test_batches_come_in_the_order_asked_for():
    first, second = stream_of(numbers()), stream_of(-numbers())
    found = list(batches([first, second], [4, 0, 5], 2))
    for start, (one, other) in zip([4, 0, 5], found, strict=True):
        assert torch.equal(one, numbers()[start : start + 2])
        assert torch.equal(other, -one)
    assert list(batches([first], [], 2)) == []


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_advance_passes_every_sequence_once(batch):
    seen: list[int] = []

    def function(part: Tensor) -> Tensor:
        seen.append(len(part))
        return part + 1

    source, target = stream_of(numbers()), stream_of(torch.zeros(7, 3, 2))
    advance(function, source, target, batch, "here")
    assert torch.equal(target.data, numbers() + 1)
    assert torch.equal(source.data, numbers())
    assert sum(seen) == 7
    assert max(seen) <= batch
    advance(function, source, source, batch, "here")
    assert torch.equal(source.data, target.data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sequence", [0, 6])
def test_advance_names_where_an_output_is_not_finite(bad, sequence):
    stream = stream_of(numbers())
    stream.data[sequence, 1, 1] = bad
    with pytest.raises(NumericalError, match=r"^quantized stream, block 3: the output holds NaN or infinite values$"):
        advance(lambda part: part, stream, stream, 3, "quantized stream, block 3")


def test_streams_go_where_they_are_told_and_else_to_the_host():
    assert choose_place(1, tiny.CPU, offload_to_disk=True) == "disk"
    assert choose_place(1, tiny.CPU, offload_to_disk=False) == "host"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_every_place_gives_the_same_batches_on_the_gpu(place, temporary):
    device = torch.device("cuda", 0)
    stream = Stream.empty((7, 3, 2), torch.float32, place, device)
    stream.data.copy_(numbers())
    advance(lambda part: part * 2, stream, stream, 2, "here")
    found = [part.clone() for (part,) in batches([stream], [5, 0, 3], 2)]
    assert all(part.device.type == "cuda" for part in found)
    for start, part in zip([5, 0, 3], found, strict=True):
        assert torch.equal(part.cpu(), numbers()[start : start + 2] * 2)


def test_a_share_of_the_gpu_decides_between_device_and_host():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda", 0)
    assert choose_place(1, device, offload_to_disk=False) == "device"
    assert choose_place(2**60, device, offload_to_disk=False) == "host"
