"""Which linears are a unit, and what judges it, in every network."""

import pytest

from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.precision.units import find_units, metric_of
from lowbit_jax.quant.recipe import BLOCK_LINEARS, Recipe, Rule, WeightSpec
from lowbit_jax.quant.stacks import layer_paths

KINDS = {
    "flux": {
        "quality": "img_attn img_mlp img_mod linear1 linear2 modulation",
        "text": "txt_attn txt_mlp txt_mod",
    },
    "dit": {"quality": "adaLN_modulation attn mlp"},
    "pixart": {"quality": "attn mlp", "text": "cross_attn"},
    "latte": {
        "quality": "spatial/adaLN_modulation spatial/attn spatial/mlp temporal/adaLN_modulation"
        " temporal/mlp",
        "time": "temporal/attn",
    },
    "latte-t2v": {
        "quality": "spatial/attn spatial/mlp temporal/mlp",
        "text": "spatial/cross_attn",
        "time": "temporal/attn",
    },
    "stdit": {"quality": "attn mlp", "text": "cross_attn", "time": "attn_temp"},
    "stdit3": {
        "quality": "spatial/attn spatial/mlp temporal/mlp",
        "text": "spatial/cross_attn temporal/cross_attn",
        "time": "temporal/attn",
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_linear_of_the_blocks_is_in_one_unit(name):
    """Those that the named recipes quantise: published sizes, from shapes."""
    network = NETWORKS[name]
    params = network.abstract_params(network.config())
    units = find_units(params)
    layers = [path for unit in units for path in unit.layers]
    spec = WeightSpec(format="int8", quantizer="absmax")
    rules = (Rule(match=BLOCK_LINEARS, weights=spec),)
    chosen = Recipe(name="r", rules=rules).assign(layer_paths(params))
    assert sorted(layers) == sorted(path for path, rule in chosen.items() if rule)
    found = {}
    for unit in units:
        found.setdefault(unit.metric, set()).add(unit.kind)
    assert found == {metric: set(kinds.split()) for metric, kinds in KINDS[name].items()}


def test_a_unit_counts_its_weights():
    network = NETWORKS["pixart"]
    unit = find_units(network.abstract_params(network.config()))[0]
    assert (unit.name, unit.layers) == (
        "blocks/0/attn",
        ("blocks/0/attn/proj", "blocks/0/attn/qkv"),
    )
    assert unit.weights == 1152 * 4 * 1152


def test_other_metrics_can_be_given():
    assert metric_of("attn", [("attn", "sharpness"), (".*", "mse")]) == "sharpness"
    with pytest.raises(ValueError, match="no metric for units of kind 'mlp'"):
        metric_of("mlp", [("attn", "sharpness")])


def test_a_model_without_blocks_is_refused():
    import numpy as np

    with pytest.raises(ValueError, match="no linear in a stack of blocks"):
        find_units({"img_in": {"kernel": np.ones((2, 2))}})
