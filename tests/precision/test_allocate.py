"""From a scan and a budget to a recipe: both levels, bytes, segments, refusals."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.calibration.ranges import WHOLE_FLOW
from lowbit_jax.calibration.statistics import LayerStatistics, Statistics
from lowbit_jax.checkpoint_parts import iter_parts
from lowbit_jax.models import flux
from lowbit_jax.precision.allocate import allocate, uniform
from lowbit_jax.precision.menu import FLOAT, MENU, check_menu, level_name, unit_bytes
from lowbit_jax.precision.problem import Request, monotone, pose, stacks_of
from lowbit_jax.precision.programme import AllocationError
from lowbit_jax.precision.records import MSE, ScanError
from lowbit_jax.precision.sensitivity import restricted
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES, Recipe, RecipeError, WeightSpec
from lowbit_jax.quant.report import size_report
from lowbit_jax.quant.stacks import iter_layers
from lowbit_jax.quant.transform import quantize
from pallas_kernels.formats import FORMATS
from tests.references import flux_files
from tests.references.sensitivity import random_harm, scan_file

CONFIG = dataclasses.replace(flux_files.TINY, depth=2, depth_single_blocks=4)
PARAMS = flux.abstract_params(CONFIG)
FLOATS = size_report(iter_parts(PARAMS))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A scan of a small FLUX with random harms."""
    path = tmp_path_factory.mktemp("scan") / "scan.jsonl"
    return scan_file(path, "flux", CONFIG, PARAMS, random_harm)


def spent(allocation, metric):
    units = allocation.header.units
    return sum(
        b for b, unit in zip(allocation.unit_bytes, units, strict=True) if unit.metric == metric
    )


@pytest.mark.parametrize("scheme", ["metric", "mse"])
@pytest.mark.parametrize("bits", [9.5, 10.5, 12.0])
def test_the_recipe_stores_what_is_reported_and_no_more_than_allowed(found, scheme, bits):
    made = allocate(found, Request(mean_bits=bits, scheme=scheme))
    assert made.sizes.bits_per_weight <= bits
    rest = FLOATS.after - int(unit_bytes(PARAMS, made.header.units, MENU)[:, -1].sum())
    assert made.sizes.after == rest + sum(made.unit_bytes)
    assert Recipe.from_json(json.loads(json.dumps(made.recipe.to_json()))) == made.recipe
    plan = jax.eval_shape(lambda: quantize(zeros(), made.recipe))
    levels = dict(zip((u.name for u in made.header.units), made.levels, strict=True))
    acts = dict(zip((u.name for u in made.header.units), made.act_bits, strict=True))
    names = {path: unit.name for unit in made.header.units for path in unit.layers}
    for path, kernel, _ in iter_layers(plan):
        level = levels.get(names.get(path), FLOAT)
        assert isinstance(kernel, QTensor) == (level != FLOAT), path
        if level != FLOAT:
            assert (
                level.startswith(f"{kernel.format} ") and kernel.act_bits == acts[names[path]] == 8
            )
    assert len(stacks_of(plan)) == made.segments <= 8


def zeros():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), PARAMS)


def test_all_bytes_of_a_level_are_counted(found):
    """int4 of k = 64: 64 bytes a row, as a block of 128 is padded, and a float32 scale."""
    rows = unit_bytes(PARAMS, found.header.units, MENU)
    names = [unit.name for unit in found.header.units]
    row = rows[names.index("double_blocks/0/img_mod")]  # one linear, 64 -> 384
    ternary, int4, int6, int8, floating = row.tolist()
    assert (ternary, int4, int6) == (384 * 36, 384 * 68, 384 * 100)
    assert (int8, floating) == (384 * 68, 384 * 64 * 2)


def test_groups_spend_in_both_levels_what_mse_gives_them(found):
    by_mse, by_metric = (
        allocate(found, Request(mean_bits=10.5, scheme=scheme, segments=None))
        for scheme in ("mse", "metric")
    )
    assert by_mse.levels != by_metric.levels
    for metric in ("text", "quality"):
        assert spent(by_metric, metric) <= spent(by_mse, metric)
        inside = [i for i, unit in enumerate(found.header.units) if unit.metric == metric]
        harm = [part.harm[metric][inside].sum() for part in (by_metric, by_mse)]
        assert harm[0] <= harm[1]
    assert by_mse.harm[MSE].sum() <= by_metric.harm[MSE].sum()


def test_inside_a_group_nothing_is_better_by_its_metric(found):
    """All 5^6 allocations of the text group, which without bound on cuts is by itself."""
    made = allocate(found, Request(mean_bits=10.5, segments=None))
    limit = spent(allocate(found, Request(mean_bits=10.5, scheme="mse", segments=None)), "text")
    inside = [i for i, unit in enumerate(found.header.units) if unit.metric == "text"]
    costs = unit_bytes(PARAMS, found.header.units, MENU)
    harms = monotone(found.weights["text"], costs)[inside]
    costs = costs[inside]
    choices = np.array(list(itertools.product(range(costs.shape[1]), repeat=len(inside))))
    rows = np.arange(len(inside))
    feasible = costs[rows, choices].sum(axis=1) <= limit
    least = harms[rows, choices].sum(axis=1)[feasible].min()
    assert made.harm["text"][inside].sum() == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("segments", [2, 3, 5])
def test_cuts_are_bounded(found, segments):
    made = allocate(found, Request(mean_bits=10.5, segments=segments))
    free = allocate(found, Request(mean_bits=10.5, segments=None))
    assert made.segments <= segments < free.segments


def test_activations_can_be_chosen_too(found):
    made = allocate(found, Request(mean_bits=12.0, mean_act_bits=5.0, scheme="mse"))
    weights = np.array([unit.weights for unit in found.header.units])
    acts = np.array([bits or 16 for bits in made.act_bits])
    assert (acts * weights).sum() <= 5.0 * weights.sum()
    assert {4, 8} <= set(made.act_bits)
    pairs = list(zip(made.levels, made.act_bits, strict=True))
    assert [bits for level, bits in pairs if level == FLOAT and bits is not None] == []


def test_floating_units_are_named_in_the_recipe(found):
    made = allocate(found, Request(mean_bits=15.0))
    kept = [u for u, level in zip(found.header.units, made.levels, strict=True) if level == FLOAT]
    assert kept
    for unit in kept:
        rule = made.recipe.rule_for(unit.layers[0])
        assert rule is not None and rule.weights is None and rule.act_bits is None


def test_the_metric_of_a_group_decides_inside_it(tmp_path):
    """MSE minds the text MLP, the text metric the text attention: each scheme spares its own."""

    def harm(measure, unit, bits):
        minded = {MSE: "txt_mlp", "text": "txt_attn"}.get(measure)
        return (100.0 if unit.kind == minded else 1.0) * 4.0**-bits

    scan = scan_file(tmp_path / "scan.jsonl", "flux", CONFIG, PARAMS, harm)
    mean = {}
    for scheme in ("metric", "mse"):
        made = allocate(scan, Request(mean_bits=9.8, scheme=scheme, segments=None))
        for kind in ("txt_mlp", "txt_attn"):
            rows = [i for i, unit in enumerate(scan.header.units) if unit.kind == kind]
            weights = sum(scan.header.units[i].weights for i in rows)
            mean[scheme, kind] = 8 * sum(made.unit_bytes[i] for i in rows) / weights
    assert mean["metric", "txt_attn"] > mean["mse", "txt_attn"]
    assert mean["metric", "txt_mlp"] < mean["mse", "txt_mlp"]


def test_a_metric_that_sees_nothing_leaves_its_group_to_mse(tmp_path):
    def harm(measure, unit, bits):
        return 0.0 if measure == "text" else random_harm(measure, unit, bits)

    scan = scan_file(tmp_path / "scan.jsonl", "flux", CONFIG, PARAMS, harm)
    by_mse, by_metric = (
        allocate(scan, Request(mean_bits=10.5, scheme=scheme, segments=None))
        for scheme in ("mse", "metric")
    )
    for unit, a, b in zip(scan.header.units, by_mse.levels, by_metric.levels, strict=True):
        assert unit.metric != "text" or a == b


def test_noise_is_not_bought():
    """A dear level that measured worse than a cheap one, and one that was better than float."""
    costs = np.array([[10, 20, 30, 40]])
    harms = np.array([[3.0, 0.5, 0.7, 0.0], [2.0, -0.4, 0.1, 0.0]])
    found = monotone(harms, np.repeat(costs, 2, axis=0))
    assert found.tolist() == [[3.0, 0.7, 0.7, 0.0], [2.0, 0.1, 0.1, 0.0]]


def test_too_small_a_budget_is_refused_with_the_smallest(found):
    with pytest.raises(AllocationError, match=r"cannot be reached: the smallest is ([\d,]+) bytes"):
        allocate(found, Request(mean_bits=4.0))
    try:
        allocate(found, Request(bytes=1000))
    except AllocationError as error:
        least = int(str(error).split("smallest is ")[1].split(" ")[0].replace(",", ""))
    assert allocate(found, Request(bytes=least)).sizes.after == least
    with pytest.raises(AllocationError, match=f"{least - 1:,} bytes"):
        allocate(found, Request(bytes=least - 1))


def test_wrong_requests_are_refused(found, tmp_path):
    with pytest.raises(AllocationError, match="give one of them"):
        Request()
    with pytest.raises(AllocationError, match="scheme 'best' is none of"):
        Request(mean_bits=4.0, scheme="best")
    with pytest.raises(AllocationError, match="1 segments cannot be reached: .* has 2"):
        allocate(found, Request(mean_bits=12.0, segments=1))
    with pytest.raises(AllocationError, match="3 mean activation bits cannot be reached: 4 are"):
        allocate(found, Request(mean_bits=12.0, mean_act_bits=3.0))
    scan = scan_file(tmp_path / "s.jsonl", "flux", CONFIG, PARAMS, random_harm, act_bits=())
    with pytest.raises(AllocationError, match="tried no activation bits"):
        allocate(scan, Request(mean_bits=12.0, mean_act_bits=6.0))
    spec = WeightSpec(format="int8", quantizer="absmax")
    with pytest.raises(ValueError, match="'int8 absmax channel' is in the menu 2 times"):
        check_menu([spec, spec], [])
    with pytest.raises(ValueError, match=r"activation bits \[9\] outside 2..8"):
        check_menu([spec], [9])


def test_levels_have_names_of_their_own():
    specs = [
        WeightSpec(format=format, quantizer="mse" if format != "ternary" else "twn", granularity=g)
        for format in FORMATS
        for g in ("channel", "tensor", 128)
    ]
    assert len({level_name(spec) for spec in specs}) == len(specs)


def test_a_problem_has_a_place_for_every_pair_of_neighbours(found):
    problem = pose(found, Request(mean_bits=12.0, mean_act_bits=6.0))
    assert len(problem.places) == (2 - 1) + (4 - 1)
    assert [len(pairs) for pairs in problem.places] == [2 * 6, *[2 * 3] * 3]


LIKE = RECIPES["viditq-w4a8"]


def test_a_recipe_lends_its_transforms_and_their_bytes_are_counted(found):
    """Every level is balanced, rotated and rounded with feedback, as `quantize` then stores it."""
    made = allocate(found, Request(mean_bits=10.5, like=LIKE))
    assert made.sizes.bits_per_weight <= 10.5 and made.recipe.seed == LIKE.seed
    assert Recipe.from_json(json.loads(json.dumps(made.recipe.to_json()))) == made.recipe
    kernels = {path: kernel for path, kernel, _ in iter_layers(PARAMS)}
    channels = lambda path: kernels[path].shape[-2]  # noqa: E731
    layers = {
        path: LayerStatistics(
            absmax=np.ones((1, 1, channels(path)), np.float32),
            total=np.zeros((1, 1, channels(path))),
            squares=np.ones((1, 1, channels(path))),
            count=np.full((1, 1), 4),
            gram=np.eye(channels(path)),
        )
        for path in kernels
    }
    statistics = Statistics(
        layers=layers,
        ranges=WHOLE_FLOW,
        halves=("all",),
        model="flux",
        config=json.dumps(found.header.config),
        samples=1,
        digest="",
    )
    plan = jax.eval_shape(lambda: quantize(zeros(), made.recipe, statistics))
    assert size_report(iter_parts(plan)).after == made.sizes.after
    assert len(stacks_of(plan)) == made.segments <= 8
    levels = {
        path: at
        for unit, at in zip(made.header.units, made.levels, strict=True)
        for path in unit.layers
    }
    for path, kernel, _ in iter_layers(plan):
        level = levels.get(path, FLOAT)
        assert isinstance(kernel, QTensor) == (level != FLOAT)
        if level == FLOAT:
            continue
        time = path.endswith("/lin")  # modulations: neither, and floating inputs
        rule = made.recipe.rule_for(path)
        assert rule.needs_grams == rule.chooses_alpha == (not time)
        assert (kernel.mask is None, kernel.rotation is None) == (time, time)
        assert kernel.act_bits == (None if time else 8)


def test_masks_take_their_bytes(found):
    """A float32 for every input channel, at every level but floating point."""
    units = found.header.units
    plain, masked = (unit_bytes(PARAMS, units, MENU, like) for like in (None, LIKE))
    widths = {path: kernel.shape[-2] for path, kernel, _ in iter_layers(PARAMS)}
    for unit, before, after in zip(units, plain, masked, strict=True):
        masks = 4 * sum(widths[layer] for layer in unit.layers if not layer.endswith("/lin"))
        assert (after - before).tolist() == [masks] * len(MENU) + [0]


def test_what_cannot_be_lent_is_refused(found):
    with pytest.raises(AllocationError, match="mean_act_bits 6 with like 'viditq-w4a8'"):
        Request(mean_bits=10, mean_act_bits=6, like=LIKE)
    ranged = RECIPES["viditq-v1-w4a8"]
    with pytest.raises(RecipeError, match="for each of 2 timestep ranges"):
        allocate(found, Request(mean_bits=10, like=ranged))
    split = LIKE.keeping(".*/img_attn/proj")
    with pytest.raises(RecipeError, match="img_attn/qkv otherwise than .*/img_attn/proj"):
        allocate(found, Request(mean_bits=10, like=split))


def test_one_level_for_all(found):
    made = uniform(found, level_name(MENU[1]), act_bits=None)
    assert set(made.levels) == {level_name(MENU[1])} and set(made.act_bits) == {None}
    assert len(made.recipe.rules) == 2  # of two stacks
    with pytest.raises(ValueError, match="'int5' is none of the scan's: ternary"):
        uniform(found, "int5")


def test_some_formats_alone(found):
    """Ternary ones are left out: no cheaper budget, and harms of the others stay theirs."""
    some = restricted(found, ("int8", "int4"))
    assert [spec.format for spec in some.header.menu] == ["int4", "int8"]
    for measure, harms in some.weights.items():
        np.testing.assert_array_equal(harms, found.weights[measure][:, [1, 3, 4]])
    made = allocate(some, Request(mean_bits=12.0))
    assert {level.split()[0] for level in made.levels} <= {"int4", "int8", FLOAT}
    for formats, said in ((("int5",), "int5"), ((), "nothing")):
        with pytest.raises(ScanError, match=f"tried ternary, int4, int6, int8, not {said}"):
            restricted(found, formats)
