import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

from prefixquant.cluster.shipping import PARTS, stage_package

ROOT = Path(__file__).resolve().parents[2]


def test_parts_are_the_subpackages_that_the_project_installs():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {f"prefixquant.{part}" for part in PARTS} == set(settings["package-dir"])


@pytest.fixture
def bare_python(tmp_path):
    """An interpreter that has this one's dependencies and no prefixquant."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # A path in a .pth file is only searched, its own .pth files (the editable installation) are not read.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return tmp_path / "venv" / "bin" / "python"


def test_a_python_without_the_package_runs_the_staged_copy(tmp_path, bare_python):
    stage = tmp_path / "stage"
    paths = stage_package(stage)
    assert {path.parent for path in paths} == {stage}
    assert not list(stage.rglob("__pycache__"))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments, **env):
        command = [bare_python, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean | env, check=False)

    assert run("-c", "import prefixquant.cluster").returncode != 0
    script = "import prefixquant.tasks as t, importlib.metadata as m; print(t.__file__, m.version('prefixquant'))"
    assert run("-c", script, PYTHONPATH=str(stage)).stdout.split() == [
        str(stage / "prefixquant" / "tasks" / "__init__.py"),
        version("prefixquant"),
    ]
    help_text = run("-m", "prefixquant.pipeline", "run", "--help", PYTHONPATH=str(stage))
    assert "--address" in help_text.stdout, help_text.stderr
    recipes = sorted(path.name for path in (stage / "prefixquant" / "pipeline" / "recipes").iterdir())
    assert recipes == sorted(path.name for path in (ROOT / "pipeline" / "recipes").glob("*.yaml"))
