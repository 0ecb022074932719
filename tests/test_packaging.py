"""What is installed is what lies in the tree, under the names that DESIGN.md gives it."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folder → import name; the links hantc/passes and hantc/backends are not walked, their targets are.
TREES = {"hantc": "hantc", "passes": "hantc.passes", "backends": "hantc.backends"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def walk(folder: Path) -> Iterator[Path]:
    """All Python files below `folder`, links not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from walk(path)
        elif path.suffix == ".py":
            yield path


def modules() -> dict[str, Path]:
    """Import name → file, for every module of hantc; packages by their `__init__.py`."""
    found = {}
    for folder, prefix in TREES.items():
        for path in walk(ROOT / folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *parts))] = path
    return found


def module_reexports(module: str, tree: ast.Module) -> list[str]:
    """The names that `from <module>.x import x` puts in place of the submodule x, at import time."""
    hidden = []
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        source = node.module if node.level == 0 else f"{module}.{node.module}"
        hidden += [a.name for a in node.names if source == f"{module}.{a.asname or a.name}"]
    return hidden


def test_package_list_equals_the_tree() -> None:
    in_tree = {name for name, path in modules().items() if path.name == "__init__.py"}
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(in_tree)
    assert len(listed) == len(set(listed))


def test_every_folder_with_code_is_a_package() -> None:
    for path in modules().values():
        assert (path.parent / "__init__.py").is_file(), f"{path.parent.relative_to(ROOT)} lacks an __init__.py"


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_links_point_at_the_real_folders(name: str) -> None:
    link = ROOT / "hantc" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert pyproject()["tool"]["setuptools"]["package-dir"][f"hantc.{name}"] == name


def test_every_module_is_found_under_its_import_name() -> None:
    for name, path in modules().items():
        assert all(part.isidentifier() for part in name.split(".")), f"{path} cannot be imported by name"
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        assert Path(spec.origin).resolve() == path.resolve(), name


def test_nothing_installs_top_level_passes_or_backends() -> None:
    assert all(p == "hantc" or p.startswith("hantc.") for p in pyproject()["tool"]["setuptools"]["packages"])


def test_no_package_hides_its_own_module() -> None:
    for name, path in modules().items():
        if path.name == "__init__.py":
            assert not module_reexports(name, ast.parse(path.read_text())), path


@pytest.mark.parametrize(
    ("source", "hidden"),
    [
        ("from hantc.passes.match import match", ["match"]),
        ("from .match import match", ["match"]),
        ("from hantc.passes.match import Match as match", ["match"]),
        ("from hantc.passes.match import Match", []),
        ("from hantc.passes import match", []),
    ],
)
def test_hiding_is_recognised(source: str, hidden: list[str]) -> None:
    assert [name.lower() for name in module_reexports("hantc.passes", ast.parse(source))] == hidden


def test_package_data_exists() -> None:
    for package, patterns in pyproject()["tool"]["setuptools"]["package-data"].items():
        folder = modules()[package].parent
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: no file matches {pattern}"


def test_every_dependency_is_pinned() -> None:
    """`constraints.txt` names an exact version for each requirement, so that the gate is repeatable."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[normal(name)] = version
    assert all(version and "+" not in version for version in pins.values())
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert [r for r in wanted if normal(requirement_name(r)) not in pins] == []


def requirement_name(requirement: str) -> str:
    for i, char in enumerate(requirement):
        if not (char.isalnum() or char in "-_."):
            return requirement[:i]
    return requirement


def normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")
