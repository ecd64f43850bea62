"""From a prompt to pixels: the converted pipeline against diffusers' own on the same folder."""

import numpy as np
import pytest

from convert.__main__ import main as convert
from lowbit_jax.pipelines import FluxPipeline

pytest.importorskip("diffusers", reason="the reference is diffusers")
pytest.importorskip("transformers", reason="the reference is diffusers")
from tests.references import pipelines as reference  # noqa: E402

PROMPTS = ["The cat and the fox, in the SNOW", "a red ox at " + "the cat and " * 9]
SIZE = {"height": 24, "width": 40}
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """kind -> diffusers' folder, made when first asked for."""
    made = {}

    def source(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "source"
            made[kind] = reference.write_pipeline(folder, dev=kind == "dev")
        return made[kind]

    return source


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    """(kind, options of convert_and_quantize) -> converted folder."""
    made = {}

    def make(kind, *options):
        if (kind, options) not in made:
            out = tmp_path_factory.mktemp("converted") / kind
            arguments = [str(sources(kind)), "--out", str(out), *options]
            assert convert([*arguments, "--dtype", "f32"]) == 0
            made[kind, options] = out
        return made[kind, options]

    return make


FLOAT = ("--recipe", "float")


@pytest.mark.filterwarnings("ignore:.*does not see")
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_pictures_equal_those_of_diffusers(sources, converted, kind):
    """Float32; bytes differ by rounding alone, a half here and there. Resident and sequential are
    equal to the bit, and a picture does not depend on what else is made."""
    noise = np.random.default_rng(0).standard_normal((2, 15, 16), np.float32)
    guidance = {"guidance": 3.5} if kind == "dev" else {}
    expected = reference.run_pipeline(
        sources(kind), PROMPTS, noise, steps=3, guidance=3.5, max_length=MAX_LENGTH, **SIZE
    )
    assert expected.std() > 0.1 and ((expected > 0) & (expected < 1)).mean() > 0.5
    options = {"steps": 3, "max_length": MAX_LENGTH, "noise": noise, **guidance, **SIZE}
    pipeline = FluxPipeline(converted(kind, *FLOAT))
    found = [picture.pixels for picture in pipeline(PROMPTS, **options)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (24, 40, 3)
        assert np.abs(ours - 255 * theirs).max() < 0.5 + 255 * 1e-4
    lean = FluxPipeline(converted(kind, *FLOAT), sequential=True)
    for ours, again in zip(found, lean(PROMPTS, **options), strict=True):
        np.testing.assert_array_equal(ours, again.pixels)
    assert not lean._parts
    alone = pipeline(PROMPTS[1], **options | {"noise": noise[1:]})
    np.testing.assert_array_equal(alone[0].pixels, found[1])
