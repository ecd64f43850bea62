"""The report of the ladder, from made-up outcomes: the line that machines read, and the file."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("dm_pix", reason="the evidence needs the extra eval")

from benchmarks.evidence import Outcome, Subject
from benchmarks.ternary import Options, Rung, report
from benchmarks.ternary_judge import Losses, with_activations
from benchmarks.ternary_neighbours import NEIGHBOURS, least_error
from lowbit_jax.evaluation import nouns
from lowbit_jax.quant import RECIPES, quantize
from lowbit_jax.quant.qtensor import QTensor

CAPTIONS = 4


def outcome(right, bits):
    """Each kind right for the first `right` captions."""
    kinds = {kind: (np.arange(CAPTIONS) < right).astype(float) for kind in nouns.KINDS}
    values = {
        **kinds,
        "score": np.mean(list(kinds.values()), axis=0),
        "psnr": np.full(CAPTIONS, 20.0),
        "ssim": np.full(CAPTIONS, 0.5),
        "lpips": np.full(CAPTIONS, 0.1),
    }
    shown = np.zeros((2, 32, 32, 3), np.uint8)
    pooled = np.random.default_rng(0).standard_normal((CAPTIONS, 8))
    return Outcome(values=values, pooled=pooled, shown=shown, bits=bits, bytes=10, seconds=1.0)


def test_the_last_line_and_the_file(tmp_path, capsys):
    losses = Losses(velocity=[1.0] * 16, weights={"a": 7.0}, products={"a": 9.0})
    rungs = {
        name: Rung(outcome=outcome(right, 4.0), losses=losses, minutes=2.0)
        for name, right in (("absmean", 1), ("codes", 3))
    }
    floats, eight = outcome(4, 16.0), outcome(2, 4.0)
    options = Options(out=tmp_path, captions=CAPTIONS)
    subject = Subject(
        name="four parts",
        params=None,
        sample=lambda params: np.zeros((CAPTIONS, 2, 2, 3)),
        judge=lambda pictures: {},
        accuracies=nouns.KINDS,
        calibrate=dict,
        settings={},
        categories=lambda found: {"head and body": (found["head"] & found["body"]).mean()},
    )
    found = report(options, subject, floats, rungs, "codes", eight, {}, Console(width=200))
    printed = capsys.readouterr().out
    assert re.search("rung +head and body +score above", printed)
    for row in ("float +1.000 +-", "absmean +0.250 +-0.75", "codes +0.750 +[+]?0.50"):
        assert re.search(row, printed), row
    last = printed.splitlines()[-1]
    assert re.fullmatch(
        "figure: float_score=1.0000 absmean_score=0.2500 best_ternary_score=0.7500 "
        "a8_score=0.5000 storage_ratio=4.000",
        last,
    )
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "grid.png").stat().st_size > 0


@pytest.mark.parametrize("grid", NEIGHBOURS.values())
def test_neighbours_start_from_the_best_scale_of_many(grid):
    """NumPy float64, row by row; rows of zeros and of one sign among them; on the grid."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 50))
    w[1], w[2] = 0, np.abs(w[2])
    codes, scale, _ = least_error(jnp.asarray(w, jnp.float32), grid.low, grid.high)
    assert codes.min() >= grid.low and codes.max() <= grid.high
    found = np.square(w - np.asarray(scale * codes, np.float64)).sum(1)
    most = max(-grid.low, grid.high)
    for row, error in zip(w, found, strict=True):
        sizes = [
            s * (i + 1) / 40 * (np.abs(row).max() or 1) / most for i in range(40) for s in (1, -1)
        ]
        errors = [
            np.square(row - s * np.clip(np.round(row / s), grid.low, grid.high)).sum()
            for s in sizes
        ]
        assert error <= min(errors) * (1 + 1e-5) + 1e-9


def test_int8_activations_are_the_only_change():
    params = {"double_blocks": {"0": {"lin": {"kernel": jnp.ones((1, 4, 3))}}}}
    before = quantize(params, RECIPES["flux-1.58bit"])
    after = with_activations(before, 8)
    kernel = after["double_blocks"]["0"]["lin"]["kernel"]
    assert isinstance(kernel, QTensor) and kernel.act_bits == 8
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(before), jax.tree.leaves(after))
