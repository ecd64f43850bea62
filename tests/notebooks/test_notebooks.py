"""Every notebook runs from top to bottom in a fresh kernel, in its small form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "notebooks"


def run(name, monkeypatch):
    """The text of all outputs."""
    from convert.minilm import model_folder

    try:
        model_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("FLUX_DIR", raising=False)
    monkeypatch.delenv("FLUX_OUT", raising=False)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "\n".join(out.get("text", "") or str(out.get("data", "")) for out in outputs)


@pytest.mark.slow
def test_quickstart(monkeypatch):
    """FLUX.1-dev in ternary is at least 7.65 times smaller; a figure is drawn."""
    text = run("quickstart.ipynb", monkeypatch)
    ratio = re.search(r"FLUX.1-dev flux-1.58bit +[\d.]+ GB, ([\d.]+)x", text)
    assert ratio is not None and float(ratio[1]) >= 7.65
    assert "image/png" in text


@pytest.mark.slow
def test_flux_1p58bit(monkeypatch):
    """Codes are -1, 0 and 1, a third of them 0 or more; two rows of pictures."""
    text = run("flux_1p58bit.ipynb", monkeypatch)
    found = re.search(r"codes \[-1  0  1\], zeros ([\d.]+)%", text)
    assert found is not None and 30 < float(found[1]) < 60
    assert "bits per weight over everything stored" in text and "image/png" in text


@pytest.mark.slow
def test_vidit_q(monkeypatch):
    """Balancing and rotating change nothing; at 8 bits ViDiT-Q is nearer to float than naive."""
    text = run("vidit_q.ipynb", monkeypatch)
    psnr = dict(re.findall(r"^(\S.*?) +attributes right .*, PSNR (inf|[\d.]+)", text, re.MULTILINE))
    assert float(psnr["balanced and rotated"]) > 80
    assert float(psnr["viditq-w8a8"]) > float(psnr["naive-w8a8"]) + 3
    assert float(psnr["viditq-w4a8"]) > 25


@pytest.mark.slow
def test_tpu_gpu(monkeypatch):
    """A row per recipe, the ternary one smallest, and exact integers."""
    text = run("tpu_gpu.ipynb", monkeypatch)
    rows = dict(re.findall(r"^([\w.-]+) +([\d.]+) +[\d.]+ +[\d.]+$", text, re.MULTILINE))
    assert float(rows["flux-1.58bit-a8"]) < float(rows["w4a8"]) < float(rows["float"])
    assert float(re.search(r"relative difference ([\d.e-]+)", text)[1]) < 1e-5


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_shipped_without_outputs(path):
    """Outputs would go stale; about ten cells of code."""
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert 5 <= len(code) <= 12
    assert not any(cell.outputs for cell in code)
