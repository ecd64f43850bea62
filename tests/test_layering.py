"""Imports point down only (docs/design.md, "The rooms"), and never in a circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lowbit_jax", "pallas_kernels", "convert")

# room -> what it must not import, however deep in a function
FORBIDDEN = {
    "lowbit_jax": ("convert", "benchmarks", "tests", "notebooks"),
    "pallas_kernels": ("lowbit_jax", "convert", "benchmarks", "tests", "notebooks"),
    "convert": ("benchmarks", "tests", "notebooks"),
    # The one door from models to quantised arrays is lowbit_jax.ops.
    "lowbit_jax.models": tuple(
        f"lowbit_jax.{room}"
        for room in (
            "quant recipes samplers pipelines calibration evaluation checkpoint cli".split()
        )
    ),
    # Samplers are functions over a denoiser: they know no network and no format.
    "lowbit_jax.samplers": tuple(
        f"lowbit_jax.{room}"
        for room in "models quant pipelines calibration evaluation checkpoint cli".split()
    ),
}
# The published networks are a matter for files and tests, never for the library.
FOREIGN = ("torch", "torchvision", "diffusers", "transformers", "sentence_transformers")
GROUND_FLOOR_KNOWS = ("jax", "jaxlib", "numpy", "ml_dtypes", "jaxtyping")


def modules(root):
    """{dotted name: file} of every module in the packages under root."""
    found = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def within(name, room):
    return name == room or name.startswith(room + ".")


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(name, file, known, *, at_import_time=False):
    """The (line, dotted name) pairs that module `name` imports.

    `from a import b` counts as a.b where that is a module and as a where it is not. With
    at_import_time, only what importing the module runs: no function bodies, no TYPE_CHECKING.
    """
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    pending = [ast.parse(file.read_text(encoding="utf-8"), str(file))]
    while pending:
        node = pending.pop()
        if at_import_time and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or is_type_checking(node)
        ):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                member = f"{base}.{alias.name}"
                yield node.lineno, member if member in known else base
        elif (  # importlib.import_module("literal") and __import__("literal")
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def violations(root):
    """Every import under root that points up, or at another framework."""
    known, found = modules(root), []
    for name, file in known.items():
        for line, target in imports(name, file, known):
            where = f"{file.relative_to(root)}:{line}: {name} imports {target}"
            for room, banned in FORBIDDEN.items():
                if within(name, room) and any(within(target, up) for up in banned):
                    found.append(f"{where}: {room} must not")
            if any(within(target, framework) for framework in FOREIGN):
                found.append(f"{where}: the library runs without it")
            top = target.split(".")[0]
            if within(name, "pallas_kernels") and top not in {
                *GROUND_FLOOR_KNOWS,
                *PACKAGES,
                *sys.stdlib_module_names,
            }:
                found.append(f"{where}: the ground floor knows only jax and numpy")
    return found


def executed(name, target):
    """The modules that importing `target` runs: itself and its packages, but for `name`'s own."""
    parts = target.split(".")
    chain = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return [module for module in chain if module == target or not within(name, module)]


def circles(root):
    """Import-time circles under root, each as a list of module names."""
    known = modules(root)
    graph = {
        name: {
            module
            for _, target in imports(name, file, known, at_import_time=True)
            for module in executed(name, target)
            if module in known
        }
        for name, file in known.items()
    }
    found, done = [], set()

    def visit(name, path):
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def write(root, **files):
    for package in PACKAGES:
        (root / package).mkdir()
        (root / package / "__init__.py").write_text("")
    for name, text in files.items():
        file = root.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_the_packages_are_seen():
    assert {name.split(".")[0] for name in modules(ROOT)} == set(PACKAGES)


def test_imports_point_down():
    assert not (found := violations(ROOT)), "\n".join(found)


def test_no_circles():
    assert not (found := circles(ROOT)), "\n".join(" -> ".join(c) for c in found)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("pallas_kernels__a", "import lowbit_jax"),
        ("pallas_kernels__a", "import flax"),
        ("lowbit_jax__a", "from convert import reader"),
        ("lowbit_jax__a", "def f():\n    import torch.nn"),
        ("lowbit_jax__a", "import importlib\nimportlib.import_module('diffusers')"),
        ("lowbit_jax__models__a", "from lowbit_jax.quant import qtensor"),
        ("lowbit_jax__models__a", "from ..quant.recipes import Recipe"),
        ("lowbit_jax__models__a", "from lowbit_jax import quant"),
        ("lowbit_jax__samplers__a", "from lowbit_jax.models import dit"),
        ("convert__a", "from tests import helpers"),
    ],
)
def test_a_violation_is_found(tmp_path, module, text):
    root = write(tmp_path, lowbit_jax__quant__qtensor="", **{module: text})
    (root / "lowbit_jax" / "quant" / "__init__.py").write_text("")
    assert len(violations(root)) == 1


def test_allowed_imports_pass(tmp_path):
    root = write(
        tmp_path,
        pallas_kernels__a="import functools\nimport jax.numpy as jnp\nfrom . import b",
        pallas_kernels__b="import numpy as np",
        lowbit_jax__ops="from pallas_kernels import a\nfrom lowbit_jax.quant import qtensor",
        lowbit_jax__quant__qtensor="import flax",
        lowbit_jax__models__layers="from lowbit_jax import ops",
        convert__a="from lowbit_jax.models import layers",
    )
    assert violations(root) == []
    assert circles(root) == []


def test_a_circle_is_found(tmp_path):
    root = write(
        tmp_path,
        lowbit_jax__a="from lowbit_jax import b",
        lowbit_jax__b="from .c import x",
        lowbit_jax__c="from . import a",
    )
    assert circles(root) == [["lowbit_jax.a", "lowbit_jax.b", "lowbit_jax.c", "lowbit_jax.a"]]


def test_a_circle_through_a_package_is_found(tmp_path):
    root = write(
        tmp_path,
        lowbit_jax__ops="from lowbit_jax.quant.qtensor import QTensor",
        lowbit_jax__quant__qtensor="",
        lowbit_jax__quant__plan="from lowbit_jax import ops",
    )
    (root / "lowbit_jax" / "quant" / "__init__.py").write_text("from .plan import plan")
    assert len(circles(root)) == 1


def test_a_late_import_is_no_circle(tmp_path):
    root = write(
        tmp_path,
        lowbit_jax__a="from lowbit_jax import b",
        lowbit_jax__b="def f():\n    from lowbit_jax import a\n    return a",
    )
    assert circles(root) == []
