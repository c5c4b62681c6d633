"""The package draws from no generator that the whole process shares: results would depend on who drew before."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    ("vila_ops/artifacts/s3_calls.py", "random.uniform"): "spreads retries over time",
    ("vila_ops/data/download/run.py", "random.uniform"): "spreads retries over time",
    ("vila_ops/cli/train.py", "random.Random"): "kills at times that nobody chose",
    ("vila_ops/generate/torch_engine/sampling.py", "np.random.Philox"): "its key and counter give every draw",
    ("vila_ops/model/seeds.py", "torch.default_generator.manual_seed"): "puts the state back afterwards",
}
TORCH = {
    "seed", "manual_seed", "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson",
    "rand_like", "randn_like", "randint_like", "dropout",
}  # fmt: skip
IN_PLACE = {
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_",
    "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "trunc_normal_", "orthogonal_",
    "sparse_",
}  # fmt: skip
BUILDERS = {"from_config", "resize_token_embeddings", "inject_adapter_in_model"}
"""Draw weights of all that they make, and take no generator."""
CLASSES = ("ForConditionalGeneration", "ForCausalLM", "Dinov2Model")
"""Ends of the names of classes that do so too."""


def test_no_code_of_the_package_uses_a_global_generator() -> None:
    found = {}
    for path in sorted(ROOT.glob("vila_ops/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        found |= {(name, use): line for use, line in uses(path.read_text(encoding="utf-8"))}
    new = {f"{name}:{found[name, use]} {use}" for name, use in found.keys() - ALLOWED.keys()}
    assert not new, "give each draw a generator of its own (vila_ops/model/seeds.py), or say here why it need not"
    assert found.keys() == ALLOWED.keys()


@pytest.mark.parametrize(
    "code",
    [
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "torch.randn(3)",
        "torch.rand_like(x)",
        "x.normal_(0, 1)",
        "nn.init.kaiming_uniform_(x, a=2)",
        "torch.nn.functional.dropout(x, 0.1)",
        "nn.Dropout(0.1)",
        "np.random.shuffle(x)",
        "np.random.default_rng()",
        "random.shuffle(x)",
        "random.Random()",
        "from random import shuffle",
        "AutoModel.from_config(config)",
        "VilaForConditionalGeneration(config)",
    ],
)
def test_a_draw_from_a_global_generator_is_seen(code: str) -> None:
    assert list(uses(code))


@pytest.mark.parametrize(
    "code",
    [
        "torch.randn(3, generator=own)",
        "x.normal_(0, 1, generator=own)",
        "np.random.default_rng(seed).shuffle(x)",
        "random.Random(seed).shuffle(x)",
        "with torch.device('meta'):\n    VilaForConditionalGeneration(config)",
        "with isolated(seed, 'tower'):\n    AutoModel.from_config(config)",
    ],
)
def test_a_generator_of_its_own_is_fine(code: str) -> None:
    assert not list(uses(code))


def uses(code: str) -> Iterator[tuple[str, int]]:
    """Calls that draw from a global generator, or change one, with their lines."""
    yield from _uses(ast.parse(code), apart=False)


def _uses(node: ast.AST, *, apart: bool) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.With):
        apart = apart or any(_is_apart(ast.unparse(item.context_expr)) for item in node.items)
    if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
        yield f"from {node.module}", node.lineno
    if isinstance(node, ast.Call) and not any(word.arg == "generator" for word in node.keywords):
        name = ast.unparse(node.func)
        if _draws(name, seeded=bool(node.args)) or (not apart and _builds(name)):
            yield name, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _uses(child, apart=apart)


def _is_apart(context: str) -> bool:
    return context.startswith("isolated(") or context == "torch.device('meta')"


def _draws(name: str, *, seeded: bool) -> bool:
    owner, _, function = name.rpartition(".")
    if owner == "random":
        return function != "Random" or not seeded
    if owner in ("np.random", "numpy.random"):
        return function != "default_rng" or not seeded
    if owner.startswith("torch.") and function.startswith(("manual_seed", "seed")):
        return not owner.startswith("torch.Generator")
    functional = owner in ("torch", "F") or owner.endswith("functional")
    return (functional and function in TORCH) or function in IN_PLACE or name == "nn.Dropout"


def _builds(name: str) -> bool:
    return name.rpartition(".")[2] in BUILDERS or name.endswith(CLASSES)
