"""README's table is the registries' own, and the registries agree with each other."""

import pytest

from benchmarks import model_table
from convert.registry import SOURCES
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.recipe import RECIPES, Recipe, Rule
from lowbit_jax.samplers.registry import SAMPLERS


@pytest.fixture(scope="module")
def table():
    return model_table.markdown()


def test_readme_has_the_table_of_the_registries(table):
    """`python -m benchmarks.model_table --write` mends it."""
    text = model_table.README.read_text()
    assert model_table.inserted(text, table) == text


def test_every_network_can_be_converted_and_sampled():
    assert set(NETWORKS) == set(SOURCES)
    for name, network in NETWORKS.items():
        assert network.samplers, name
        assert set(network.samplers) <= set(SAMPLERS), name
        layouts = SOURCES[name].layouts
        assert len({layout.name for layout in layouts}) == len(layouts), name
    titles = [network.title for network in NETWORKS.values()]
    assert len(set(titles)) == len(titles)


def test_the_rows(table):
    head, rule, *rows = table.splitlines()
    assert head.count("|") == rule.count("|") == 1 + len(model_table.HEAD)
    assert len(rows) == len(NETWORKS)
    # counted from the published files, see tests/models
    assert rows[0] == (
        "| FLUX.1 dev, schnell | 11,901,408,320 | Black Forest Labs, diffusers | diffusers "
        "| flow-matching Euler | all |"
    )


def test_a_recipe_that_does_not_fit_is_left_out(monkeypatch):
    odd = Recipe(name="odd", rules=(Rule(match="no/such/layer", weights=None),))
    monkeypatch.setitem(RECIPES, "odd", odd)
    params = NETWORKS["dit"].abstract_params(NETWORKS["dit"].config())
    recipes = model_table.fitting_recipes(params)
    assert recipes == [name for name in RECIPES if name != "odd"]
    assert "`w8a8`" in model_table.row("dit")[-1] and "odd" not in model_table.row("dit")[-1]


def test_only_the_part_between_the_marks_is_replaced():
    text = f"a\n{model_table.BEGIN}old\n{model_table.END}b\n"
    assert model_table.inserted(text, "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="once each"):
        model_table.inserted("a\nb\n", "new\n")
