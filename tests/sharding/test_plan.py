"""Plans from shapes alone: what goes where, what is refused, what each device will hold."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from rich.console import Console

from lowbit_jax.models.flux import FLUX_DEV
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant import RECIPES, quantize
from lowbit_jax.quant.lora import LoraKernel
from lowbit_jax.quant.qtensor import QTensor, tree_bytes
from lowbit_jax.sharding.kernel import lies
from lowbit_jax.sharding.parts import cut, device_order, join
from lowbit_jax.sharding.place import shard
from lowbit_jax.sharding.plan import Plan, PlanError, Rule, decide
from lowbit_jax.sharding.plans import PLANS, named_plan
from lowbit_jax.sharding.report import device_bytes, holdings, holdings_table
from pallas_kernels.formats import pack_codes, unpack_codes


def devices(count, axis="model"):
    return AbstractMesh((count,), (axis,))


@functools.cache
def shapes(network="flux", recipe="float"):
    config = NETWORKS[network].config()
    params = NETWORKS[network].abstract_params(config, jnp.bfloat16)
    return jax.eval_shape(lambda params: quantize(params, RECIPES[recipe]), params)


def one(k, n, recipe=None):
    kernel = jax.ShapeDtypeStruct((k, n), jnp.float32)
    params = {"blocks": {"0": {"a": {"kernel": jax.ShapeDtypeStruct((1, k, n), jnp.float32)}}}}
    if recipe is None:
        return {"a": {"kernel": kernel}}
    return jax.eval_shape(lambda p: quantize(p, RECIPES[recipe]), params)


def test_the_order_of_devices_by_hand():
    """[q0 q1 q2 q3 | m0 .. m7] on two devices: q0 q1 m0 .. m3, then q2 q3 m4 .. m7."""
    order = device_order((4, 8), 2)
    assert order.tolist() == [0, 1, 4, 5, 6, 7, 2, 3, 8, 9, 10, 11]
    assert device_order((12,), 2) is None and device_order((4, 8), 1) is None


def test_join_and_cut():
    x = jnp.arange(24.0).reshape(2, 12)
    parts = cut(x, (4, 8))
    assert [part.shape for part in parts] == [(2, 4), (2, 8)]
    assert (join(parts) == x).all()
    with pytest.raises(ValueError, match=r"\(4, 7\) are 11 features, x has 12"):
        cut(x, (4, 7))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "flux-1.58bit"])
def test_packed_inputs_move_in_whole_blocks_and_groups(recipe):
    """Putting stored bytes and scales in the order of devices is putting codes in it."""
    rng = np.random.default_rng(0)
    k, n = 256 + 512, 3
    params = {"blocks": {"0": {"a": {"kernel": rng.standard_normal((1, k, n), np.float32)}}}}
    kernel = quantize(params, RECIPES[recipe])["blocks"]["0"]["a"]["kernel"]
    plan = Plan(name="", rules=(Rule(match=".*", how="inputs", parts=(256, 512)),))
    split = decide({"a": {"kernel": jax.tree.map(lambda x: x[0], kernel)}}, devices(2), plan)
    found = lies(kernel, split["a"].split, stored=True)
    order = device_order((256, 512), 2)
    codes = np.asarray(kernel.codes)[..., found.codes.order]
    natural = np.asarray(unpack_codes(kernel.codes, kernel.format, k))
    expected = pack_codes(jnp.asarray(natural[..., order]), kernel.format)
    np.testing.assert_array_equal(codes, expected)
    if kernel.scale.shape[-1] > 1:
        spread = np.repeat(np.asarray(kernel.scale), kernel.group, axis=-1)
        moved = np.repeat(np.asarray(kernel.scale)[..., found.scale.order], kernel.group, axis=-1)
        np.testing.assert_array_equal(moved, spread[..., order])


@pytest.mark.parametrize(
    ("params", "rule", "message"),
    [
        (one(64, 30), {"how": "outputs"}, "30 outputs on 4 devices are 7.5 each"),
        (one(64, 64), {"how": "outputs", "unit": 32}, "64 outputs .* 16 each, no multiple of 32"),
        (one(64, 64), {"how": "outputs", "parts": (32, 16)}, r"\(32, 16\) are 48 outputs, .* 64"),
        (
            one(1152, 64, "flux-1.58bit"),
            {"how": "inputs"},
            r"1152 inputs on 4 devices are 288 each, .* a block of packed codes \(128\)",
        ),
        (
            one(1152, 64, "w4a16"),
            {"how": "inputs"},
            r"288 each, .* a block of packed codes and a group of 128 \(128\)",
        ),
    ],
)
def test_widths_that_do_not_divide_are_refused_with_the_numbers(params, rule, message):
    plan = Plan(name="mine", rules=(Rule(match=".*a", **rule),))
    with pytest.raises(PlanError, match=message):
        shard(params, devices(4), plan)
    forgiving = Plan(name="mine", rules=(Rule(match=".*a", otherwise="whole", **rule),))
    (decision,) = decide(params, devices(4), forgiving).values()
    assert decision.split.how == "whole" and decision.note.startswith("whole: ")


def test_a_mask_lies_as_inputs_do_and_a_rotation_is_not_cut():
    codes = jax.ShapeDtypeStruct((64, 512), jnp.int8)
    scale, mask = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 1), (512,)))
    kernel = QTensor(codes, scale, shape=(64, 512), group=512, act_bits=8, mask=mask, rotation=128)
    plan = Plan(name="", rules=(Rule(match="a", how="inputs", parts=(256, 256)),))
    placed = shard({"a": {"kernel": kernel}}, devices(2), plan)["a"]["kernel"]
    assert placed.kernel.mask.sharding.spec == P("model")
    order = lies(kernel, placed.split, stored=True).mask.order
    np.testing.assert_array_equal(order, device_order((256, 256), 2))
    with pytest.raises(PlanError, match=r"64 each, which would cut a rotation of 128 \(128\)"):
        shard({"a": {"kernel": kernel}}, devices(4), plan)


def test_the_branch_of_a_lora_is_whole():
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    kernel = LoraKernel(floats(64, 32), floats(64, 4), floats(4, 32))
    plan = Plan(name="", rules=(Rule(match="a", how="outputs"),))
    placed = shard({"a": {"kernel": kernel}}, devices(4), plan)["a"]["kernel"]
    assert placed.base.kernel.sharding.spec == P(None, "model")
    assert placed.down.sharding.is_fully_replicated and placed.up.sharding.is_fully_replicated


def test_what_a_plan_or_mesh_lacks_is_said():
    plan = Plan(name="mine", rules=(Rule(match="b", how="whole"),))
    with pytest.raises(PlanError, match="no kernel is decided by rule.* b"):
        shard(one(64, 64), devices(4), plan)
    with pytest.raises(PlanError, match="splits over 'model'; the mesh has the axes data"):
        shard(shapes(), devices(4, "data"), named_plan("tensor", "flux", FLUX_DEV))
    with pytest.raises(PlanError, match="how is one of outputs, gathered, inputs, whole"):
        Rule(match="a", how="columns")
    with pytest.raises(PlanError, match="plan 'pipeline' is none of tensor, fsdp, data"):
        named_plan("pipeline", "flux", FLUX_DEV)
    with pytest.raises(PlanError, match="'t5' has no plan 'tensor'; flux, dit, .* have"):
        named_plan("tensor", "t5", None)


def test_layers_of_a_segment_must_lie_alike():
    rules = (Rule(match=r"double_blocks/3/img_mlp/in_layer", how="outputs"),)
    with pytest.raises(PlanError, match="stacked behind it lie differently"):
        shard(shapes(), devices(4), Plan(name="mine", rules=rules))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PLANS)
def test_every_network_has_every_plan(network, name):
    params, config = shapes(network, "w8a8"), NETWORKS[network].config()
    mesh = devices(2, "model" if name == "tensor" else "data")
    found = device_bytes(params, mesh, named_plan(name, network, config))
    total = device_bytes(params, devices(1, mesh.axis_names[0]), named_plan(name, network, config))
    assert found == total if name == "data" else total / 2 <= found < 0.52 * total


def test_flux_dev_by_hand():
    """On 8 devices: an eighth of 11.9 billion weights at two bits, and what is whole."""
    params = shapes("flux", "flux-1.58bit-a8")
    plan = named_plan("tensor", "flux", FLUX_DEV)
    found = holdings(params, devices(8), plan)
    assert sum(group.total for group in found) == tree_bytes(params)
    linear2 = next(group for group in found if group.name == "single_blocks/*/linear2")
    # codes an eighth; its scales, and its bias of bfloat16, belong to outputs and are whole
    assert linear2.device == 38 * (3072 * 15360 // 4 // 8 + 3072 * (4 + 2))
    assert linear2.how == "1/8 of the inputs of 2 parts"
    with pytest.raises(PlanError, match="3072 outputs on 16 devices are 192 each, no multiple"):
        holdings(params, devices(16), plan)
    console = Console(width=80, file=io.StringIO())
    console.print(holdings_table(found, "FLUX.1-dev"))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["total", "3,105.06", "395.45"] in lines
