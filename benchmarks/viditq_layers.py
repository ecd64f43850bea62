"""Layer by layer on real pretrained weights and activations: `python -m benchmarks.viditq_layers`.

MiniLM (all-MiniLM-L6-v2: six BERT blocks of width 384, trained by others on text) reads sentences,
the input of every linear is kept, and each method's product is compared with the float one. A small
diffusion model that was trained for an hour has few outliers; a transformer that was trained long
has the ones that balancing and rotating are for. Masks and static scales come from other sentences
than those that are judged. The integers are real. The figure of a layer is its signal-to-noise
ratio, 10 log10 of |y|^2 / |y' - y|^2, over all rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from convert.minilm import load_minilm
from lowbit_jax import ops
from lowbit_jax.models.bert import BertEncoder
from lowbit_jax.models.layers import Linear
from lowbit_jax.quant import hadamard
from lowbit_jax.quant.recipe import RECIPES, Rule
from lowbit_jax.quant.stacks import iter_layers
from lowbit_jax.quant.weights import Given, treat_kernel

METHODS = ("naive", "dynamic", "qdit", "smoothquant", "quarot", "viditq")
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
TOKENS = 64  # of a sentence, at most
ROWS = 2048  # of each linear's input that are multiplied
CHOOSE_ROWS = 128  # of each linear's input that masks are chosen by
TYPES = ("query", "key", "value", "proj", "mlp_in", "mlp_out")
INPUT = "input"  # under which inputs are sown

Rows = Mapping[str, Float[np.ndarray, "rows k"]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Output error of each method on each linear of MiniLM."""

    sentences: int = 128
    """Sentences that are judged; as many others are calibrated on."""
    text: tuple[Path, ...] = (Path("README.md"), Path("CHANGELOG.md"), Path("docs"))
    """Files and folders of .md files the sentences are taken from."""


def main(argv: list[str] | None = None) -> None:
    """Print a table per kind of linear, and the figure line."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    kernels, rows, seen = subject(options)
    console = Console()
    console.print(outliers_table(rows))
    means: dict[str, float] = {}
    for bits in BITS:
        ratios = {
            m: measure(rule_of(m, bits), kernels, rows, seen) for m in METHODS if has(m, bits)
        }
        console.print(table(bits.upper(), ratios))
        means |= {f"{m}_{bits}": float(np.mean(list(r.values()))) for m, r in ratios.items()}
    best = {bits: max(METHODS, key=lambda m: means.get(f"{m}_{bits}", -np.inf)) for bits in BITS}
    console.print("highest mean: " + ", ".join(f"{b} {m}" for b, m in best.items()))
    shown = (f"{m}_{b}" for b in BITS for m in ("dynamic", "viditq"))
    print("figure: " + " ".join(f"{name}_dB={means[name]:.2f}" for name in shown))


def subject(options: Options) -> tuple[Mapping[str, jax.Array], Rows, Rows]:
    """Kernels of MiniLM's linears by layer path; their inputs that judge, and to calibrate on.

    Raises:
        SystemExit: too few sentences.
    """
    texts = sentences(options.text)
    need = 2 * options.sentences
    if len(texts) < need:
        raise SystemExit(f"{len(texts)} sentences in {options.text}, {need} are needed")
    encode = load_minilm()
    calibration, judged = texts[0:need:2], texts[1:need:2]
    rows = {layer: x[:ROWS] for layer, x in inputs(encode, judged).items()}
    kernels = {layer: k if i is None else k[i] for layer, k, i in iter_layers(encode.params)}
    return kernels, rows, inputs(encode, calibration)


def sentences(paths: tuple[Path, ...]) -> list[str]:
    """Lines of prose of at least eight words, tables and code left out, each once."""
    files = [f for p in paths for f in (sorted(p.rglob("*.md")) if p.is_dir() else [p])]
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    prose = (line for line in lines if line and line[0].isalpha() and "|" not in line)
    return list(dict.fromkeys(line for line in prose if len(re.findall(r"\w+", line)) >= 8))


def inputs(encode: Any, texts: list[str]) -> dict[str, Float[np.ndarray, "rows k"]]:
    """What every linear was given, by layer path, padding left out."""
    ids, mask = encode.tokens(texts, TOKENS)
    found: dict[str, list[np.ndarray]] = {}
    model = BertEncoder(encode.config)
    for start in range(0, len(texts), 16):
        batch = ids[start : start + 16], mask[start : start + 16]
        for layer, x in jax.device_get(_watched(encode.params, model, *batch)).items():
            found.setdefault(layer, []).append(x[np.asarray(batch[1])])
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def _watched(params: Any, model: BertEncoder, ids: Any, mask: Any) -> dict[str, jax.Array]:
    def interceptor(call, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            context.module.sow("intermediates", INPUT, args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        _, state = model.apply({"params": params}, ids, mask, mutable=["intermediates"])
    blocks = state["intermediates"]["blocks"]["0"]
    layers = len(jax.tree.leaves(blocks)[0])
    return {
        f"blocks/{layer}/{name}": blocks[name][INPUT][0][layer]
        for layer in range(layers)
        for name in TYPES
    }


def has(method: str, bits: str) -> bool:
    """Whether a method has a recipe at these bits."""
    return method == "dynamic" or f"{method}-{bits}" in RECIPES


def rule_of(method: str, bits: str) -> Rule:
    """How a recipe treats a block's linear; "dynamic" is ViDiT-Q's with plain rounding alone."""
    if method != "dynamic":
        return RECIPES[f"{method}-{bits}"].rules[-1]
    rule = RECIPES[f"viditq-{bits}"].rounded().rules[-1]
    return dataclasses.replace(rule, balance=None, rotation=None)


def measure(
    rule: Rule,
    kernels: Mapping[str, jax.Array],
    rows: Rows,
    seen: Rows,
) -> dict[str, float]:
    """Signal-to-noise ratio in dB of every linear's product; `seen` are the rows calibrated on."""
    found = {}
    for layer, x in rows.items():
        given = _given(rule, layer, seen[layer])
        exact, got = _products(x, kernels[layer], given, rule)
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


def outliers_table(rows: Mapping[str, np.ndarray]) -> Table:
    """How uneven the inputs are: their largest channel against the mean one, by kind of linear."""
    out = Table(title="largest channel over mean channel (absmax)", box=box.SIMPLE, pad_edge=False)
    for name in TYPES:
        out.add_column(name, justify="right")
    cells = []
    for name in TYPES:
        most = [np.abs(x).max(axis=0) for layer, x in rows.items() if layer.endswith(f"/{name}")]
        cells.append(f"{np.mean([m.max() / m.mean() for m in most]):.1f}")
    out.add_row(*cells)
    return out


def table(what: str, ratios: Mapping[str, Mapping[str, float]]) -> Table:
    """Mean dB by kind of linear, a row per method."""
    title = f"{what}: dB of the product, mean over 6 layers"
    out = Table(title=title, box=box.SIMPLE, pad_edge=False)
    out.add_column("method", no_wrap=True)
    for name in (*TYPES, "mean", "worst"):
        out.add_column(name, justify="right", no_wrap=True)
    for method, found in ratios.items():
        by_type = [[v for k, v in found.items() if k.endswith(f"/{name}")] for name in TYPES]
        values = [*map(np.mean, by_type), np.mean(list(found.values())), min(found.values())]
        out.add_row(method, *(f"{value:.1f}" for value in values))
    return out


if __name__ == "__main__":
    main()
