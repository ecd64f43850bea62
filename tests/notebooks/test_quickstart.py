"""The notebook runs from top to bottom in a fresh kernel, and its figures are the library's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def _output_text(notebook) -> str:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "\n".join(out.get("text", "") or str(out.get("data", "")) for out in outputs)


@pytest.mark.slow
def test_runs_and_prints_the_sizes(monkeypatch):
    """All cells run; FLUX.1-dev in ternary is at least 7.65 times smaller; a figure is drawn."""
    from convert.minilm import model_folder

    try:
        model_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    text = _output_text(notebook)
    ratio = re.search(r"FLUX.1-dev flux-1.58bit +[\d.]+ GB, ([\d.]+)x", text)
    assert ratio is not None and float(ratio[1]) >= 7.65
    assert "image/png" in text


def test_is_shipped_without_outputs():
    """Outputs would go stale; about ten cells of code."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 5 <= len(code) <= 12
    assert not any(cell.outputs for cell in code)
