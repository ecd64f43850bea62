"""Recipes as data: JSON there and back, precedence of rules, errors that name what is wrong."""

import dataclasses
import json

import pytest

from lowbit_jax.quant.recipe import (
    RECIPES,
    Balance,
    Feedback,
    Recipe,
    RecipeError,
    Rule,
    WeightSpec,
    load_recipe,
)

INT8 = WeightSpec(format="int8", quantizer="absmax")
LAYERS = [
    "img_in",
    *(f"double_blocks/{i}/{name}" for i in range(12) for name in ("img_attn/qkv", "img_mod/lin")),
    *(f"single_blocks/{i}/linear1" for i in range(3)),
    "final_layer/linear",
]


def recipe(*matches, **options):
    """A recipe of one rule for each regular expression; one that starts with '-' keeps floats."""
    rules = tuple(
        Rule(match=match.removeprefix("-"), weights=None if match.startswith("-") else INT8)
        for match in matches
    )
    return Recipe(name="test", rules=rules, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_survive_json(name):
    named = RECIPES[name]
    assert named.name == name
    assert named.description
    text = json.dumps(named.to_json())
    assert Recipe.from_json(json.loads(text)) == named
    assert load_recipe(name) is named


def test_every_field_survives_json(tmp_path):
    spec = WeightSpec(format="int4", quantizer="mse", granularity=64, feedback=Feedback(refits=3))
    rules = (
        Rule(match="a/.*", weights=None),
        Rule(match="b", weights=spec, act_bits=6),
        Rule(match="d", weights=None, balance=Balance(alpha=0.25), rotation="full", optional=True),
        Rule(match="e", weights=spec, act_bits=8, rotation=128),
        Rule(match="f", weights=spec, act_bits=8, balance=Balance(alpha=(0.1, 0.2))),
        Rule(
            match="c", weights=WeightSpec(format="ternary", quantizer="twn", granularity="tensor")
        ),
    )
    original = Recipe(name="mixed", rules=rules, on_nonfinite="keep", description="é, \n", seed=7)
    data = original.to_json()
    assert data["rules"][1]["weights"]["granularity"] == 64
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(data))
    assert load_recipe(file) == load_recipe(str(file)) == original


def test_what_a_file_leaves_out_has_defaults():
    data = {"name": "x", "rules": [{"match": "a", "weights": None}]}
    assert Recipe.from_json(data) == Recipe(name="x", rules=(Rule(match="a", weights=None),))
    assert Recipe.from_json({"name": "x"}) == Recipe(name="x")


WEIGHTS = {"format": "int8", "quantizer": "absmax"}


def rule_json(weights=None, **fields):
    return {"name": "x", "rules": [{"match": "a", "weights": weights} | fields]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "recipe: expected an object, found list"),
        ("w8a8", "recipe: expected an object, found str"),
        ({}, r"recipe: unknown fields \[\], missing fields \['name'\]"),
        ({"name": "x", "rule": []}, r"recipe: unknown fields \['rule'\]"),
        ({"name": "x", "rules": {"match": "a"}}, "rules: expected a list, found dict"),
        ({"name": "x", "rules": None}, "rules: expected a list, found NoneType"),
        ({"name": "x", "rules": ["a"]}, "rule 0: expected an object, found str"),
        ({"name": "x", "rules": [{"match": "a"}]}, r"rule 0: .*missing fields \['weights'\]"),
        (rule_json(WEIGHTS, bits=8), r"rule 0: unknown fields \['bits'\]"),
        (rule_json("int8"), "rule 0, weights: expected an object, found str"),
        (rule_json({"format": "int8"}), r"rule 0, weights: .*missing fields \['quantizer'\]"),
        (rule_json(WEIGHTS | {"axis": 0}), r"rule 0, weights: unknown fields \['axis'\]"),
        (
            rule_json(WEIGHTS | {"format": "int5"}),
            "format 'int5' is none of int8, int6, int4, ternary",
        ),
        (rule_json(WEIGHTS | {"quantizer": "twn"}), "quantizer 'twn' of int8 is none of absmax"),
        (
            rule_json(WEIGHTS | {"format": "ternary"}),
            "quantizer 'absmax' of ternary is none of absmean, twn, least_squares",
        ),
        (rule_json(match="["), r"rule '\[' is not a regular expression: unterminated"),
        (rule_json(match=3), "match 3 is not a string"),
        (rule_json(act_bits=8), "rule 'a': act_bits 8 needs quantised weights"),
        (rule_json(WEIGHTS, act_bits=9), "rule 'a': act_bits 9 outside 2..8"),
        (rule_json(WEIGHTS, act_bits=1), "rule 'a': act_bits 1 outside 2..8"),
        (rule_json(WEIGHTS, act_bits="8"), "rule 'a': act_bits '8' outside 2..8"),
        (rule_json(WEIGHTS, act_bits=True), "rule 'a': act_bits True outside 2..8"),
        (rule_json(WEIGHTS | {"feedback": 1}), "feedback 1 is neither settings nor a boolean"),
        (rule_json(WEIGHTS | {"feedback": {"refits": 0}}), "refits from 1 are possible"),
        (rule_json(WEIGHTS | {"feedback": {"damping": -1}}), "damping from 0 and"),
        (rule_json(WEIGHTS | {"feedback": {"act_order": 1}}), "act_order 1 is no boolean"),
        (rule_json(WEIGHTS | {"feedback": {"block": 1}}), r"feedback: unknown fields \['block'\]"),
        (rule_json(balance=0.5), "rule 0, balance: expected an object, found float"),
        (rule_json(balance={"alpha": 2}), "balance: alpha is 2, it lies in 0 to 1"),
        (rule_json(balance={"alpha": [0.5, 2]}), "balance: alpha is 2, it lies in 0 to 1"),
        (rule_json(balance={"alpha": []}), "balance: no alpha"),
        (rule_json(balance={"alpha": "best"}), "balance: alpha is 'best', it lies in 0 to 1"),
        (rule_json(balance={"alpha": "auto"}), "rule 'a': alpha 'auto' needs quantised weights"),
        (rule_json(balance={}), r"rule 0, balance: .*missing fields \['alpha'\]"),
        (rule_json(rotation="half"), "rule 'a': rotation 'half' is neither a block size"),
        (rule_json(rotation=0), "rule 'a': rotation 0 is neither a block size"),
        (rule_json(rotation=True), "rule 'a': rotation True is neither a block size"),
        (rule_json(optional=1), "rule 'a': optional is no boolean"),
        (rule_json(WEIGHTS, act_static=True), "rule 'a': act_static needs act_bits and no rotat"),
        (
            rule_json(WEIGHTS, act_static=True, act_bits=8, rotation=64),
            "rule 'a': act_static needs act_bits and no rotation",
        ),
        ({"name": "x", "seed": "a"}, "seed 'a' is no integer"),
        (
            {"name": "x", "on_nonfinite": "warn"},
            "on_nonfinite 'warn' is neither 'error' nor 'keep'",
        ),
    ],
)
def test_malformed_recipes_say_what_and_where(data, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(data)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=f"recipe file .*mine.json: .*{message}"):
        load_recipe(file)


@pytest.mark.parametrize("granularity", ("row", 0, -64, True, 1.5, None))
def test_granularities_that_are_none_are_named(granularity):
    with pytest.raises(RecipeError, match=f"granularity {granularity!r} is neither"):
        WeightSpec(format="int8", quantizer="absmax", granularity=granularity)


def test_recipes_that_cannot_be_loaded(tmp_path):
    with pytest.raises(RecipeError, match="'w8a9' is neither a file nor one of: .*w8a8.*1.58bit"):
        load_recipe("w8a9")
    with pytest.raises(RecipeError, match="is neither a file"):
        load_recipe(tmp_path)
    broken = tmp_path / "broken.json"
    for content in (b'{"name": ', b"\xff\xfe\x00"):
        broken.write_bytes(content)
        with pytest.raises(RecipeError, match="recipe file .*broken.json is not JSON"):
            load_recipe(broken)


def test_the_first_rule_that_matches_decides():
    mixed = recipe(r"double_blocks/0/.*", r"-.*/img_mod/.*", r"double_blocks/.*")
    chosen = mixed.assign(LAYERS)
    assert list(chosen) == LAYERS
    assert chosen["double_blocks/0/img_mod/lin"] is mixed.rules[0]
    assert mixed.rule_for("double_blocks/1/img_mod/lin") is mixed.rules[1]
    assert chosen["double_blocks/1/img_mod/lin"] is None  # that rule keeps floats
    assert chosen["double_blocks/1/img_attn/qkv"] is mixed.rules[2]
    assert chosen["single_blocks/0/linear1"] is None
    assert chosen["img_in"] is None


def test_kept_layers_are_kept_whatever_the_recipe_says():
    kept = RECIPES["w8a8"].keeping(r"double_blocks/\d+/img_mod/lin")
    before, after = RECIPES["w8a8"].assign(LAYERS), kept.assign(LAYERS)
    assert after == before | {name: None for name in LAYERS if "img_mod" in name}
    assert kept.name == r"w8a8 keeping double_blocks/\d+/img_mod/lin"
    assert Recipe.from_json(json.loads(json.dumps(kept.to_json()))) == kept
    with pytest.raises(RecipeError, match="no kernel is decided by rule.*'nothing'"):
        kept.keeping("nothing").assign(LAYERS)
    with pytest.raises(RecipeError, match="is not a regular expression"):
        kept.keeping("[")


def test_a_rule_must_match_the_whole_path():
    chosen = recipe(r"double_blocks/1/.*").assign(LAYERS)
    decided = [layer for layer, rule in chosen.items() if rule is not None]
    assert decided == ["double_blocks/1/img_attn/qkv", "double_blocks/1/img_mod/lin"]
    for part in ("qkv", "double_blocks", r"double_blocks/1/.*/"):
        assert recipe(part).rule_for("double_blocks/1/img_attn/qkv") is None


def test_rules_that_decide_nothing_are_all_named():
    """One that matches nothing, and one whose layers are all taken by rules before it."""
    mixed = recipe(r"double_blocks/.*", r"triple_blocks/.*", r".*/img_mod/.*", r"img_in")
    with pytest.raises(RecipeError) as error:
        mixed.assign(LAYERS)
    message = str(error.value)
    assert "recipe 'test'" in message
    assert "'triple_blocks/.*', '.*/img_mod/.*'" in message
    assert "double_blocks/.*', " not in message.replace("'triple_blocks/.*', ", "")
    assert "img_in" not in message
    assert "layers look like 'double_blocks/" in message


def test_no_layers_and_no_rules():
    assert recipe().assign(LAYERS) == dict.fromkeys(LAYERS)
    assert recipe().assign([]) == {}
    with pytest.raises(RecipeError, match=r"no kernel is decided by rule\(s\) 'a'$"):
        recipe("a").assign([])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "float"])
def test_named_recipes_decide_every_linear_of_every_block_and_no_other(name):
    chosen = RECIPES[name].assign(LAYERS)
    assert {layer for layer, rule in chosen.items() if rule is None} == {
        "img_in",
        "final_layer/linear",
    }


def test_an_optional_rule_may_decide_nothing():
    rules = (Rule(match="no/.*", weights=INT8, optional=True), Rule(match=".*", weights=INT8))
    assert all(Recipe(name="test", rules=rules).assign(LAYERS).values())


def test_rounded_is_without_error_feedback():
    named = RECIPES["viditq-w4a8"]
    plain = named.rounded()
    assert any(rule.needs_grams for rule in named.rules) and named.needs_statistics
    assert not any(rule.needs_grams for rule in plain.rules)
    assert plain.name == "viditq-w4a8 rounded" and plain.rounded() is plain
    kept = [dataclasses.replace(rule, weights=None, act_bits=None) for rule in named.rules[:1]]
    assert [dataclasses.replace(r, weights=None, act_bits=None) for r in plain.rules[:1]] == kept


def test_feedback_may_be_said_by_a_boolean():
    assert Recipe.from_json(rule_json(WEIGHTS | {"feedback": True})).rules[0].needs_grams
    assert WeightSpec(**WEIGHTS, feedback=True) == WeightSpec(**WEIGHTS, feedback=Feedback())
    assert WeightSpec(**WEIGHTS, feedback=False) == WeightSpec(**WEIGHTS)
    again = RECIPES["w4a8"].with_feedback(Feedback(refits=2)).rules[0].weights
    assert again == dataclasses.replace(
        RECIPES["w4a8"].rules[0].weights, feedback=Feedback(refits=2)
    )
