"""Requests, the protocol of engines and the HTTP front import no torch; evaluation and serving know no engine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRONT = ["errors", "schema", "chat_prompt", "engine_loop", "routes"]


@pytest.mark.parametrize(
    "module",
    [f"vila_ops.generate.{name}" for name in ("request", "json_grammar", "engine", "load")]
    + [f"vila_ops.serve.app.{name}" for name in FRONT],
)
def test_a_module_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'ray', 'vllm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)


def test_evaluation_and_serving_import_nothing_of_an_engine() -> None:
    imported = {
        node.module
        for folder in ("eval", "serve")
        for path in (ROOT / "vila_ops" / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vila_ops.generate")
    }
    assert imported == {f"vila_ops.generate.{name}" for name in ("request", "json_grammar", "engine", "load")}
