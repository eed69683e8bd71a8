"""The built package holds what the tree holds, although two of its folders are links."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from steer_compile._version import __version__
from tests import _tree

PACKAGE = _tree.ROOT / "steer_compile"


def _files_below(folder: Path) -> set[str]:
    """Relative paths of the files below a folder, links followed, caches left out."""
    return {
        Path(at, name).relative_to(folder).as_posix()
        for at, _, names in os.walk(folder, followlinks=True)
        for name in names
        if "__pycache__" not in at
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a source archive that was built from a copy of the tree."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    ignored = ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
    copytree(_tree.ROOT, source, symlinks=True, ignore=ignored)
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.mark.parametrize("name", _tree.LINKED)
def test_folder_is_linked_into_the_package(name: str) -> None:
    assert (_tree.ROOT / name).is_dir()
    assert not (_tree.ROOT / name).is_symlink()
    assert (PACKAGE / name).readlink() == Path("..", name)


@pytest.mark.parametrize("name", _tree.LINKED)
def test_linked_folder_is_no_regular_package(name: str) -> None:
    """A regular ./kernels would shadow the `kernels` distribution, which transformers imports."""
    assert list((_tree.ROOT / name).rglob("__init__.py*")) == []


def test_wheel_equals_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert packed == {f"steer_compile/{name}" for name in _files_below(PACKAGE)}


def test_wheel_metadata(wheel: Path) -> None:
    assert wheel.name == f"steer_compile-{__version__}-py3-none-any.whl"
    info = f"steer_compile-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (_tree.ROOT / "LICENSE").read_bytes()
    assert "steer-compile = steer_compile.cli.main:main" in entry_points
    assert f"\nVersion: {__version__}\n" in metadata


def test_wheel_imports_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Both linked folders are found in the unpacked wheel itself, with the checkout out of reach."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    modules = [_tree.module_name(path) for path in _tree.files(".py") if path.parts[0] in _tree.LINKED]
    program = f"""
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
for name in {["steer_compile", *modules]}:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin.startswith({str(tmp_path)!r}), (name, spec)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
