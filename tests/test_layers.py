"""Imports point down only: each folder may use the folders below it, and `vlmoe.config` is open to all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "vlmoe"
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "recipes": set(),
    "moe": set(),
    "metrics": set(),
    "distributed": {"moe"},
    "data": {"metrics"},
    "model": {"moe"},
    "tasks": {"model", "data", "moe", "metrics"},
    "train": {"distributed", "tasks", "data", "model", "moe", "metrics"},
    "evaluate": {"tasks", "data", "model", "moe", "metrics"},
    "interpret": {"train", "evaluate", "tasks", "data", "model", "moe"},
    "study": {"train", "evaluate", "tasks", "data", "model", "moe"},
    "cli": {"interpret", "study", "train", "distributed", "evaluate", "tasks", "data", "model", "moe"},
    "__init__": {"tasks"},  # the public name `vlmoe.load`
    "__main__": {"cli"},
}
FILES = sorted(ROOT.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(source: str, package: str) -> set[str]:
    """Layers of ours that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*stem, base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("vlmoe.") and len(name.split(".")) > 1}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    assert layer in ALLOWED, f"'{layer}' is a new layer: place it in ALLOWED and in docs/architecture.md"
    package = ".".join(["vlmoe", *path.relative_to(ROOT).parts[:-1]])
    above = imports(path.read_text(), package) - ALLOWED[layer] - {layer, "config", "__version__"}
    assert not above, f"{path.relative_to(ROOT)} ({layer}) imports {sorted(above)}, which is not below it"


def distributed_lines(source: str) -> list[int]:
    """Lines that import `torch.distributed` or something of it, or name it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        if any(f"{name}.".startswith("torch.distributed.") for name in names):
            found.append(node.lineno)
    return sorted(set(found))


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(p) in ("moe", "model")], ids=lambda p: p.name)
def test_the_model_knows_of_no_other_process(path: Path) -> None:
    """Where weights and experts lie is settled outside: layers are handed objects that know it."""
    assert not distributed_lines(path.read_text()), f"{path}: only vlmoe.distributed and what is above it may"


def test_every_way_to_process_groups_is_found() -> None:
    source = "import torch.distributed as dist\nfrom torch import distributed\nfrom torch.distributed.fsdp import X\n"
    source += "import torch\nx = torch.distributed.get_rank()\ny = torch.distributions.Beta"
    assert distributed_lines(source) == [1, 2, 3, 5]


def test_an_arrow_that_points_up_is_found() -> None:
    assert imports("def f():\n    from vlmoe.train.loop import train", "vlmoe.moe") == {"train"}
    assert imports("from ..tasks import base\nimport vlmoe.data.batch", "vlmoe.model") == {"tasks", "data"}
    assert imports("from . import routing\nimport torch", "vlmoe.moe") == {"moe"}
