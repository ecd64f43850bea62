"""Programs on several virtual CPU devices: `python -m tests.references.sharded NAME ARGUMENTS`.

How many devices a process has (`--xla_force_host_platform_device_count` in XLA_FLAGS) is settled
before jax starts, so tests run these as processes of their own: with eight devices, `two_processes`
with two each. Each prints one JSON object: what a sharded result has against one device's.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import checkpoint, ops
from lowbit_jax.models.flux import FluxConfig, FluxTransformer, abstract_params, image_ids, text_ids
from lowbit_jax.models.layers import AdaLN, Gelu
from lowbit_jax.quant import RECIPES, Recipe, Rule, WeightSpec, quantize
from lowbit_jax.sharding.place import placer, shard
from lowbit_jax.sharding.plan import Plan
from lowbit_jax.sharding.plan import Rule as Lay
from lowbit_jax.sharding.plans import named_plan

CONFIG = FluxConfig(
    in_channels=8,
    vec_in_dim=16,
    context_in_dim=16,
    hidden_size=512,
    num_heads=4,
    mlp_ratio=2.0,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(32, 48, 48),
)
K, N = 1024, 384
WEIGHTS = {
    "float": (None, None),
    "int8-zero-a8": (WeightSpec(format="int8", quantizer="minmax"), 8),
    "ternary-a8": (WeightSpec(format="ternary", quantizer="least_squares"), 8),
    "int6-a6": (WeightSpec(format="int6", quantizer="absmax"), 6),
    "int4-groups-a8": (WeightSpec(format="int4", quantizer="minmax", granularity=128), 8),
    "int4-groups": (WeightSpec(format="int4", quantizer="minmax", granularity=128), None),
}
CASES = [
    ("float", "inputs"),
    ("int8-zero-a8", "inputs"),
    ("int6-a6", "inputs"),
    ("int4-groups", "outputs"),
    ("int4-groups-a8", "inputs"),
    *(("ternary-a8", how) for how in ("outputs", "inputs", "inputs-adaln", "gathered", "stored")),
    *(("ternary-a8", f"inputs-{extra}") for extra in ("masked-static", "asymmetric", "rotated")),
]
WITH_GRADIENTS = [("float", "inputs"), ("ternary-a8", "outputs"), ("ternary-a8", "inputs")]


def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), devices=jax.devices()[: data * model])


def difference(one, other):
    """Whether equal to the bit, and the largest difference relative to the largest number."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return bool(np.array_equal(one, other)), float(np.abs(one - other).max() / np.abs(one).max())


def transformed(kernel, extra, mask):
    """A kernel whose input is masked, rotated, or quantised in another way."""
    if "asymmetric" in extra:
        return dataclasses.replace(kernel, act_symmetric=False)
    if "rotated" in extra:
        return dataclasses.replace(kernel, mask=jnp.asarray(mask), rotation=128)
    if "masked" in extra:
        return dataclasses.replace(kernel, mask=jnp.asarray(mask), act_scale=jnp.float32(0.02))
    return kernel


def products():
    """One linear, float32 activations: every way to split it."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    x, bias, gate, residual = normal(2, 9, K), normal(N), normal(2, N), normal(2, 9, N)
    x[1, 3] = 0
    vectors = normal(2, K), normal(2, K)
    found = {}
    for weights, case in CASES:
        spec, bits = WEIGHTS[weights]
        rules = (Rule(match=".*", weights=spec, act_bits=bits),) if spec else ()
        params = quantize(
            {"a": {"kernel": jnp.asarray(normal(K, N))}}, Recipe(name="", rules=rules)
        )
        how, *extra = case.split("-")
        params["a"]["kernel"] = transformed(params["a"]["kernel"], extra, normal(K))
        parts = {"outputs": 3 * (N // 3,), "inputs": 2 * (K // 2,)}.get(how, ())
        before = Gelu() if how == "inputs" and "adaln" not in extra else AdaLN(*vectors)
        after = (None, None) if how == "outputs" else (gate, residual)
        lay = Lay(match="a", how="whole" if how == "stored" else how, parts=parts)
        plan = Plan(name="", rules=(lay,), stored="data" if how == "stored" else None)
        sharded = shard(params, mesh_of(2, 4), plan)["a"]["kernel"]

        @jax.jit
        def run(x, kernel, before=before, after=after, gradient=(weights, case) in WITH_GRADIENTS):
            out = ops.linear(x, kernel, bias, before=before, gate=after[0], residual=after[1])
            if not gradient:
                return (out,)
            return out, jax.grad(lambda x: jnp.sum(jnp.sin(ops.linear(x, kernel, bias))))(x)

        pairs = zip(run(x, params["a"]["kernel"]), run(x, sharded), strict=True)
        found[f"{weights} {case}"] = [difference(*pair) for pair in pairs]
    broken = x.copy()
    broken[0, 2, 700] = np.nan
    sharded = shard(params, mesh_of(2, 4), Plan(name="", rules=(Lay(match="a", how="inputs"),)))
    out = np.isfinite(jax.jit(ops.linear)(broken, sharded["a"]["kernel"]))
    found["rows without a number"] = np.argwhere(~out.all(-1)).tolist()
    return found


def draw():
    """Parameters and inputs of a small FLUX."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(CONFIG, jnp.float32)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) * 0.04, shapes)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    inputs = dict(
        img=normal(2, 12, CONFIG.in_channels),
        txt=normal(2, 5, CONFIG.context_in_dim),
        timestep=np.array([0.5, 0.25], np.float32),
        pooled=normal(2, CONFIG.vec_in_dim),
        img_ids=image_ids(3, 4),
        txt_ids=text_ids(5),
        guidance=np.array([4.0, 2.0], np.float32),
    )
    return params, inputs


def network(recipe, *plans):
    """A whole forward pass of FLUX in float32, under plans such as "tensor,2,4"."""
    params, inputs = draw()
    params = quantize(params, RECIPES[recipe])
    apply = jax.jit(FluxTransformer(CONFIG).apply)
    one = apply({"params": params}, **inputs)
    found = {}
    for text in plans:
        name, *sizes = text.split(",")
        plan = named_plan(name, "flux", CONFIG)
        sharded = shard(params, mesh_of(*map(int, sizes)), plan)
        compiled = apply.lower({"params": sharded}, **inputs).compile()
        out = compiled({"params": sharded}, **inputs)
        moved = sorted({word for word in MOVES if f" {word}(" in compiled.as_text()})
        found[text] = [*difference(one, out), moved]
    return found


MOVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def restored(folder, recipe):
    """A checkpoint read straight into shards: the same arrays, each device its share of them."""
    params, _ = draw()
    params = quantize(params, RECIPES[recipe])
    config = CONFIG.__dict__
    checkpoint.save(folder, params, model="flux", config=config, recipe=RECIPES[recipe])
    mesh, plan = mesh_of(2, 4), named_plan("tensor", "flux", CONFIG)
    expected = shard(params, mesh, plan)
    found = checkpoint.load(folder, place=placer(mesh, plan)).params
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    codes = found["single_blocks"]["0"]["linear2"]["kernel"].kernel.codes
    return {
        "same": all(np.array_equal(a, b) for a, b in pairs),
        "lies": all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs),
        "share": list(codes.addressable_shards[0].data.shape),
        "whole": list(codes.shape),
    }


def two_processes(rank, address):
    """The same forward on two processes, each with two devices of a mesh of four."""
    jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
    params, inputs = draw()
    params = quantize(params, RECIPES["w8a8"])
    apply = jax.jit(FluxTransformer(CONFIG).apply)
    with jax.default_device(jax.local_devices()[0]):
        one = apply({"params": params}, **inputs)
    sharded = shard(params, mesh_of(1, 4), named_plan("tensor", "flux", CONFIG))
    out = apply({"params": sharded}, **inputs)
    kernel = sharded["double_blocks"]["0"]["img_mlp"]["out_layer"]["kernel"].kernel.codes
    return {
        "processes": jax.process_count(),
        "devices": len(jax.devices()),
        "mine": len(kernel.addressable_shards),
        "difference": difference(one, out.addressable_data(0)),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
