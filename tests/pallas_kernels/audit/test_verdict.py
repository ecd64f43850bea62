"""Every verdict fails on what it is for, and on nothing else."""

import dataclasses
import json

import pytest

from pallas_kernels.audit.cases import Case
from pallas_kernels.audit.report import COLUMNS, cells, write_json
from pallas_kernels.audit.verdict import failures, figure
from tests.references.findings import GOOD

ONE_ROW = Case("int4_a8", 1, 3072, 3072)


def changed(**changes):
    return dataclasses.replace(GOOD, **changes)


def test_a_good_kernel_has_no_failures():
    assert failures(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"spill_bytes": 4}, "spilled"),
        ({"byte_loads": 1}, "byte-wide"),
        ({"products": {"HMMA.16816.F32.BF16": 64}}, "no IMMA"),
        ({"products": {}}, "no IMMA"),
        ({"bound": 0.9499}, "under 0.95"),
        ({"warps_per_sm": 7}, "7 warps"),
        ({"family": "int4", "bound": 0.9}, "under 0.95"),
        ({"family": "ternary_a8", "bound": 0.9}, "under 0.95"),
        ({"case": ONE_ROW, "moved": 1101.0}, "1.10 times"),
    ],
)
def test_what_fails(changes, word):
    (failure,) = failures(changed(**changes))
    assert word in failure


@pytest.mark.parametrize(
    "changes",
    [
        {"bound": 0.95},
        {"case": Case("int8_a8", 1023, 3072, 3072), "bound": 0.5},  # the floor is for many rows
        {"case": ONE_ROW, "moved": 1100.0, "bound": 0.2, "products": {}},
        {"moved": 5000.0},  # many rows are not bound by bytes
        {"warps_per_sm": 8},
        {"target": "h100", "bound": 0.1, "warps_per_sm": 4, "byte_loads": 9},
        {"family": "int4_group64", "bound": 0.6},
        {"case": Case("ternary_a16", 4608, 3072, 3072), "family": "ternary_a16", "bound": 0.85}
        | {"products": {"HMMA.16816.F32.BF16": 64}},
        {
            "case": Case("quantize_rows", 4608, 3072, 0),
            "family": "rows",
            "products": {},
            "bound": 0,
        },
    ],
)
def test_what_passes(changes):
    assert failures(changed(**changes)) == []


def test_bfloat16_activations_want_bfloat16_products():
    case = Case("ternary_a16", 4608, 3072, 3072)
    (failure,) = failures(changed(case=case, family="ternary_a16"))
    assert "no HMMA" in failure
    (failure,) = failures(
        changed(case=case, family="ternary_a16", bound=0.84, products={"HMMA.16816.F32.BF16": 1})
    )
    assert "under 0.85" in failure


def test_spills_fail_on_every_gpu():
    assert failures(changed(target="l20", spill_bytes=8)) == ["8 B of registers spilled"]


def test_the_figure_is_of_the_worst():
    rows = changed(case=Case("quantize_rows", 4608, 3072, 0), family="rows", bound=0.0)
    found = [
        GOOD,
        changed(bound=0.97),
        changed(target="h100", bound=0.1, spill_bytes=4),
        changed(family="int4", bound=0.96),
        changed(case=Case("int8_a8", 256, 1152, 1152), bound=0.3),
        rows,
    ]
    assert figure(found) == ("figure: int8_bound_min=0.970 int4_bound_min=0.960 spills=1 kernels=6")


def test_a_row_of_the_table_has_every_column():
    assert len(cells(GOOD)) == len(COLUMNS)
    assert len(cells(changed(case=Case("quantize_rows", 8, 64, 0), tile=None))) == len(COLUMNS)


def test_json_says_what_failed(tmp_path):
    write_json(tmp_path / "new" / "audit.json", [GOOD, changed(spill_bytes=8)])
    good, bad = json.loads((tmp_path / "new" / "audit.json").read_text(encoding="utf-8"))
    assert good["failures"] == [] and good["case"]["k"] == 3072 and good["tile"]["n"] == 128
    assert bad["failures"] == ["8 B of registers spilled"]
