"""One function, one target, one line: what its Pallas kernel compiles to."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.audit.cases import find_op
from pallas_kernels.audit.compile import compile_kernels
from pallas_kernels.audit.model import Report, report
from pallas_kernels.audit.targets import target as find_target
from pallas_kernels.tiles import Tile

_SPEC = re.compile(r"(\w+)\[([\d,]*)\]")


def probe(fn: Callable, *specs, target: str = "a100", kernel: str | None = None) -> Report:
    """Compiles fn(*specs) for a GPU and reports on its Pallas-Triton kernel.

    Args:
        fn: a function of arrays; bind static arguments with functools.partial.
        specs: jax.ShapeDtypeStruct, one per argument.
        target: a100, a10, l20 or h100.
        kernel: which one, where fn calls several: the `name` of its pallas_call.

    Raises:
        ValueError: no such target; no, or more than one, kernel of that name.
        ToolError: the compiler pieces are missing.
    """
    found = [
        compiled
        for compiled in compile_kernels(fn, specs, find_target(target))
        if kernel in (None, compiled.name)
    ]
    if len(found) != 1:
        raise ValueError(f"expected one kernel, found {[k.name for k in found]}; pass kernel=")
    return report(found[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m pallas_kernels.audit probe`."""
    parser.add_argument("function", help="module:function, or an op that `lowbit-jax audit` knows")
    parser.add_argument(
        "specs", nargs="+", help='arguments, "int8[4608,3072]", "none" for None; m k n for an op'
    )
    parser.add_argument("--tile", help="m,n,k,num_warps,num_stages")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="static keywords"
    )
    parser.add_argument("--target", default="a100")
    parser.add_argument("--kernel", help="the kernel's name, where there are several")
    parser.add_argument("--sass", action="store_true", help="print the main loop's machine code")


def main(arguments: argparse.Namespace) -> int:
    """Runs the probe command; prints its line."""
    tile = Tile(*map(int, arguments.tile.split(","))) if arguments.tile else None
    fn, specs = _named(arguments, tile) if ":" in arguments.function else _op(arguments, tile)
    found = probe(fn, *specs, target=arguments.target, kernel=arguments.kernel)
    if arguments.sass:
        for i in found.loop.instructions:
            print(f"{i.address:05x} {i.predicate:5} {i.opcode} {i.operands}")
    print(found.line())
    return 0


def _op(arguments: argparse.Namespace, tile: Tile | None):
    """(function, arguments) of an op of `cases` at m, k, n."""
    m, k, n = (*map(int, arguments.specs), 0)[:3]
    return find_op(arguments.function).build(m, k, n, find_target(arguments.target).sm, tile)[:2]


def _named(arguments: argparse.Namespace, tile: Tile | None):
    """(function, arguments) of module:function."""
    module, name = arguments.function.split(":")
    keywords = dict(_keyword(text) for text in arguments.set)
    if tile:
        keywords["tile"] = tile
    fn = functools.partial(getattr(importlib.import_module(module), name), **keywords)
    return fn, [_spec(text) for text in arguments.specs]


def _keyword(text: str):
    name, value = text.split("=", 1)
    if hasattr(jnp, value):
        return name, getattr(jnp, value)
    return name, ast.literal_eval(value)


def _spec(text: str):
    if text.lower() == "none":
        return None
    match = _SPEC.fullmatch(text)
    if not match:
        raise ValueError(f"an argument is written like int8[4608,3072], got {text!r}")
    sizes = tuple(int(size) for size in match[2].split(",") if size)
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(match[1]))
