"""A network's sizes, from a `config.json` or from shapes; errors name the field or the tensor."""

from __future__ import annotations

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


def shape(checkpoint: Checkpoint, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor. CheckpointError where it is missing, ValueError for other axes."""
    found = tuple(checkpoint.info(name).shape)
    if len(found) != axes or 0 in found:
        raise ValueError(f"tensor '{name}' has shape {found}, not {axes} axes of sizes from 1")
    return found


def layers(checkpoint: Checkpoint, stack: str) -> int:
    """How many layers of `stack` have a tensor. (One that has none makes others unknown.)"""
    numbers = (re.match(rf"{stack}\.(\d+)\.", name) for name in checkpoint.names)
    return len({number[1] for number in numbers if number})


def heads(checkpoint: Checkpoint, field: str, width: int, published: Mapping[int, int]) -> int:
    """Attention heads, which are in no tensor: of the `config.json`, or the published by width.

    Raises:
        ValueError: neither says.
    """
    stated = checkpoint.config or {}
    if field in stated:
        return integer(stated, field)
    if width not in published:
        raise ValueError(
            f"the heads of a width of {width} are in no tensor (published: {dict(published)}); "
            f"add a config.json with {field}"
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
