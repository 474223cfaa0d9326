import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_modules_is_a_package_that_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("pipeline", "tasks", "kernels", "cluster")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(listed) == sorted("prefixquant." + ".".join(folder.parts) for folder in folders)
