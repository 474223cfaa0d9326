"""Prints name==version of what the project's dependencies bring, as installed here: makes constraints.txt."""

import re
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def pins(requirements: list[str]) -> dict[str, str]:
    """Return name -> version of these requirements and all that they need, without local labels such as +cpu."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(each), "") for each in requirements]
    while todo:
        requirement, extra = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, wanted))
            installed = distribution(name)
            found[name] = installed.version.partition("+")[0]
            todo += [(Requirement(each), wanted) for each in installed.requires or []]
    return found


if __name__ == "__main__":
    dependencies = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    print("# The versions that the tests ran with, on Python", ".".join(map(str, sys.version_info[:2])))
    print("# Made by `.venv/bin/python cluster/manifests/pin.py > cluster/manifests/constraints.txt`")
    for name, number in sorted(pins(dependencies).items()):
        print(f"{name}=={number}")
