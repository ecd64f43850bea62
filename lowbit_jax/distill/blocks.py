"""One block after the other: codes by what it is given, training by what it shall give.

A block of the quantised model is given what the quantised blocks before it make of the calibration
inputs. Its codes come from the X^T X of those (`feedback_blocks`), and it is trained towards what
the float block gives in the float model (`reconstruct`): so it also makes up for what was lost
before it (Li et al. 2021, BRECQ, with the inputs of Wei et al. 2022, QDrop, never dropped). Only
one block, its Hessians or its gradients and optimiser's state are in memory, and rows of
activations: of the batch on the device, of all samples on the host or in files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float64
from rich.console import Console

from lowbit_jax.calibration.collect import Run
from lowbit_jax.calibration.observe import iter_readings, observe
from lowbit_jax.distill import latent
from lowbit_jax.distill.activations import (
    CHUNK,
    Activations,
    Store,
    advance,
    entry,
    layers_of,
    node_of,
    restack,
    stacks_of,
    with_node,
)
from lowbit_jax.distill.split import split
from lowbit_jax.distill.train import Fit, Options, fit
from lowbit_jax.distill.trajectories import Trajectories, shuffled
from lowbit_jax.quant.recipe import Feedback, Recipe
from lowbit_jax.quant.stacks import Tree
from lowbit_jax.quant.transform import decide, quantize

FEEDBACK = Feedback()
CODES = r".*(/kernel/(growth|weight)|/bias|_norm/scale)"  # names within one block


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """What came out.

    Attributes:
        params: the quantised tree.
        fits: by layer, "double_blocks/1": losses are errors relative to what the block adds.
    """

    params: dict[str, Any]
    fits: dict[str, Fit]


def reconstruct(
    run: Run,
    params: Tree,
    quantized: Tree,
    data: Trajectories,
    options: Options,
    *,
    rows: int = 1024,
    folder: Path | None = None,
    trained: str = CODES,
    exact_scale: bool = False,
    minutes: float = float("inf"),
    console: Console | None = None,
) -> Reconstructed:
    """Train the blocks of `quantized` one by one.

    Args:
        run: what is run; its model's dtype is the dtype of the computation.
        params: float parameters.
        quantized: the same tree quantised, stacks cut alike; where training starts.
        data: where forwards are taken from.
        options: of the training of each block.
        rows: forwards that are used, the first `rows` of the order of `options.seed`.
        folder: where checkpoints and activations are kept; an interrupted call is gone on with.
        trained: regular expression for the names, within a block, of what is trained.
        exact_scale: see `latent.latents`.
        minutes: for all blocks; what is not begun by then stays as it was.
        console: for progress.

    Raises:
        DivergedError: with the block's name, see `fit`.
        ValueError: a model without stacks, or stacks cut otherwise; not enough data.
    """
    out, fits = dict(quantized), {}
    for stack, make_block in stacks_of(run, params, data.batch(0, 2, 0)).items():
        store = Store(folder, rows)
        teacher = entry(run, params, stack, data, options.seed, store, "teacher")
        student = entry(run, out, stack, data, options.seed, store, "student")
        node, floats, done = node_of(out, stack), dict(layers_of(node_of(params, stack))), []
        for layer, tree in layers_of(node):
            name, block = f"{stack}/{layer}", make_block(layer)
            target = advance(block, floats[layer], teacher, store, f"teacher-{layer}")
            fitted = _fit_block(
                block,
                latent.latents(floats[layer], tree, exact_scale=exact_scale),
                _Rows.of(student, teacher, target),
                options,
                trained,
                folder and folder / name.replace("/", "."),
                about=data.digest,
                name=name,
                minutes=minutes,
                console=console,
            )
            fits[name], tree = fitted
            minutes -= fits[name].seconds / 60
            done.append(tree)
            student = advance(block, tree, student, store, f"student-{layer}")
            teacher = target
        out = with_node(out, stack, restack(node, done))
        store.close()
    return Reconstructed(params=out, fits=fits)


def feedback_blocks(
    run: Run,
    params: Tree,
    recipe: Recipe,
    data: Trajectories,
    options: Feedback = FEEDBACK,
    *,
    rows: int = 1024,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str], object] = lambda block: None,
) -> dict[str, Any]:
    """`quantize` with feedback, block by block, each on what the quantised blocks before it give.

    Args:
        run: what is run.
        params: float parameters.
        recipe: what to do; in the stacks alone, and without statistics.
        data: where forwards are taken from.
        options: of the feedback.
        rows: see `reconstruct`.
        seed: of which forwards those are.
        folder: where activations are kept meanwhile; None for in memory.
        progress: called with the name of each block that is done.

    Raises:
        ValueError: a recipe that treats linears outside the stacks, and as `reconstruct`.
        RecipeError, NonFiniteError, ValueError: see `quantize`.
    """
    chosen, out = decide(params, recipe), dict(params)
    makers = stacks_of(run, params, data.batch(0, 2, 0))
    outside = [path for path, rule in chosen.items() if rule and not path.startswith(tuple(makers))]
    if outside:
        raise ValueError(f"recipe '{recipe.name}' also treats {outside[0]}, outside the blocks")
    for stack, make_block in makers.items():
        store = Store(folder, rows)
        student = entry(run, out, stack, data, seed, store, "student")
        node, done = node_of(out, stack), []
        for layer, tree in layers_of(node):
            prefix, block = f"{stack}/{layer}/", make_block(layer)
            here = {p.removeprefix(prefix): r for p, r in chosen.items() if p.startswith(prefix)}
            rules = [
                dataclasses.replace(rule, match=re.escape(path), optional=False)
                for path, rule in here.items()
                if rule is not None
            ]
            own = dataclasses.replace(recipe, rules=tuple(rules))
            grams = _grams(block, tree, student, rows)
            tree = quantize(tree, own.with_feedback(options), grams=grams)
            done.append(tree)
            student = advance(block, tree, student, store, f"student-{layer}")
            progress(prefix.rstrip("/"))
        out = with_node(out, stack, restack(node, done))
        store.close()
    return out


def _grams(
    block: nn.Module, tree: Tree, given: Activations, rows: int
) -> dict[str, Float64[np.ndarray, "k k"]]:
    """X^T X of every linear of a block over all rows: sums in float64, on the host."""
    sums: dict[str, Any] = {}
    for start in range(0, rows, CHUNK):
        carry, constants = given.batch(slice(start, min(start + CHUNK, rows)))
        found = jax.device_get(_read_grams(block, tree, carry, constants))
        for path, (reading,) in iter_readings(found):
            assert reading.gram is not None  # all match
            sums[path] = sums.get(path, 0) + reading.gram.astype(np.float64)
    return sums


@partial(jax.jit, static_argnums=0)
def _read_grams(block: nn.Module, tree: Tree, carry: tuple, constants: list):
    apply, readings = observe(block, tree, entries=1, grams=".*")
    apply(*carry, *constants)
    return readings()


@dataclass
class _Rows:
    """What one block is trained on.

    Attributes:
        student: what the block is given.
        target: what it shall give.
        scale: mean square of what the float block adds, for each part of its carry.
    """

    student: Activations
    target: Activations
    scale: tuple[np.float32, ...]

    @staticmethod
    def of(student: Activations, teacher: Activations, target: Activations) -> _Rows:
        head = slice(4 * CHUNK)  # enough rows for a mean square
        scale = tuple(
            np.float32(max(np.mean(np.square(np.subtract(b[head], a[head]))), 1e-12))
            for a, b in zip(teacher.carry, target.carry, strict=True)
        )
        return _Rows(student, target, scale)

    def batch(self, size: int, seed: int, step: int) -> dict[str, Any]:
        index = shuffled(len(self.student.carry[0]), step, size, seed)
        carry, constants = self.student.batch(index)
        target, _ = self.target.batch(index)
        return {"carry": carry, "constants": constants, "target": target, "scale": self.scale}


def _fit_block(
    block: nn.Module, tree: Tree, rows: _Rows, options: Options, trained: str, folder, **named: Any
) -> tuple[Fit, Tree]:
    parts = split(tree, trained)
    batches = partial(rows.batch, options.batch, options.seed)
    found = fit(_BlockLoss(block), parts, batches, options, folder, **named)
    return found, latent.tensors(parts.join(found.trained, parts.frozen))


class _BlockLoss:  # equal for equal blocks, so that one program serves all of a stack
    """Squared error of the block's output, relative to what the float block adds to its input."""

    def __init__(self, block: nn.Module):
        self._block = block

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BlockLoss) and other._block == self._block

    def __hash__(self) -> int:
        return hash(type(self._block))

    def __call__(self, tree, batch) -> Float[Array, ""]:
        variables = {"params": latent.values(tree)}
        found = self._block.apply(variables, *batch["carry"], *batch["constants"])
        errors = [
            jnp.mean(jnp.square(a.astype(jnp.float32) - b)) / scale
            for a, b, scale in zip(found, batch["target"], batch["scale"], strict=True)
        ]
        return jnp.stack(errors).mean()
