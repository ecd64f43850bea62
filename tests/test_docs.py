"""What docs/adding-a-model.md names is there."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "adding-a-model.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_file_and_folder_named_is_there():
    named = set(re.findall(r"`((?:lowbit_jax|convert|tests|benchmarks)/[\w/]*(?:\.py)?)`", TEXT))
    assert len(named) > 12
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_program_named_can_be_imported():
    for name in set(re.findall(r"python -m (benchmarks\.\w+)", TEXT)):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name


def call(source):
    """The call an example of an entry is, whatever key stands before it."""
    tree = ast.parse("{" + source + "}" if source.startswith('"') else source.rstrip().rstrip(","))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("kind", ["Network", "Row", "Case"])
def test_entries_have_the_fields_of_their_classes(kind):
    if kind == "Case":
        pytest.importorskip("diffusers", reason="the cases import their references")
    module = {
        "Network": "lowbit_jax.models.registry",
        "Row": "convert.table",
        "Case": "benchmarks.parity_cases",
    }[kind]
    fields = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
    required = {name for name, field in fields.items() if field.default is field.empty}
    blocks = [block for block in BLOCKS if f"{kind}(" in block]
    assert len(blocks) == 1
    found = {keyword.arg for keyword in call(blocks[0]).keywords}
    assert required <= found <= set(fields)


def test_the_entries_shown_are_those_of_the_code():
    """Word by word, but for comments and indentation."""

    def words(text):
        return re.sub(r"\s+", "", re.sub(r"#.*", "", text))

    registry = (ROOT / "lowbit_jax" / "models" / "registry.py").read_text()
    cases = (ROOT / "benchmarks" / "parity_cases.py").read_text()
    module = (ROOT / "lowbit_jax" / "models" / "dit.py").read_text()
    network, case = (next(b for b in BLOCKS if f"{k}(" in b) for k in ("Network", "Case"))
    assert words(network) in words(registry)
    assert words(case) in words(cases)
    names = re.findall(r"`(time_shift|mlp_norm_eps)`", TEXT)
    assert names and all(name in module for name in names)
