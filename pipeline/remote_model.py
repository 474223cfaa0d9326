"""A Hugging Face folder at a URL: its small files are copied, its tensors read by ranges, one block at a time."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixquant.cluster.downloads import cache_folder
from prefixquant.cluster.remote_folder import RemoteFile, RemoteFolder
from prefixquant.tasks.errors import CheckpointError
from prefixquant.tasks.model.checkpoint import SINGLE_FILE, SafetensorsCheckpoint, parse_safetensors_header
from prefixquant.tasks.model.families import ModelFamily

_HEADER_BYTES = 256 * 2**10
"""Asked for at once; a header is rarely longer."""

_PAGE_BYTES = 4096

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class RemoteCheckpoint(SafetensorsCheckpoint):
    """A checkpoint at a URL. `path` is a local folder with its small files: config, tokenizer, index."""

    def __init__(self, url: str, files: dict[str, RemoteFile] | None = None) -> None:
        """`files`: what a listing of the folder has just said."""
        self._folder = RemoteFolder(url)
        self._files = self._folder.files() if files is None else files
        self._places: dict[str, tuple[str, int, int]] = {}
        if "config.json" not in self._files:
            raise CheckpointError(
                f"{url} has no config.json; a Hugging Face model folder is expected (a .gguf file is read locally only)"
            )
        super().__init__(copy_files(self._folder, self._files))

    def _exists(self, name: str) -> bool:
        return name in self._files

    def _header(self, shard: str) -> dict[str, Any]:
        if shard not in self._files:
            raise CheckpointError(f"{self._folder.url}/{shard} is missing; upload the shard again")
        size = self._files[shard].size
        begin = self._folder.read(shard, 0, min(size, _HEADER_BYTES))

        def read(start: int, stop: int) -> bytes:
            return begin[start:stop] if stop <= len(begin) else self._folder.read(shard, start, stop)

        header, base = parse_safetensors_header(read, size, f"{self._folder.url}/{shard}")
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            self._places[name] = (shard, base + start, base + stop)
        return header

    def read(self, name: str) -> Tensor:
        """Return one tensor as stored."""
        return self._read([name])[0]

    def read_block(self, family: ModelFamily, block: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors of one decoder block, by their name inside the block; asked for all at once."""
        wanted, prefix = list(names), family.block_prefix(block)
        return dict(zip(wanted, self._read([prefix + name for name in wanted]), strict=True))

    def _read(self, names: list[str]) -> list[Tensor]:
        places = [self._places[name] for name in names]
        tensors = []
        for name, (_, start, _), data in zip(names, places, self._folder.read_ranges(places), strict=True):
            info = self.tensors[name]
            tensors.append(_placed(data, start).view(_DTYPES[info.dtype]).view(info.shape))
        return tensors


def _placed(data: bytes, offset: int) -> Tensor:
    """Return bytes as a tensor that lies in memory as if the file were mapped there, of which it starts at `offset`.

    Matrix products differ in their last bits with the alignment of their operands; so a model gives the same artifacts
    from wherever it is read.
    """
    room = torch.empty(len(data) + _PAGE_BYTES, dtype=torch.uint8)
    shift = (offset - room.data_ptr()) % _PAGE_BYTES
    placed = room[shift : shift + len(data)]
    if data:
        placed.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return placed


def local_model(url: str) -> Path:
    """Return a local folder with copies of all files of the model at a URL. Raises CheckpointError if there is none."""
    folder = RemoteFolder(url)
    files = folder.files()
    if "config.json" not in files:
        raise CheckpointError(f"{url} has no config.json; a Hugging Face model folder is expected")
    return copy_files(folder, files, weights=True)


def is_large(name: str) -> bool:
    """Return whether a file of a model folder is one of its weights."""
    return name.endswith(".safetensors") or name == SINGLE_FILE


def copy_files(folder: RemoteFolder, files: dict[str, RemoteFile], *, weights: bool = False) -> Path:
    """Return a local folder with copies of a model's files as listed, without its weights unless asked for."""
    chosen = {name: each for name, each in sorted(files.items()) if weights or not is_large(name)}
    state = "\n".join(f"{folder.url} {name} {each.size} {each.tag}" for name, each in chosen.items())
    target = cache_folder() / "models" / hashlib.sha256(state.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=target.parent) as temporary:
        whole = Path(temporary, "model")
        whole.mkdir()
        for name in chosen:
            folder.download(name, whole / name)
        try:
            os.rename(whole, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    return target
