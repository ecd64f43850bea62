"""Bytes of a program from XLA's HLO, against counts by hand."""

from pathlib import Path

import pytest

from pallas_kernels.audit.traffic import shape_bytes, traffic

FIXTURES = Path(__file__).parent / "fixtures"
K, N, GROUPS = 3072, 9216, 24


def test_a_grouped_product_of_one_row():
    found = traffic((FIXTURES / "grouped.hlo").read_text(encoding="utf-8"))
    weights, scales, zeros = N * K // 2, 4 * N * GROUPS, N * GROUPS
    arguments = K + weights + scales + zeros + 4 + 2 * N
    assert found.minimum == arguments + 2 * N
    around = (K + 4 * GROUPS) + (2 * N + 4 * N) + 2 * scales + (zeros + 4 * N * GROUPS)
    kernel = K + weights + scales + 4 * GROUPS + 4 * N * GROUPS + 4 + 4 * N + 2 * N
    assert found.moved == around + kernel
    assert found.weights == weights
    assert found.moved_with(1.5) == found.moved + weights // 2


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("s8[4608,3072]{1,0}", 4608 * 3072),
        ("bf16[7]{0}", 14),
        ("f32[]", 4),
        ("pred[8]{0}", 8),
        ("u4[10]{0}", 5),
        ("(s8[2,3]{1,0}, f32[2,1]{1,0})", 6 + 8),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert shape_bytes(shape) == size


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        traffic("HloModule nothing")
