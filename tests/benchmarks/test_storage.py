"""The exact bytes of FLUX.1, against integers computed by hand from its layer shapes."""

import re

from benchmarks import storage

# (n, k) and how often, inside the blocks of FLUX.1-dev; width 3072
DOUBLE = [(18432, 3072), (9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]
SINGLE = [(9216, 3072), (21504, 3072), (3072, 15360)]
LINEARS = [(n, k, 2 * 19) for n, k in DOUBLE] + [(n, k, 38) for n, k in SINGLE]
PARAMETERS = 11_901_408_320
QUANTISED = 11_834_228_736  # all weights of LINEARS
CHANNELS = 3_035_136  # all their outputs, each with a float32 scale
FLOAT = 2 * (PARAMETERS - QUANTISED)  # biases, norms and everything outside the blocks, bfloat16


def test_constants_follow_from_the_shapes():
    assert sum(n * k * count for n, k, count in LINEARS) == QUANTISED
    assert sum(n * count for n, _, count in LINEARS) == CHANNELS


def test_flux_dev_ternary_bytes():
    report = storage.measure(storage.FLUX_DEV, storage.RECIPES["flux-1.58bit"], archive=True)
    assert report.parameters == PARAMETERS
    assert report.before == 2 * PARAMETERS == 23_802_816_640
    assert report.after == QUANTISED // 4 + 4 * CHANNELS + FLOAT == 3_105_056_896
    trits = sum(n * -(-k // 5) * count for n, k, count in LINEARS)
    assert report.disk == trits + 4 * CHANNELS + FLOAT


def test_figure_line(capsys):
    storage.main([])
    *tables, last = capsys.readouterr().out.splitlines()
    found = re.fullmatch(
        r"figure: flux_dev_ternary_ratio=(\d\.\d+) flux_dev_archive_ratio=(\d\.\d+)", last
    )
    ternary, archive = map(float, found.groups())
    assert ternary == round(23_802_816_640 / 3_105_056_896, 4) >= 7.65
    assert archive >= 9.3
    text = "\n".join(tables)
    assert all(name in text for name in (*storage.MODELS, *storage.NAMED))
