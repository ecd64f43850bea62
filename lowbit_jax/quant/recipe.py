"""Recipes: which kernel is quantised how, as data that round-trips through JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_jax.quant.specs import Balance, Feedback, RecipeError, WeightSpec, is_positive

__all__ = [
    "RECIPES",
    "Balance",
    "Feedback",
    "Recipe",
    "RecipeError",
    "Rule",
    "WeightSpec",
    "load_recipe",
]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to do with the kernels whose layer path matches: balance, rotate, quantise.

    Attributes:
        match: regular expression for the whole layer path, such as "double_blocks/3/img_attn/qkv".
        weights: how to quantise; None keeps the kernel in floating point.
        act_bits: bits of the per-token activations (2..8); None leaves them in floating point.
        balance: a mask between input and weights; None for none.
        rotation: of input and weights, by a randomised Hadamard matrix: block size, "full" for the
            whole width, "auto" for the largest block that the kernels rotate in the pass that
            quantises, and else "full"; None for none.
        act_static: one scale for all tokens, steps and samples, from statistics, instead of one per
            token: the naive baseline. Not with a rotation: statistics are of channels as they are.
        act_symmetric: False gives each token a zero point too, see `quant.asymmetric`.
        optional: the rule may decide nothing, as those of recipes for many networks.
    """

    match: str
    weights: WeightSpec | None
    act_bits: int | None = None
    balance: Balance | None = None
    rotation: int | str | None = None
    act_static: bool = False
    act_symmetric: bool = True
    optional: bool = False

    @property
    def keeps(self) -> bool:
        """Whether the rule leaves kernels as they are."""
        return self.weights is None and self.balance is None and self.rotation is None

    @property
    def needs_statistics(self) -> bool:
        """Whether statistics of the activations are needed."""
        return self.balance is not None or self.act_static

    @property
    def needs_grams(self) -> bool:
        """Whether X^T X of the activations is needed."""
        return self.weights is not None and self.weights.feedback is not None

    @property
    def chooses_alpha(self) -> bool:
        """Whether the balance is chosen layer by layer."""
        return self.balance is not None and self.balance.alpha == "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.match, str):
            raise RecipeError(f"match {self.match!r} is not a string")
        try:
            re.compile(self.match)
        except re.error as error:
            raise RecipeError(f"rule '{self.match}' is not a regular expression: {error}") from None
        if self.act_bits is not None and self.weights is None:
            raise RecipeError(
                f"rule '{self.match}': act_bits {self.act_bits} needs quantised weights"
            )
        if self.act_bits is not None and not (
            type(self.act_bits) is int and 2 <= self.act_bits <= 8
        ):
            raise RecipeError(f"rule '{self.match}': act_bits {self.act_bits!r} outside 2..8")
        if not (self.rotation in (None, "full", "auto") or is_positive(self.rotation)):
            raise RecipeError(
                f"rule '{self.match}': rotation {self.rotation!r} is neither a block size, 'full' "
                "nor 'auto'"
            )
        for name in ("act_static", "act_symmetric", "optional"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"rule '{self.match}': {name} is no boolean")
        if self.chooses_alpha and self.weights is None:
            raise RecipeError(f"rule '{self.match}': alpha 'auto' needs quantised weights")
        if self.act_static and (self.act_bits is None or self.rotation is not None):
            raise RecipeError(f"rule '{self.match}': act_static needs act_bits and no rotation")
        if not self.act_symmetric and (self.act_bits is None or self.act_static):
            raise RecipeError(
                f"rule '{self.match}': act_symmetric false needs act_bits and no act_static "
                "(statistics hold magnitudes, and so no zero point)"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ordered list of rules: the first that matches a kernel's layer decides; no match keeps it.

    Attributes:
        name: what tables and manifests call it.
        rules: in order of precedence. A rule that decides nothing is an error where it is used.
        on_nonfinite: "error" stops on a NaN or inf weight, naming it; "keep" leaves that matrix in
            floating point.
        description: one line for people.
        seed: of the signs of rotations, with the layer path: see `hadamard.signs`.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    on_nonfinite: str = "error"
    description: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int:
            raise RecipeError(f"seed {self.seed!r} is no integer")
        if self.on_nonfinite not in ("error", "keep"):
            raise RecipeError(f"on_nonfinite '{self.on_nonfinite}' is neither 'error' nor 'keep'")

    @property
    def needs_statistics(self) -> bool:
        """Whether any rule needs statistics of the activations."""
        return any(rule.needs_statistics or rule.needs_grams for rule in self.rules)

    def keeping(self, match: str) -> Recipe:
        """The same recipe, but kernels whose whole layer path matches stay in floating point.

        Raises:
            RecipeError: not a regular expression.
        """
        rules = (Rule(match=match, weights=None), *self.rules)
        return dataclasses.replace(self, name=f"{self.name} keeping {match}", rules=rules)

    def rounded(self) -> Recipe:
        """The same recipe without error feedback: it needs no X^T X."""
        if not any(rule.needs_grams for rule in self.rules):
            return self
        return self._with(None, f"{self.name} rounded")

    def with_feedback(self, settings: Feedback = Feedback()) -> Recipe:  # noqa: B008 (frozen)
        """The same recipe with error feedback for all weights that it quantises."""
        return self._with(settings, f"{self.name} with feedback")

    def _with(self, settings: Feedback | None, name: str) -> Recipe:
        def changed(rule: Rule) -> Rule:
            weights = rule.weights and dataclasses.replace(rule.weights, feedback=settings)
            return dataclasses.replace(rule, weights=weights)

        return dataclasses.replace(self, name=name, rules=tuple(map(changed, self.rules)))

    def rule_for(self, layer: str) -> Rule | None:
        """The rule that decides for a layer path: the first that matches, None if none does."""
        index = self._first_match(layer)
        return None if index is None else self.rules[index]

    def assign(self, layers: list[str]) -> dict[str, Rule | None]:
        """How each layer path is treated; None for those that stay as they are.

        Raises:
            RecipeError: some rules decide nothing; names all of them and an example of a path.
        """
        deciding = {self._first_match(layer) for layer in layers}
        idle = [
            rule.match
            for index, rule in enumerate(self.rules)
            if index not in deciding and not rule.optional
        ]
        if idle:
            example = f"; layers look like '{layers[len(layers) // 2]}'" if layers else ""
            raise RecipeError(
                f"recipe '{self.name}': no kernel is decided by rule(s) "
                f"{', '.join(map(repr, idle))}{example}"
            )
        chosen = {layer: self.rule_for(layer) for layer in layers}
        return {layer: rule and (None if rule.keeps else rule) for layer, rule in chosen.items()}

    def _first_match(self, layer: str) -> int | None:
        matches = (i for i, rule in enumerate(self.rules) if re.fullmatch(rule.match, layer))
        return next(matches, None)

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `Recipe.from_json` is the inverse."""
        return dataclasses.asdict(self) | {
            "rules": [dataclasses.asdict(rule) for rule in self.rules]
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        """Build a recipe from parsed JSON; unknown or missing fields raise `RecipeError`."""
        fields = _fields(Recipe, data, "recipe")
        items = fields.get("rules", [])
        if not isinstance(items, (list, tuple)):
            raise RecipeError(f"rules: expected a list, found {type(items).__name__}")
        rules = []
        for number, item in enumerate(items):
            item = _fields(Rule, item, f"rule {number}")
            if item.get("weights") is not None:
                where = f"rule {number}, weights"
                spec = _fields(WeightSpec, item["weights"], where)
                if isinstance(spec.get("feedback"), dict):
                    settings = _fields(Feedback, spec["feedback"], f"{where}, feedback")
                    spec["feedback"] = Feedback(**settings)
                item["weights"] = WeightSpec(**spec)
            if item.get("balance") is not None:
                item["balance"] = Balance(
                    **_fields(Balance, item["balance"], f"rule {number}, balance")
                )
            rules.append(Rule(**item))
        return Recipe(**(fields | {"rules": tuple(rules)}))


def _fields(cls: type, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected an object, found {type(data).__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(known))
    missing = sorted(
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and name not in data
    )
    if unknown or missing:
        raise RecipeError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    return dict(data)


BLOCK_LINEARS = r"[a-z_]*blocks/\d+/.*"  # every linear inside a transformer block, modulation too
# What ViDiT-Q's w8a8.yaml of PixArt also keeps in floating point ("attn2.to_[kv]"), as an option:
# RECIPES["w8a8"].keeping(CAPTION_KEYS_VALUES)
CAPTION_KEYS_VALUES = r".*/cross_attn/kv_linear"


# Linears inside blocks that make shifts, scales and gates of the time: one row for each sample.
MODULATIONS = r"[a-z_]*blocks/\d+/(\w+/)?(adaLN_modulation|(\w+_mod|modulation)/lin)"
MLPS = r"[a-z_]*blocks/\d+/(.*/)?(\w+_)?mlp/.*"
FIRST_BLOCKS = r"[a-z_]*blocks/0/.*"


def _blocks(
    name: str, description: str, weights: WeightSpec, act_bits: int | None = None
) -> Recipe:
    rule = Rule(match=BLOCK_LINEARS, weights=weights, act_bits=act_bits)
    return Recipe(name=name, rules=(rule,), description=description)


_INT8 = WeightSpec(format="int8", quantizer="absmax")
_INT4 = WeightSpec(format="int4", quantizer="mse")
_INT4_GROUPS = WeightSpec(format="int4", quantizer="minmax", granularity=128)
_TERNARY = WeightSpec(format="ternary", quantizer="least_squares")
_CHANNELS = {8: _INT8, 6: WeightSpec(format="int6", quantizer="mse"), 4: _INT4}
_GROUPS = {
    bits: WeightSpec(format=f"int{bits}", quantizer="minmax", granularity=128) for bits in (8, 6, 4)
}
_NAIVE = {bits: WeightSpec(format=f"int{bits}", quantizer="absmax") for bits in (8, 4)}


def _time_aware(name: str, description: str, bits: int, *rules: Rule) -> Recipe:
    """A recipe whose modulations have groups of 128 weights and floating inputs.

    They are a third of a DiT or FLUX and a thousandth of its products: their bytes count, their
    speed does not, and their errors reach every token. So for all methods alike.
    """
    modulations = Rule(match=MODULATIONS, weights=_GROUPS[bits], optional=True)
    return Recipe(name=name, rules=(modulations, *rules), description=description)


def _method(name: str, description: str, bits: str, weights: WeightSpec, **options: Any) -> Recipe:
    """One method at "w4a8" and the like."""
    rule = Rule(match=BLOCK_LINEARS, weights=weights, act_bits=int(bits[3]), **options)
    return _time_aware(f"{name}-{bits}", f"{description}, {bits.upper()}", int(bits[1]), rule)


def _viditq(bits: str) -> Recipe:
    """Masks chosen layer by layer; below 8 bits codes by error feedback, which needs X^T X."""
    weights = _CHANNELS[int(bits[1])]
    weights = dataclasses.replace(weights, feedback=bits != "w8a8")
    text = "ViDiT-Q: static mask, randomised Hadamard rotation, per token"
    balance = Balance(alpha="auto")
    return _method("viditq", text, bits, weights, balance=balance, rotation="auto")


def _viditq_v1() -> Recipe:
    """Two halves of the time, as v1 has them; its alphas, of late (low noise) and early steps."""
    balance = Balance(alpha=(0.15, 0.075))
    text = "ViDiT-Q v1: one mask for each half of the timesteps, per token"
    return _method("viditq-v1", text, "w4a8", _INT4, balance=balance)


def _viditq_mixed() -> Recipe:
    """ViDiT-Q's own tables as one: MLPs (v1, and v2 of PixArt) and first blocks (v2) at 8 bits."""
    rest = _viditq("w4a8").rules[-1]
    more = [
        dataclasses.replace(rest, match=match, weights=_INT8, optional=True)
        for match in (FIRST_BLOCKS, MLPS)
    ]
    text = "ViDiT-Q W4A8, mixed: MLPs and first blocks at 8 bits"
    return _time_aware("viditq-w4a8-mp", text, 4, *more, rest)


def _rivals() -> list[Recipe]:
    smooth = {"w8a8": 0.625, "w6a6": 0.625, "w4a8": 0.11, "w4a4": 0.5}  # v1's; SmoothQuant's
    text = "static activations, one scale per tensor"
    found = [
        _method("naive", text, bits, _NAIVE[int(bits[1])], act_static=True)
        for bits in ("w8a8", "w4a8")
    ]
    for bits, alpha in smooth.items():
        weights = _CHANNELS[int(bits[1])]
        groups = _GROUPS[int(bits[1])]
        balance = Balance(alpha=alpha)
        found += [
            _method("smoothquant", "channels balanced", bits, weights, balance=balance),
            _method("quarot", "whole rows rotated", bits, weights, rotation="full"),
            _method("qdit", "groups of 128 weights, min-max", bits, groups),
        ]
    return found


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="float", description="port only: every kernel stays as it is"),
        _blocks("w8a8", "int8 weights per channel, int8 activations per token", _INT8, 8),
        _blocks(
            "w4a8", "int4 weights per channel (MSE clip), int8 activations per token", _INT4, 8
        ),
        _blocks("w8a16", "int8 weights per channel, float activations", _INT8),
        _blocks(
            "w4a16", "int4 weights in groups of 128 (min-max), float activations", _INT4_GROUPS
        ),
        _blocks("flux-1.58bit", "ternary weights per channel (exact least squares)", _TERNARY),
        _blocks("flux-1.58bit-a8", "ternary weights, int8 activations per token", _TERNARY, 8),
        _viditq("w8a8"),
        _viditq("w6a6"),
        _viditq("w4a8"),
        _viditq_mixed(),
        _viditq("w4a4"),
        _viditq_v1(),
        *sorted(_rivals(), key=lambda recipe: recipe.name),
    )
}


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """A named recipe, or one from a JSON file.

    Raises:
        RecipeError: neither a known name nor a readable JSON recipe.
    """
    name = os.fspath(name_or_path)
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if not path.is_file():
        raise RecipeError(f"recipe '{name}' is neither a file nor one of: {', '.join(RECIPES)}")
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {name} is not JSON: {error}") from None
    try:
        return Recipe.from_json(data)
    except RecipeError as error:
        raise RecipeError(f"recipe file {name}: {error}") from None
