"""Reading diffusers' `scheduler_config.json`: what is understood, and a refusal of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

Schedule = TypeVar("Schedule")

# type of a field's default -> what JSON may give for it; exactly, as True is no number
JSON_TYPES = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}


def read_settings(
    schedule: type[Schedule],
    config: Mapping[str, Any],
    *,
    scheduler: str,
    fixed: Mapping[str, Any],
    idle: Collection[str] = (),
) -> Schedule:
    """Build a schedule from a parsed `scheduler_config.json`.

    Args:
        schedule: a dataclass whose fields are settings of diffusers.
        config: the parsed file; keys with a leading underscore are diffusers' own bookkeeping.
        scheduler: diffusers' class; a `config` that names another is refused.
        fixed: settings of which one value is ported, with that value.
        idle: settings without effect while those of `fixed` have their values.

    Raises:
        ValueError: another scheduler, an unknown setting, one that is not ported or one of another
            type; names all.
    """
    found = config.get("_class_name", scheduler)
    if found != scheduler:
        raise ValueError(f"scheduler {found!r} is not {scheduler}")
    known = {field.name: type(field.default) for field in fields(schedule)}  # type: ignore[arg-type]
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    problems = [
        f"{name} is {given[name]!r}, only {value!r} is ported"
        for name, value in fixed.items()
        if given.get(name, value) != value
    ]
    problems += [
        f"{name} is {given[name]!r}, not {kind.__name__}"
        for name, kind in known.items()
        if name in given and type(given[name]) not in JSON_TYPES.get(kind, (type(given[name]),))
    ]
    unknown = sorted(set(given) - set(known) - set(fixed) - set(idle))
    problems += [f"unknown setting {name!r}" for name in unknown]
    if problems:
        raise ValueError(f"{scheduler}: {'; '.join(problems)}")
    return schedule(**{name: value for name, value in given.items() if name in known})


def require(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Check a setting that has a few values.

    Raises:
        ValueError: another value; names all that are allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, none of: {', '.join(map(repr, allowed))}")
