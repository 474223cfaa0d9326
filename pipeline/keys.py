"""Artifact keys: what an artifact's identity is made of, and nothing else."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from prefixquant.tasks.errors import ConfigError


def node_key(task: str, version: int, config: object, inputs: Mapping[str, str | tuple[str, ...]]) -> str:
    """Return the key of an artifact: 64 hex characters.

    Args:
        task: name of the task.
        version: version of the task; a new one gives new keys.
        config: the node's frozen dataclass, or None. Raises ConfigError if it holds anything JSON has no word for.
        inputs: argument name -> key of the producer, or keys of the producers.
    """
    identity = [task, version, plain_config(config), {name: _plain(keys, name) for name, keys in inputs.items()}]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def outside_key() -> dict[str, bool]:
    """Return the metadata of a config field that says where to find something, not what it is: no part of the key."""
    return {"in_key": False}


def plain_config(config: object) -> Any:
    """Return the config as nested dicts, lists and JSON scalars, without fields outside the key.

    Raises ConfigError naming the field that is none of these.
    """
    return _plain(config, type(config).__name__)


def flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a plain config by dotted path: {"weights.bits": 4, "layers[0]": 1}; {} for None."""
    if isinstance(value, dict) and value:
        parts = [flatten(item, f"{prefix}.{name}" if prefix else name) for name, item in value.items()]
    elif isinstance(value, list) and value:
        parts = [flatten(item, f"{prefix}[{index}]") for index, item in enumerate(value)]
    else:
        return {prefix: value} if prefix else {}
    return {path: leaf for part in parts for path, leaf in part.items()}


def _plain(value: object, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [each for each in dataclasses.fields(value) if each.metadata.get("in_key", True)]
        return {each.name: _plain(getattr(value, each.name), f"{where}.{each.name}") for each in fields}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{where} has names that are not text: {list(value)}; an artifact key is made of JSON")
        return {name: _plain(item, f"{where}[{name!r}]") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value}; an artifact key needs a finite number, and None for an absent one")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(
        f"{where} is a {type(value).__name__} ({value!r}); an artifact key is made of dataclasses, text, numbers, "
        f"booleans, lists and None: convert it in the config"
    )
