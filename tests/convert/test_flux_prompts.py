"""Text prompts of `--method` and `calibrate_model` for FLUX: diffusers' own encoding of them."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from convert import flux_prompts, teach
from convert.__main__ import main
from convert.checkpoint_files import open_checkpoint
from convert.job import plan
from lowbit_jax.checkpoint import read_manifest
from lowbit_jax.quant.recipe import RECIPES

pytest.importorskip("diffusers", reason="the reference is diffusers")
pytest.importorskip("transformers", reason="the reference is diffusers")
from tests.references import pipelines as reference  # noqa: E402

PROMPTS = ["The cat and the fox, in the SNOW", "a red ox at the cat"]


@pytest.fixture(scope="module", params=["dev", "schnell"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / request.param
    return reference.write_pipeline(folder, dev=request.param == "dev")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def read(checkpoint, prompts):
    with open_checkpoint(checkpoint) as opened:
        return flux_prompts.read_flux_prompts(plan(opened, RECIPES["float"]), prompts)


def test_as_diffusers(source, prompts, monkeypatch):
    """States and vectors of diffusers' `encode_prompt`, at the length of the published pipeline."""
    monkeypatch.setattr(flux_prompts, "DTYPE", jnp.float32)
    found = read(source / "transformer", prompts)
    length = 512 if source.name == "dev" else 256
    states, pooled = reference.encode_prompts(source, PROMPTS, length)
    assert found.txt.shape == states.shape and found.pooled is not None
    np.testing.assert_allclose(found.txt, states, atol=2e-5)
    np.testing.assert_allclose(found.pooled, pooled, atol=2e-5)


def test_where_a_pipeline_is_found(source, tmp_path):
    """A folder, a file in it and a file beside it; not where a text part is missing."""
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (source / "transformer", weights, source / "flux1-dev.safetensors"):
        assert flux_prompts.find_encoders(path) == source
    assert flux_prompts.find_encoders(tmp_path / "transformer") is None
    partial = shutil.copytree(source, tmp_path / "partial")
    shutil.rmtree(partial / "tokenizer_2")
    assert flux_prompts.find_encoders(partial / "transformer") is None


def test_what_is_cut_off_is_said(source, prompts):
    prompts.write_text("the cat and the fox " * 20)
    with pytest.warns(UserWarning, match="CLIP takes .* tokens"):
        read(source / "transformer", prompts)


def test_a_text_file_teaches(source, prompts, tmp_path, monkeypatch, capsys):
    """`--method` takes the transformer of a pipeline and a text file; alone, it says what lacks."""
    monkeypatch.setattr(teach, "STEPS", 2)
    out, alone = tmp_path / "out", tmp_path / "alone"
    options = ["--recipe", "flux-1.58bit", "--method", "feedback", "--prompts", str(prompts)]
    options += ["--grid", "2", "3", "--out", str(out)]
    shutil.copytree(source / "transformer", alone)
    assert main([str(alone), *options]) == 2
    assert "text_encoder_2" in capsys.readouterr().err and not out.exists()
    assert main([str(source / "transformer"), *options]) == 0
    assert read_manifest(out)["taught"]["prompts"] == len(PROMPTS)
