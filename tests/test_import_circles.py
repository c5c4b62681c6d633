"""No module of vila_ops or flows imports another in a circle, lazy imports inside functions included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def import_graph(root: Path, packages: tuple[str, ...]) -> dict[str, set[str]]:
    """The modules of some packages under `root`, and the modules of these packages that each one imports."""
    modules: dict[str, Path] = {}
    for path in (path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: _imported(ast.parse(path.read_text()), set(modules)) for name, path in modules.items()}


def _imported(tree: ast.Module, modules: set[str]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            names |= submodules
            if node.module and len(submodules) < len(node.names):
                names.add(node.module)
    return names & modules


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = import_graph(ROOT, ("vila_ops", "flows"))
    assert len(graph) > 100
    assert "vila_ops.train.loop" in graph["vila_ops.train.stage"], "a lazy import is part of the graph"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' <- '.join(error.args[1])}")


def test_a_circle_through_a_function_is_seen(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("")
    (tmp_path / "package/a.py").write_text("from package import b\n")
    (tmp_path / "package/b.py").write_text("def f():\n    import package.a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path, ("package",))).prepare()
