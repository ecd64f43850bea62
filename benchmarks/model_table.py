"""README's table of networks, from the registries: `python -m benchmarks.model_table [--write]`.

Which checkpoints are read and written (`convert.registry`), which samplers the publishers use
(`lowbit_jax.models.registry`), and in which of the named recipes every rule finds a layer of the
network.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from convert.registry import SOURCES
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.recipe import RECIPES, RecipeError
from lowbit_jax.quant.stacks import layer_paths
from lowbit_jax.samplers.registry import SAMPLERS

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- networks: `python -m benchmarks.model_table --write` writes what follows -->\n"
END = "<!-- end of networks -->\n"
HEAD = ("network", "parameters", "checkpoints read", "written", "samplers", "recipes")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print README's table of networks."""

    write: bool = False
    """Put it into README.md."""


def fitting_recipes(params: Any) -> list[str]:
    """Names of the recipes in which no rule is idle on a parameter tree."""
    layers = layer_paths(params)
    found = []
    for name, recipe in RECIPES.items():
        try:
            recipe.assign(layers)
        except RecipeError:
            continue
        found.append(name)
    return found


def row(name: str) -> tuple[str, ...]:
    """Cells of one network, under `HEAD`; parameters of its default config."""
    network, source = NETWORKS[name], SOURCES[name]
    params = network.abstract_params(network.config())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    recipes = fitting_recipes(params)
    every = len(recipes) == len(RECIPES)
    return (
        network.title,
        f"{count:,}",
        ", ".join(layout.name for layout in source.layouts),
        ", ".join(source.exports),
        ", ".join(SAMPLERS[sampler].title for sampler in network.samplers),
        "all" if every else ", ".join(f"`{recipe}`" for recipe in recipes),
    )


def markdown() -> str:
    """The table, one line per network."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(name) for name in NETWORKS)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def inserted(text: str, table: str) -> str:
    """A README with the table between its two marks.

    Raises:
        ValueError: a README without them.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README needs the lines {BEGIN.strip()} and {END.strip()}, once each")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --write, put it into README.md."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    table = markdown()
    sys.stdout.write(table)
    if options.write:
        README.write_text(inserted(README.read_text(), table))


if __name__ == "__main__":
    main()
