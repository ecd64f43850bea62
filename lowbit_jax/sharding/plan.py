"""A plan says how each linear lies on a mesh: rules from layer paths to `Split`s, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from lowbit_jax.ops import logical_shape
from lowbit_jax.quant.lora import LoraKernel
from lowbit_jax.quant.stacks import is_stack, segments
from lowbit_jax.sharding.kernel import How, Split, unit


class PlanError(ValueError):
    """A plan that does not fit the parameters or the mesh; the message has the numbers."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the linears whose whole layer path matches lie on the devices of the plan's axis.

    Attributes:
        match: regular expression for the layer path, such as "double_blocks/3/img_attn/qkv".
        how: see `kernel.Split`.
        parts: sizes of what the split axis is made of, for a fused matrix; empty for one part.
        unit: features that must stay on one device, such as those of a head.
        otherwise: what to do where a matrix does not divide: "error", or "whole", which a report
            mentions.
    """

    match: str
    how: How
    parts: tuple[int, ...] = ()
    unit: int = 1
    otherwise: str = "error"

    def __post_init__(self) -> None:
        if self.how not in get_args(How) or self.otherwise not in ("error", "whole"):
            raise PlanError(
                f"rule '{self.match}': how is one of {', '.join(get_args(How))} (found "
                f"{self.how!r}), otherwise 'error' or 'whole' (found {self.otherwise!r})"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An ordered list of rules: the first that matches decides; what none matches is whole.

    Attributes:
        name: what tables call it.
        rules: in order of precedence. One that decides nothing is an error where it is used.
        axis: mesh axis over which matrices are split.
        rows: mesh axis over which batches are split, where the mesh has it and it divides.
        stored: mesh axis over which whole matrices are stored in shares (FSDP).
    """

    name: str
    rules: tuple[Rule, ...] = ()
    axis: str = "model"
    rows: str | None = "data"
    stored: str | None = None

    def rule_for(self, layer: str) -> Rule | None:
        """The rule that decides for a layer path; None where the matrix is whole."""
        return next((rule for rule in self.rules if re.fullmatch(rule.match, layer)), None)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a kernel: its split, and why it is not the one asked for, if it is not."""

    split: Split
    note: str = ""


def decide(params: Mapping[str, Any], mesh: Any, plan: Plan, part: str = "") -> dict[str, Decision]:
    """What a plan makes of every kernel of a tree, by layer path; nothing is placed.

    Args:
        params: arrays or shapes.
        mesh: a `Mesh` or `AbstractMesh`.
        plan: what to do.
        part: the path of the tree in the model's, such as "double_blocks/3/"; only of a whole
            model are all rules expected to decide something.

    Raises:
        PlanError: widths that do not divide, with the numbers of all of them; a rule that decides
            nothing; a mesh without the plan's axis.
    """
    if any(rule.how != "whole" for rule in plan.rules) and plan.axis not in mesh.shape:
        raise PlanError(f"plan '{plan.name}' splits over '{plan.axis}'; {_axes(mesh)}")
    if plan.stored is not None and plan.stored not in mesh.shape:
        raise PlanError(f"plan '{plan.name}' stores shares over '{plan.stored}'; {_axes(mesh)}")
    found: dict[str, Decision] = {}
    problems: dict[str, str] = {}
    used = set()
    for paths, name, leaf in leaves(params, (part,)):
        for path in paths if name == "kernel" else ():
            rule = plan.rule_for(path)
            used.add(rule)
            found[path], problem = _decide(leaf, mesh, plan, rule)
            if problem:
                problems.setdefault(re.sub(r"/\d+(?=/)", "/*", path), problem)
    if problems:
        lines = "\n  ".join(f"{path}: {problem}" for path, problem in problems.items())
        raise PlanError(
            f"plan '{plan.name}' does not fit {dict(mesh.shape)}:\n  {lines}\n"
            "take fewer devices on that axis, or a rule with otherwise='whole'"
        )
    if idle := [rule.match for rule in plan.rules if rule not in used and not part]:
        raise PlanError(f"plan '{plan.name}': no kernel is decided by rule(s) {', '.join(idle)}")
    return found


def leaves(
    params: Mapping[str, Any], prefixes: tuple[str, ...] = ("",)
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(paths, name, value) of every parameter: paths of what holds it, one per stacked layer."""
    for key, value in params.items():
        if is_stack(value):
            for first, length, tree in segments(value):
                layers = range(first, first + length)
                inner = (f"{p}{key}/{layer}/" for p in prefixes for layer in layers)
                yield from leaves(tree, tuple(inner))
        elif isinstance(value, Mapping):
            yield from leaves(value, tuple(f"{prefix}{key}/" for prefix in prefixes))
        else:
            yield tuple(prefix.removesuffix("/") for prefix in prefixes), key, value


def map_leaves(
    params: Mapping[str, Any],
    change: Callable[[tuple[str, ...], str, Any], Any],
    prefixes: tuple[str, ...] = ("",),
) -> dict[str, Any]:
    """A copy of a tree with every parameter replaced by `change(paths, name, value)`."""
    out: dict[str, Any] = {}
    for key, value in params.items():
        if is_stack(value):
            out[key] = {}
            for first, length, tree in segments(value):
                layers = range(first, first + length)
                inner = tuple(f"{p}{key}/{layer}/" for p in prefixes for layer in layers)
                out[key][str(first)] = map_leaves(tree, change, inner)
        elif isinstance(value, Mapping):
            out[key] = map_leaves(value, change, tuple(f"{p}{key}/" for p in prefixes))
        else:
            out[key] = change(tuple(p.removesuffix("/") for p in prefixes), key, value)
    return out


def _decide(kernel: Any, mesh: Any, plan: Plan, rule: Rule | None) -> tuple[Decision, str]:
    """What becomes of one kernel, and what is wrong with that."""
    rows = plan.rows if plan.rows in mesh.shape else None
    if isinstance(kernel, LoraKernel):
        kernel = kernel.base
    k, n = logical_shape(kernel)[-2:]
    if rule is None or rule.how == "whole":
        stored, note = plan.stored, ""
        if stored is not None and n % mesh.shape[stored]:
            stored, note = None, f"whole: {n} outputs on {mesh.shape[stored]} devices"
        split = Split(mesh=mesh, how="whole", rows=rows, stored=stored)
        return Decision(split=split, note=note), ""
    parts = rule.parts or (k if rule.how == "inputs" else n,)
    if problem := _misfit(kernel, rule, parts, mesh.shape[plan.axis]):
        whole = Decision(split=Split(mesh=mesh, how="whole", rows=rows), note=f"whole: {problem}")
        return whole, "" if rule.otherwise == "whole" else problem
    split = Split(mesh=mesh, how=rule.how, axis=plan.axis, parts=parts, rows=rows)
    return Decision(split=split), ""


def _misfit(kernel: Any, rule: Rule, parts: tuple[int, ...], devices: int) -> str:
    """Why a matrix cannot be split, in numbers; empty if it can."""
    k, n = logical_shape(kernel)[-2:]
    what, size = ("inputs", k) if rule.how == "inputs" else ("outputs", n)
    if sum(parts) != size:
        return f"parts {parts} are {sum(parts)} {what}, the matrix has {size}"
    smallest, why = unit(kernel) if rule.how == "inputs" else (1, "")
    for part in parts:
        share = part // devices
        found = f"{part} {what} on {devices} devices are {part / devices:g} each"
        if part % devices or share % rule.unit:
            return f"{found}, no multiple of {rule.unit}"
        if share % smallest:
            return f"{found}, which would cut {why} ({smallest})"
    return ""


def _axes(mesh: Any) -> str:
    return f"the mesh has the axes {', '.join(mesh.shape)}"
