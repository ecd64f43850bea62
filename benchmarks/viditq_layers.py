"""Layer by layer on real pretrained weights and activations: `python -m benchmarks.viditq_layers`.

MiniLM reads sentences, a vision transformer sees photographs (`benchmarks.real_layers`), the input
of every linear is kept, and each method's product is compared with the float one. A small diffusion
model that was trained for an hour has few outliers; a transformer that was trained long has the
ones that balancing and rotating are for. Masks and static scales come from other sentences or
photographs than those that are judged. The integers are real. The figure of a layer is its
signal-to-noise ratio, 10 log10 of |y|^2 / |y' - y|^2, over all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.table import Table

from benchmarks.console import wide_console
from benchmarks.real_layers import Options, Subject, kind_of, subjects
from lowbit_jax import ops
from lowbit_jax.quant import hadamard
from lowbit_jax.quant.recipe import RECIPES, Rule
from lowbit_jax.quant.weights import Given, treat_kernel

METHODS = ("naive", "dynamic", "qdit", "smoothquant", "quarot", "viditq")
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
CHOOSE_ROWS = 128  # of each linear's input that masks are chosen by


def main(argv: list[str] | None = None) -> None:
    """Print a table per bits, and the figure line, of each network."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    for subject in subjects(options):
        report(subject)


def report(subject: Subject) -> None:
    """Measure and print all methods at all bits."""
    console = wide_console()
    console.print(outliers_table(subject))
    means: dict[str, float] = {}
    for bits in BITS:
        ratios = {m: measure(rule_of(m, bits), subject) for m in METHODS if has(m, bits)}
        console.print(table(bits.upper(), subject, ratios))
        means |= {f"{m}_{bits}": float(np.mean(list(r.values()))) for m, r in ratios.items()}
    best = {bits: max(METHODS, key=lambda m: means.get(f"{m}_{bits}", -np.inf)) for bits in BITS}
    console.print("highest mean: " + ", ".join(f"{b} {m}" for b, m in best.items()))
    shown = (f"{m}_{b}" for b in BITS for m in ("dynamic", "viditq"))
    print("figure: " + " ".join(f"{subject.name}_{n}_dB={means[n]:.2f}" for n in shown))


def has(method: str, bits: str) -> bool:
    """Whether a method has a recipe at these bits."""
    return method == "dynamic" or f"{method}-{bits}" in RECIPES


def rule_of(method: str, bits: str) -> Rule:
    """How a recipe treats a block's linear; "dynamic" is ViDiT-Q's with plain rounding alone."""
    if method != "dynamic":
        return RECIPES[f"{method}-{bits}"].rules[-1]
    rule = RECIPES[f"viditq-{bits}"].rounded().rules[-1]
    return dataclasses.replace(rule, balance=None, rotation=None)


def measure(rule: Rule, subject: Subject) -> dict[str, float]:
    """Signal-to-noise ratio in dB of every linear's product, by layer path."""
    found = {}
    for layer, x in subject.rows.items():
        given = _given(rule, layer, subject.seen[layer])
        exact, got = _products(x, subject.kernels[layer], given, rule)
        error = np.square(np.float64(got) - np.float64(exact)).sum()
        found[layer] = float(10 * np.log10(np.square(np.float64(exact)).sum() / error))
    return found


def _given(rule: Rule, layer: str, seen: np.ndarray) -> Given:
    """What a rule needs of the inputs that were seen in calibration."""
    given = Given()
    if rule.needs_statistics:
        given = given._replace(absmax=np.abs(seen).max(axis=0))
    if rule.chooses_alpha:
        given = given._replace(rows=seen[:: -(-len(seen) // CHOOSE_ROWS)])
    elif rule.balance is not None:
        given = given._replace(alpha=np.float32(rule.balance.alpha))
    if rule.rotation is not None:
        given = given._replace(signs=hadamard.signs(0, layer, seen.shape[1]))
    if rule.needs_grams:
        given = given._replace(gram=np.float32(seen.T @ seen / len(seen)))
    return given


def _products(x: Any, kernel: jax.Array, given: Given, rule: Rule) -> Any:
    return _jitted(rule)(jnp.asarray(x), kernel, given)


def _jitted(rule: Rule) -> Any:
    if rule not in _PROGRAMS:

        def products(x, kernel, given):
            exact = jnp.dot(x, kernel, precision="highest")
            return exact, ops.linear(x, treat_kernel(kernel, rule, given))

        _PROGRAMS[rule] = jax.jit(products)
    return _PROGRAMS[rule]


_PROGRAMS: dict[Rule, Any] = {}


def outliers_table(subject: Subject) -> Table:
    """How uneven the inputs are: their largest channel against the mean one, by kind of linear."""
    title = f"{subject.name}: largest channel over mean channel (absmax)"
    out = Table(title=title, box=box.SIMPLE, pad_edge=False)
    ratios: dict[str, list[float]] = {}
    for layer, x in subject.rows.items():
        most = np.abs(x).max(axis=0)
        ratios.setdefault(kind_of(layer), []).append(most.max() / most.mean())
    for name in ("over layers", *ratios):
        out.add_column(name, justify="right")
    out.add_row("mean", *(f"{np.mean(found):.1f}" for found in ratios.values()))
    out.add_row("most", *(f"{max(found):.1f}" for found in ratios.values()))
    return out


def table(what: str, subject: Subject, ratios: Mapping[str, Mapping[str, float]]) -> Table:
    """Mean dB by kind of linear, a row per method; the worst layer by name."""
    title = f"{subject.name}, {what}: dB of the product, mean over {subject.depth} layers"
    out = Table(title=title, box=box.SIMPLE, pad_edge=False)
    out.add_column("method", no_wrap=True)
    for name in (*subject.kinds, "mean", "worst", "in layer"):
        out.add_column(name, justify="right", no_wrap=True)
    for method, found in ratios.items():
        by_kind = [[v for k, v in found.items() if kind_of(k) == name] for name in subject.kinds]
        worst = min(found, key=lambda layer: found[layer])
        values = [*map(np.mean, by_kind), np.mean(list(found.values())), found[worst]]
        out.add_row(method, *(f"{value:.1f}" for value in values), worst.removeprefix("blocks/"))
    return out


if __name__ == "__main__":
    main()
