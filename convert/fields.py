"""The sizes of a model: fields of a `config.json`, checked, and what the tensors' shapes tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote

Config = TypeVar("Config")


def integer(config: Mapping[str, Any], field: str) -> int:
    """A size from 1. KeyError names a missing field, ValueError says what is there instead."""
    value = config[field]
    if type(value) is not int or not 1 <= value < 10**5:
        raise ValueError(f"{field} is {quote(value)}, not an integer from 1")
    return value


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], network: str) -> None:
    """Compare settings that a port has one value of; a config may leave each out.

    Raises:
        ValueError: another value.
    """
    for field, value in fixed.items():
        if config.get(field, value) != value:
            raise ValueError(f"{field} is {quote(config[field])}; {network} has {quote(value)}")


def learns_sigma(channels: int, out: int | None) -> bool:
    """Whether `out` output channels (None: as many as inputs) are noise and variance.

    Raises:
        ValueError: neither that nor noise alone.
    """
    if out not in (None, channels, 2 * channels):
        raise ValueError(
            f"out_channels is {quote(out)}; the network predicts noise ({channels}) "
            f"or noise and variance ({2 * channels})"
        )
    return out == 2 * channels


def shape(checkpoint: Checkpoint, name: str, axes: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from.

    Raises:
        CheckpointError: no such tensor. ValueError: another number of axes, or an empty one.
    """
    found = tuple(checkpoint.info(name).shape)
    if len(found) != axes or 0 in found:
        raise ValueError(f"tensor '{name}' has shape {found}, not {axes} axes of sizes from 1")
    return found


def square(checkpoint: Checkpoint, table: str, hint: str = "") -> int:
    """Side of the square grid that a position table (1, t, k) is of.

    Raises:
        CheckpointError: no such tensor. ValueError: no square; ends with `hint`.
    """
    positions = shape(checkpoint, table, 3)[1]
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"tensor '{table}' has {positions} positions, which is no square{hint}")
    return side


def depth(checkpoint: Checkpoint, stack: str = "blocks") -> int:
    """1 + the highest number in names like "blocks.27.x"; gaps are then reported as missing."""
    pattern = re.compile(re.escape(stack) + r"\.(\d{1,4})\.")
    found = [int(match[1]) for name in checkpoint.names if (match := pattern.match(name))]
    return max(found, default=-1) + 1


def heads(
    config: Mapping[str, Any] | None,
    width: int,
    published: Mapping[int, int],
    field: str = "num_attention_heads",
) -> int:
    """Attention heads: as a config's `field` says, or the published ones of this width.

    Raises:
        ValueError: neither tells.
    """
    if config is not None and field in config:
        return integer(config, field)
    if width not in published:
        known = ", ".join(map(str, sorted(published)))
        raise ValueError(
            f"the heads of a width of {width} are in no tensor (published are {known}); put a "
            f'config.json beside the file: {{"{field}": N}}'
        )
    return published[width]


def read(checkpoint: Checkpoint, network: str, make: Callable[[], Config]) -> Config:
    """What `make` returns; a field or tensor it misses or refuses is an error of the checkpoint.

    Raises:
        CheckpointError: `make` raised.
    """
    try:
        return make()
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, IndexError) as error:
        reason = f"config.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(checkpoint.source, f"not a {network} config: {reason}") from error
