"""Every linear of full-size DiT and FLUX.1-dev by name, and what each recipe does to it.

PixArt's, Latte's and STDiT's stand with their converters' tests.
"""

import re

import pytest

from lowbit_jax.models.dit import DIT_XL_2_256, DIT_XL_2_512, dit
from lowbit_jax.models.flux import FLUX_DEV, FLUX_SCHNELL
from lowbit_jax.quant.recipe import RECIPES
from tests.references.conversion import METHODS, TREATMENT, assert_method, assert_recipes, linears

DIT_OUTSIDE = {
    "x_embedder/proj": (1152, 16),
    "t_embedder/in_layer": (1152, 256),
    "t_embedder/out_layer": (1152, 1152),
    "final_layer/adaLN_modulation": (2304, 1152),
    "final_layer/linear": (32, 1152),
}


def dit_block(width):
    return {
        "adaLN_modulation": (6 * width, width),
        "attn/qkv": (3 * width, width),
        "attn/proj": (width, width),
        "mlp/fc1": (4 * width, width),
        "mlp/fc2": (width, 4 * width),
    }


@pytest.mark.parametrize("config", [DIT_XL_2_256, DIT_XL_2_512], ids=["256", "512"])
def test_dit_xl_2(config):
    """adaLN is quantised too; ViDiT-Q's DiT keeps it: `--keep '.*/adaLN_modulation'`."""
    assert_recipes("dit", config, dit_block(1152), DIT_OUTSIDE)
    keeping = RECIPES["w8a8"].keeping(".*/adaLN_modulation")
    kept = {
        layer for layer, rule in keeping.assign(list(linears("dit", config))).items() if not rule
    }
    assert kept == set(DIT_OUTSIDE) | {f"blocks/{i}/adaLN_modulation" for i in range(28)}


@pytest.mark.parametrize(("size", "width"), [("S", 384), ("B", 768), ("L", 1024)])
def test_smaller_dits(size, width):
    for patch in (4, 8):
        outside = {
            "x_embedder/proj": (width, 4 * patch**2),
            "t_embedder/in_layer": (width, 256),
            "t_embedder/out_layer": (width, width),
            "final_layer/adaLN_modulation": (2 * width, width),
            "final_layer/linear": (8 * patch**2, width),
        }
        assert_recipes("dit", dit(size, patch), dit_block(width), outside)


@pytest.mark.parametrize("config", [FLUX_DEV, FLUX_SCHNELL], ids=["dev", "schnell"])
def test_flux(config):
    """All 19 x 10 + 38 x 3 matrices of the blocks are quantised, modulation included."""
    stream = {
        "attn/qkv": (9216, 3072),
        "attn/proj": (3072, 3072),
        "mlp/in_layer": (12288, 3072),
        "mlp/out_layer": (3072, 12288),
        "mod/lin": (18432, 3072),
    }
    single = {
        "linear1": (21504, 3072),
        "linear2": (3072, 15360),
        "modulation/lin": (9216, 3072),
    }
    blocks = {
        f"double_blocks/{i}/{kind}_{name}": shape
        for i in range(19)
        for kind in ("img", "txt")
        for name, shape in stream.items()
    } | {f"single_blocks/{i}/{name}": shape for i in range(38) for name, shape in single.items()}
    embedders = {"time_in": 256, "vector_in": 768} | (
        {"guidance_in": 256} if config.guidance_embed else {}
    )
    outside = {
        "img_in": (3072, 64),
        "txt_in": (3072, 4096),
        "final_layer/adaLN_modulation": (6144, 3072),
        "final_layer/linear": (64, 3072),
    }
    for name, k in embedders.items():
        outside |= {f"{name}/in_layer": (3072, k), f"{name}/out_layer": (3072, 3072)}
    found = linears("flux", config)
    assert found == blocks | outside
    for name, recipe in RECIPES.items():
        rules = {layer: rule for layer, rule in recipe.assign(list(found)).items() if rule}
        assert set(rules) == (set(blocks) if TREATMENT.get(name, True) else set())
        if re.fullmatch(METHODS, name):
            assert_method(name, rules, blocks)
