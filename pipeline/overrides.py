"""Read YAML strictly and change single values of it by dotted name, as the command line does."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from prefixquant.tasks.errors import ConfigError

_OVERRIDE = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)=(?P<value>.*)", re.DOTALL)
_EXAMPLE = "write key=value, such as quantize.activations.bits=8"


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of nested `data` with every `dotted.path=YAML value` set, the last one winning.

    Groups on the way that are absent or off are replaced by empty ones, so the rest of their keys take the defaults.

    Raises:
        ConfigError: an override is malformed, or passes through a key that holds a value.
    """
    result = copy.deepcopy(dict(data))
    for override in overrides:
        match = _OVERRIDE.fullmatch(override.strip())
        if match is None:
            raise ConfigError(f"cannot read the override {override!r}; {_EXAMPLE}")
        if not match["value"].strip():
            raise ConfigError(f"the override {override!r} has no value; {_EXAMPLE}, or key=off")
        *parents, name = match["path"].split(".")
        group = result
        for depth, parent in enumerate(parents, start=1):
            inner = group.get(parent)
            if inner is None or inner is False or inner == "off":
                inner = group[parent] = {}
            if not isinstance(inner, dict):
                held = ".".join(parents[:depth])
                raise ConfigError(f"the override {override!r} passes through {held}, which holds {inner!r} and no keys")
            group = inner
        group[name] = read_yaml(match["value"], where=f"the override {override!r}")
    return result


def read_yaml(text: str, *, where: str) -> Any:
    """Return the value of one YAML document; `where` names it in messages.

    Unlike PyYAML's default, `5e-5` is a number, `2024-01-31` and `1:30` are text, and a key written twice is an error.

    Raises:
        ConfigError: the text is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML, {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML, {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the number syntax of YAML 1.2 and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node; a key that comes twice is an error."""
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is written twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_REPLACED = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789")
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.nan$"
    ),
    "-+.0123456789",
)
