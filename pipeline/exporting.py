"""Export a profile of a finished run, or of the folder that a run wrote."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.materialize import copy_to, exported, new_folder
from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.export import is_exported
from prefixquant.tasks.profiles.export import ProfileExport, ProfileExportConfig, export_profile
from prefixquant.tasks.profiles.profile import Profile
from prefixquant.tasks.texts import TextConfig, cut_windows, read_documents, tokenize


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported."""

    folder: Path
    origin: dict[str, Any]
    """Recipe and perplexities of the run, if it is one."""
    planning: Tensor | None
    measuring: Tensor | None
    """Windows of the run's own texts, if it is one."""


def export(
    source: str,
    profile: Profile,
    out: Path,
    config: ProfileExportConfig,
    *,
    store_url: str,
    text: str | None = None,
    window: int = 1024,
    windows: int = 8,
    device: str | None = None,
) -> ProfileExport:
    """Write a profile of a run or folder to `out`, complete or not at all, and return what is known of it.

    Args:
        source: a run in the store, or a folder that `prefixquant run --out` wrote.
        profile: what is written.
        out: a new or empty folder, or an earlier export of ours.
        config: how.
        store_url: of the run.
        text: a text file or named set, for exemptions and perplexity. None: a run's own texts; a folder has none.
        window: tokens of a window of that text.
        windows: how many of them.
        device: where blocks run; None: a GPU if there is one.

    Raises:
        ConfigError, ParityError, CheckpointError, OutputError, ArtifactError: see `export_profile` and `new_folder`.
    """
    where = _device(device)
    with _opened(source, store_url, out) as found:
        planning, measuring = found.planning, found.measuring
        if text is not None:
            documents = read_documents(TextConfig(source=text, split="evaluation"))
            tokens = tokenize(AutoTokenizer.from_pretrained(found.folder), documents)
            planning = measuring = cut_windows(tokens, window, windows)
        with new_folder(out) as folder:
            return export_profile(
                found.folder,
                profile,
                folder,
                config,
                planning_NT=planning,
                measuring_NT=measuring,
                device=where,
                origin=found.origin,
            )


def _device(choice: str | None) -> torch.device:
    chosen = choice or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(f"--device {chosen}: {str(err).splitlines()[0]}; use cpu or cuda") from err
    return torch.device(chosen)


@contextmanager
def _opened(source: str, store_url: str, out: Path) -> Iterator[_Source]:
    """Give the folder of a run, written out for as long as it is needed, or the folder that is named."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not is_exported(path):
            raise CheckpointError(f"{path} is no folder of ours; give a run, or what `prefixquant run --out` wrote")
        yield _Source(path, {}, None, None)
        return
    store = ArtifactStore(store_url)
    if source not in store.run_ids():
        raise ConfigError(
            f"{source} is neither a folder nor a run in {store_url}; `prefixquant runs --store {store_url}` lists them"
        )
    record = store.read_ref(source)
    if record.get("status") != "finished":
        raise ConfigError(f"run {source} is {record.get('status')}; run its recipe to the end first")
    keys = record["keys"]
    inputs = store.manifest(keys["export"]).meta["inputs"]
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-run-", dir=out.absolute().parent) as folder:
        copy_to(Path(folder), exported(store, keys["export"], inputs))
        yield _Source(
            Path(folder),
            {"recipe": record["recipe"], "perplexity": record.get("ppl", [])},
            _windows(store, keys["tokens[search]"]),
            _windows(store, _evaluated(keys)),
        )


def _evaluated(keys: dict[str, str]) -> str | None:
    """Return the key of the first evaluation text's windows; None if the run had no text."""
    names = [name for name in keys if name.startswith("evaluate[quantized,")]
    return keys[f"tokens[{names[0].removeprefix('evaluate[quantized,').split(']')[0]}]"] if names else None


def _windows(store: ArtifactStore, key: str | None) -> Tensor | None:
    return None if key is None else load_artifact(store, key).tensors["windows"]
