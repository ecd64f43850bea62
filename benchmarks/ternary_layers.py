"""The rungs to 1.58 bits that need no training, on real pretrained weights and activations.

    python -m benchmarks.ternary_layers

As `benchmarks.viditq_layers`, with its networks. A rung is judged by the signal-to-noise ratio of
weights and of products on other sentences or photographs than those it has seen; then the same with
int8 activations, and with a mask, a rotation or both before. The integers are real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
import tyro

from benchmarks.console import wide_console
from benchmarks.real_layers import Options, Subject, subjects
from benchmarks.ternary_rungs import FEEDBACK
from benchmarks.viditq_layers import measure, table
from lowbit_jax.quant.recipe import Balance, Rule, WeightSpec
from lowbit_jax.quant.weights import quantize_kernel


def _rule(quantizer: str, granularity: str = "channel", **options) -> Rule:
    spec = WeightSpec(format="ternary", quantizer=quantizer, granularity=granularity)
    return Rule(match=".*", weights=spec, **options)


def _feedback(rule: Rule) -> Rule:
    assert rule.weights is not None
    return dataclasses.replace(rule, weights=dataclasses.replace(rule.weights, feedback=FEEDBACK))


ABSMEAN = _rule("absmean", "tensor")
PLAIN = _rule("least_squares")
ROTATED = _rule("least_squares", rotation="auto")
RUNGS = {
    "absmean": ABSMEAN,
    "least squares": PLAIN,
    "rotated": ROTATED,
    "feedback": _feedback(PLAIN),
    "rotated, feedback": _feedback(ROTATED),
}
EIGHT = {f"{name}, int8": dataclasses.replace(rule, act_bits=8) for name, rule in RUNGS.items()} | {
    "balanced, feedback, int8": _feedback(
        _rule("least_squares", act_bits=8, balance=Balance(alpha="auto"))
    ),
    "both, feedback, int8": _feedback(
        _rule("least_squares", act_bits=8, balance=Balance(alpha="auto"), rotation="auto")
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the figure line of each network."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    for subject in subjects(options):
        report(subject)


def report(subject: Subject) -> None:
    """Measure and print all rungs."""
    console = wide_console()
    for name in ("absmean", "least squares"):
        ratio = weight_ratio(RUNGS[name], subject.kernels)
        console.print(f"{subject.name}, weights, {name}: {ratio:.1f} dB")
    means = {}
    for what, rules in (("ternary weights", RUNGS), ("and int8 activations", EIGHT)):
        found = {name: measure(rule, subject) for name, rule in rules.items()}
        console.print(table(what, subject, found))
        means |= {name: float(np.mean(list(ratios.values()))) for name, ratios in found.items()}
    shown = {name: means[name] for name in RUNGS} | {"feedback_int8": means["feedback, int8"]}
    words = (f"{n.replace(', ', '_').replace(' ', '_')}_dB={x:.2f}" for n, x in shown.items())
    print("figure: " + " ".join(f"{subject.name}_{word}" for word in words))


def weight_ratio(rule: Rule, kernels: Mapping[str, jax.Array]) -> float:
    """Signal-to-noise ratio in dB of the weights of all blocks' linears, mean over layers."""
    found = []
    for kernel in kernels.values():
        w = np.asarray(kernel, np.float64).T
        lost = w - np.asarray(quantize_kernel(kernel, rule).dequantize(), np.float64)
        found.append(10 * np.log10(np.square(w).sum() / np.square(lost).sum()))
    return float(np.mean(found))


if __name__ == "__main__":
    main()
