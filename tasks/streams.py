"""The activations between blocks: kept on the GPU, in pinned host memory or on local disk, and read batch by batch.

Letters: N sequences (of this rank), B sequences of a batch, T tokens, D hidden.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prefixquant.tasks.errors import NumericalError

Place = Literal["device", "host", "disk"]

DEVICE_SHARE = 0.25
"""Most of the GPU's memory that all streams together may take; larger ones stay in host memory."""


def choose_place(total_bytes: int, device: torch.device, *, offload_to_disk: bool) -> Place:
    """Return where streams of so many bytes together are kept."""
    if offload_to_disk:
        return "disk"
    if device.type != "cuda":
        return "host"
    return "device" if total_bytes < DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory else "host"


@dataclass(frozen=True, slots=True)
class Stream:
    """Hidden states [N, T, D] entering or leaving a block."""

    data: Tensor
    """On the GPU, or on the CPU: pinned if a GPU computes, memory-mapped if it lies on disk."""

    device: torch.device
    """Where batches are wanted."""

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype, place: Place, device: torch.device) -> "Stream":
        """Return room for a stream. On disk it is a nameless file, which goes with the last reference to it."""
        if place == "device":
            return cls(torch.empty(*shape, dtype=dtype, device=device), device)
        if place == "host":
            return cls((_pinned if device.type == "cuda" else torch.empty)(shape, dtype=dtype), device)
        with tempfile.TemporaryDirectory(prefix="prefixquant-stream-") as folder:
            size, path = torch.Size(shape).numel(), Path(folder, "stream")
            with path.open("wb") as file:  # a full disk is an error now, not a signal at the first write
                os.posix_fallocate(file.fileno(), 0, max(1, size * dtype.itemsize))
            data = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        return cls(data.view(*shape), device)

    def __len__(self) -> int:
        return len(self.data)

    def part(self, start: int, stop: int) -> Tensor:
        """Return sequences of the stream on the device; the copy from pinned memory does not make the host wait."""
        part = self.data[start:stop]
        if self.device.type == "cuda" and self.data.device.type == "cpu" and not part.is_pinned():
            part = part.pin_memory()
        return part.to(self.device, non_blocking=True)


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return pinned host memory of this size, given back with the last reference to it.

    torch's own allocator takes the next power of two, 17 GB for a stream of 10, and keeps it for the process's life.
    """
    size = torch.Size(shape).numel()
    memory = mmap.mmap(-1, max(1, size) * dtype.itemsize)
    data = torch.frombuffer(memory, dtype=dtype)
    cuda: Any = torch.cuda.cudart()
    torch.cuda.check_error(cuda.cudaHostRegister(data.data_ptr(), len(memory), 0))
    weakref.finalize(memory, cuda.cudaHostUnregister, data.data_ptr()).atexit = False  # the process's end does it
    return data[:size].view(*shape)


def batches(streams: Sequence[Stream], starts: Sequence[int], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Give the sequences [start, start + size) of all streams, on the device, for every start in turn.

    From host memory the next batch is copied on a CUDA stream of its own while the present one is in use.
    """
    device = streams[0].device
    if device.type != "cuda" or all(stream.data.device.type == "cuda" for stream in streams):
        for start in starts:
            yield tuple(stream.part(start, start + size) for stream in streams)
        return
    copier = torch.cuda.Stream(device)

    def fetch(start: int) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
        with torch.cuda.stream(copier):
            parts = tuple(stream.part(start, start + size) for stream in streams)
            done = torch.cuda.Event()
            done.record(copier)
        return parts, done

    following = fetch(starts[0]) if len(starts) else None
    for index in range(len(starts)):
        assert following is not None
        parts, done = following
        following = fetch(starts[index + 1]) if index + 1 < len(starts) else None
        torch.cuda.current_stream(device).wait_event(done)
        for part in parts:
            part.record_stream(torch.cuda.current_stream(device))
        yield parts


@torch.no_grad()
def advance(function: Callable[[Tensor], Tensor], source: Stream, target: Stream, batch_size: int, where: str) -> None:
    """Write function(batch) of the source to the target, which may be the same stream.

    Raises:
        NumericalError: an output is NaN or infinite.
    """
    finite = torch.ones((), dtype=torch.bool, device=source.device)
    whole = len(source) - len(source) % batch_size
    for first, last, size in ((0, whole, batch_size), (whole, len(source), len(source) - whole)):
        starts = range(first, last, size or 1)
        for start, (part,) in zip(starts, batches([source], starts, size), strict=True):
            output = function(part)
            finite &= torch.isfinite(output).all()
            target.data[start : start + size].copy_(output, non_blocking=True)
    if not bool(finite):  # the one point that waits for the device: all copies are then done as well
        raise NumericalError(f"{where}: the output holds NaN or infinite values")
