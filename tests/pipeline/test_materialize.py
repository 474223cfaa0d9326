"""The output folder: complete or not at all, never over anything that is not ours."""

import errno
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from inline import run_inline, small_recipe

from prefixquant.cluster.store import ArtifactCorrupted, ArtifactStore
from prefixquant.pipeline.artifacts import TENSORS
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.materialize import OutputError, check_output, materialize
from prefixquant.tasks.export import DESCRIPTION, ENDS_FILE, PREFIX_FILE, block_file, load_quantized

BLOCKS = 2
NO_TEXTS = {"texts": [], "full_precision": False}


class Finished:
    """A finished run whose folder is not written yet."""

    def __init__(self, folder: Path, **groups) -> None:
        if not (folder / "model").exists():
            tiny.write_tiny_model(folder / "model", blocks=BLOCKS)
        self.store = ArtifactStore(str(folder / "store"))
        self.graph: Graph
        self.graph, _, _ = run_inline(small_recipe(folder, folder / "model", evaluate=NO_TEXTS, **groups), self.store)

    def write(self, folder: Path) -> None:
        materialize(self.graph, self.store, folder, BLOCKS)

    def shards(self) -> dict[str, str]:
        """File of the folder -> SHA-256 of the artifact it copies."""
        nodes = {block_file(0): "block[0]", block_file(1): "block[1]", ENDS_FILE: "rotate[ends]", PREFIX_FILE: "prefix"}
        return {file: self.store.manifest(self.graph.key(node)).files[TENSORS].sha256 for file, node in nodes.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def finished(home) -> Finished:
    return Finished(home)


@pytest.fixture(scope="module")
def other(home, finished) -> Finished:
    """Another recipe on the same model and store, without a prefix."""
    return Finished(home, prefix={"tokens": []}, quantize={"weights": {"bits": 3}})


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_folder_holds_the_stored_bytes_and_nothing_else(finished, tmp_path):
    finished.write(tmp_path / "deep" / "out")
    found = digests(tmp_path / "deep" / "out")
    export = finished.store.manifest(finished.graph.key("export")).files
    small = {name: entry.sha256 for name, entry in export.items() if name != "record.json"}
    assert found == small | finished.shards()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_folder_can_be_read_by_others(finished, tmp_path):
    finished.write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_earlier_export_is_replaced_whole(finished, other, tmp_path):
    out = tmp_path / "out"
    finished.write(out)
    before = digests(out)
    assert PREFIX_FILE in before
    other.write(out)
    after = digests(out)
    assert PREFIX_FILE not in after
    assert after[block_file(0)] != before[block_file(0)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_quantized(out)


def test_empty_folder_is_used(finished, tmp_path):
    (tmp_path / "out").mkdir()
    finished.write(tmp_path / "out")
    assert (tmp_path / "out" / DESCRIPTION).is_file()


def test_folder_with_other_files_is_refused_and_untouched(finished, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds other files; give a new or empty folder"):
        finished.write(tmp_path)
    assert digests(tmp_path).keys() == {"thesis.tex"}


def test_file_in_place_of_the_folder_is_refused(finished, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        check_output(tmp_path / "out")
    with pytest.raises(OutputError, match="is a file"):
        finished.write(tmp_path / "out")


def test_folder_below_a_file_cannot_be_written(finished, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot be written .*; the run is stored"):
        finished.write(tmp_path / "file" / "out")


def test_damaged_artifact_leaves_the_earlier_export_and_no_temporary_folder(finished, home, tmp_path):
    shutil.copytree(home / "store", tmp_path / "store")
    store, out = ArtifactStore(str(tmp_path / "store")), tmp_path / "new" / "out"
    finished.write(out)
    before = digests(out)
    path = store.local_path(finished.graph.key("block[1]"), TENSORS)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactCorrupted, match=finished.graph.key("block[1]")):
        materialize(finished.graph, store, out, BLOCKS)
    assert digests(out) == before
    assert [each.name for each in out.parent.iterdir()] == ["out"]


def test_full_disk_leaves_the_earlier_export_and_no_temporary_folder(finished, tmp_path):
    size = sum(finished.store.size(finished.graph.key(name)) for name in finished.graph.parents("export"))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)]  # one export, not two
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"mounting is not permitted here: {err}")
    try:
        finished.write(disk / "out")
        before = digests(disk / "out")
        with pytest.raises(OutputError, match=r"No space left .*free space or choose another folder") as raised:
            finished.write(disk / "out")
        assert isinstance(raised.value.__cause__, OSError)
        assert raised.value.__cause__.errno == errno.ENOSPC
        assert digests(disk / "out") == before
        assert [each.name for each in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
