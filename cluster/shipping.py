"""This package, as it is imported here, laid out so that a Ray cluster which lacks it can be given it."""

import importlib.util
import shutil
from importlib.metadata import version
from pathlib import Path

PACKAGE = "prefixquant"
PARTS = ("pipeline", "tasks", "kernels", "cluster")
"""The subpackages. Top-level folders in a checkout and folders of one package in an installation; both are found."""

_NOT_CODE = shutil.ignore_patterns("__pycache__", "manifests")


def stage_package(folder: Path) -> list[Path]:
    """Copy the package's code and its version into an empty folder and return what belongs in Ray's `py_modules`.

    Folders rather than a wheel: Ray names a folder by its content, and a wheel by its file name, so that a changed
    wheel of the same version would not be sent again. A folder also installs no dependencies over the cluster's own.
    """
    package = folder / PACKAGE
    for part in PARTS:
        spec = importlib.util.find_spec(f"{PACKAGE}.{part}")
        assert spec is not None, f"{PACKAGE}.{part} is not importable"
        assert spec.submodule_search_locations is not None, f"{PACKAGE}.{part} is no package"
        shutil.copytree(spec.submodule_search_locations[0], package / part, ignore=_NOT_CODE)
    number = version(PACKAGE)
    metadata = folder / f"{PACKAGE}-{number}.dist-info"  # where `importlib.metadata.version` looks
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {number}\n")
    return [package, metadata]
