"""What a finished scan says: how much every unit minds every level, by every measure.

Shape letters: u units, v levels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lowbit_jax.precision.menu import level_name
from lowbit_jax.precision.records import MSE, Candidate, Header, ScanError, read


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What a whole scan says.

    Attributes:
        header: what was scanned.
        weights: mean harm of quantising only a unit's weights, by measure ("mse" or a metric of the
            scorer): the last level, floating point, is 0.
        acts: the same of its activations, in the order of `header.act_bits`, floating point last.
    """

    header: Header
    weights: dict[str, Float64[np.ndarray, "u v"]]
    acts: dict[str, Float64[np.ndarray, "u v"]]


def restricted(sensitivity: Sensitivity, formats: Sequence[str]) -> Sensitivity:
    """The same scan with some of its weight levels alone: what an allocation may choose from.

    Args:
        sensitivity: of a finished scan.
        formats: of the weights, such as ("int4", "int8").

    Raises:
        ScanError: a format that the scan did not try.
    """
    menu = sensitivity.header.menu
    known = [spec.format for spec in menu]
    wrong = [name for name in formats if name not in known]
    if wrong or not formats:
        raise ScanError(f"the scan tried {', '.join(known)}, not {', '.join(wrong) or 'nothing'}")
    kept = [v for v, name in enumerate(known) if name in formats]
    columns = [*kept, len(menu)]  # floating point last
    return Sensitivity(
        header=dataclasses.replace(sensitivity.header, menu=tuple(menu[v] for v in kept)),
        weights={name: harms[:, columns] for name, harms in sensitivity.weights.items()},
        acts=sensitivity.acts,
    )


def load_sensitivity(path: str | os.PathLike[str]) -> Sensitivity:
    """Read the file of a finished scan.

    The harm to a metric is the mean over samples of what the floating model scores more. Timestep
    ranges add up: a unit that is quantised is so in all of them.

    Raises:
        ScanError: damaged, or not finished: how many candidates are missing.
    """
    header, records = read(path)
    candidates = header.candidates()
    missing = [candidate for candidate in candidates if candidate not in records]
    if missing:
        raise ScanError(
            f"{path}: {len(missing)} of {len(candidates)} candidates are missing, such as "
            f"{missing[0]}: resume the scan"
        )
    reference = {name: np.array(values) for name, values in header.reference.items()}

    def harm(measure: str, unit: str, level: str | None, bits: int | None) -> float:
        total = 0.0
        for r in range(len(header.ranges) - 1):
            found = records[Candidate(unit=unit, level=level, act_bits=bits, range=r)]
            each = found.mse if measure == MSE else reference[measure] - found.scores[measure]
            total += float(np.mean(each))
        return total

    def table(measure: str, levels: list[tuple[str | None, int | None]]) -> np.ndarray:
        rows = [[*(harm(measure, u.name, *level) for level in levels), 0.0] for u in header.units]
        return np.array(rows)

    measures = (MSE, *reference)
    names = [(level_name(spec), None) for spec in header.menu]
    bits = [(None, bits) for bits in header.act_bits]
    return Sensitivity(
        header=header,
        weights={measure: table(measure, list(names)) for measure in measures},
        acts={measure: table(measure, list(bits)) for measure in measures},
    )
