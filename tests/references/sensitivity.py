"""Sensitivity scans that nobody ran: files with harms that a test chooses."""

from __future__ import annotations

import dataclasses
import json
import zlib

import numpy as np

from lowbit_jax.precision.menu import MENU
from lowbit_jax.precision.records import MSE, Header, Record
from lowbit_jax.precision.sensitivity import load_sensitivity
from lowbit_jax.precision.units import find_units

SAMPLES = 2
BITS = {"ternary": 2, "int4": 4, "int6": 6, "int8": 8}


def scan_file(path, model, config, params, harm, *, act_bits=(4, 8), menu=MENU):
    """Write the file of a finished scan and return it, read.

    `harm(measure, unit, bits) -> float`: what is lost by a measure where a unit has so many bits.
    """
    units = {unit.name: unit for unit in find_units(params)}
    metrics = list(dict.fromkeys(unit.metric for unit in units.values()))
    header = Header(
        model=model,
        config=json.loads(json.dumps(dataclasses.asdict(config))),
        units=tuple(units.values()),
        menu=menu,
        act_bits=act_bits,
        ranges=(0.0, 1.0),
        samples=SAMPLES,
        settings={"scorer": "a test's"},
        reference={metric: [1.0] * SAMPLES for metric in metrics},
    )
    lines = [header.to_json()]
    for candidate in header.candidates():
        unit = units[candidate.unit]
        bits = candidate.act_bits or BITS[candidate.level.split()[0]]
        lost = {measure: harm(measure, unit, bits) for measure in (MSE, *metrics)}
        error = [lost.pop(MSE)] * SAMPLES
        scores = {metric: [1.0 - value] * SAMPLES for metric, value in lost.items()}
        lines.append(Record(candidate=candidate, mse=error, scores=scores).to_json())
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_sensitivity(path)


def random_harm(measure, unit, bits):
    """Falls with the bits; of another size for every unit and measure."""
    rng = np.random.default_rng(zlib.crc32(f"{measure} {unit.name}".encode()))
    return float(np.exp(2 * rng.normal())) * 4.0**-bits
