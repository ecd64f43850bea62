"""How one parameter lies in a checkpoint: its arrays and the entry that describes them.

An array is stored as it is, a `QTensor` as `<name>.codes`, `<name>.scale` and, where it has them,
`<name>.zero`, `.mask` and `.act_scale`; a `TransformedKernel` as `<name>.kernel` and `.mask`; a
`RangedKernel` as the one it holds, `<name>.ranges`. In a manifest each array has its shape, dtype
and SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.quant.qtensor import QTensor, TransformedKernel
from lowbit_jax.quant.ranged import RangedKernel
from pallas_kernels import packing

FIELDS = {  # kind of a leaf -> its arrays, some of which may be absent
    "qtensor": ("codes", "scale", "zero", "mask", "act_scale"),
    "transformed": ("kernel", "mask"),
}


def store_leaf(
    path: str, leaf: Any, arrays: dict[str, np.ndarray], archive: bool
) -> dict[str, Any]:
    """Add a parameter's arrays to `arrays` and return its manifest entry.

    Args:
        path: path inside its part, such as "img_attn/qkv/kernel".
        leaf: array or QTensor.
        arrays: stored name -> array.
        archive: store ternary codes five to the byte.
    """
    if isinstance(leaf, RangedKernel):
        kernels = store_leaf(f"{path}/ranges", leaf.kernels, arrays, archive=False)
        return {"kind": "ranged", "edges": list(leaf.edges), "kernels": kernels}
    if isinstance(leaf, TransformedKernel):
        found = {"kernel": leaf.kernel, "mask": leaf.mask}
        return {"kind": "transformed", **_rotation(leaf), **_store_all(path, found, arrays)}
    if not isinstance(leaf, QTensor):
        return {"kind": "array", **_store(path, leaf, arrays)}
    spec: dict[str, Any] = {
        "kind": "qtensor",
        "format": leaf.format,
        "shape": list(leaf.shape),
        "group": leaf.group,
        "act_bits": leaf.act_bits,
        **({} if leaf.act_symmetric else {"act_symmetric": False}),
        **_rotation(leaf),
    }
    codes = leaf.codes
    if archive and leaf.format == "ternary":
        codes = packing.pack_trits(packing.unpack(jnp.asarray(codes), 2, leaf.shape[1]))
        spec["codes_as"] = "trits"
    found = {name: getattr(leaf, name) for name in FIELDS["qtensor"]} | {"codes": codes}
    return spec | _store_all(path, found, arrays)


def stored_arrays(specs: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(stored name, {shape, dtype, sha256}) of every array of a part."""
    for path, spec in specs.items():
        name = path.replace("/", ".")
        if spec["kind"] == "ranged":
            yield from stored_arrays({f"{path}/ranges": spec["kernels"]})
        elif spec["kind"] == "array":
            yield name, spec
        else:
            for field in FIELDS[spec["kind"]]:
                if field in spec:
                    yield f"{name}.{field}", spec[field]


def damage(specs: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with the first array that is not what the manifest says; None if all are."""
    for name, expected in stored_arrays(specs):
        found = _fingerprint(arrays[name])
        for key, value in found.items():
            if value != expected[key]:
                return f"tensor {name} is damaged ({key} {value}, manifest says {expected[key]})"
    return None


def restore_leaf(path: str, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """Inverse of `store_leaf`."""
    name = path.replace("/", ".")
    if spec["kind"] == "ranged":
        return _ranged(spec, restore_leaf(f"{path}/ranges", spec["kernels"], arrays))
    if spec["kind"] == "array":
        return arrays[name]
    found = {field: arrays.get(f"{name}.{field}") for field in FIELDS[spec["kind"]]}
    if spec.get("codes_as") == "trits":
        trits = packing.unpack_trits(jnp.asarray(found["codes"]), spec["shape"][1])
        found["codes"] = np.asarray(packing.pack(trits, 2, pad=1))
    return _made(spec, found)


def abstract_leaf(spec: Mapping[str, Any]) -> Any:
    """A parameter as shapes; ternary codes as they are in memory."""

    def shape(field: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(field["shape"]), jnp.dtype(field["dtype"]))

    if spec["kind"] == "ranged":
        return _ranged(spec, abstract_leaf(spec["kernels"]))
    if spec["kind"] == "array":
        return shape(spec)
    found = {name: shape(spec[name]) if name in spec else None for name in FIELDS[spec["kind"]]}
    if spec.get("codes_as") == "trits":
        n, k = spec["shape"]
        found["codes"] = jax.ShapeDtypeStruct((n, packing.packed_size(k, 2)), jnp.uint8)
    return _made(spec, found)


def _rotation(leaf: QTensor | TransformedKernel) -> dict[str, int]:
    return {} if leaf.rotation is None else {"rotation": leaf.rotation}


def _ranged(spec: Mapping[str, Any], kernels: QTensor | TransformedKernel) -> RangedKernel:
    return RangedKernel(kernels, tuple(spec["edges"]))


def _store_all(
    path: str, found: Mapping[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    there = {name: leaf for name, leaf in found.items() if leaf is not None}
    return {name: _store(f"{path}/{name}", leaf, arrays) for name, leaf in there.items()}


def _store(path: str, leaf: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    array = np.asarray(leaf, order="C")
    arrays[path.replace("/", ".")] = array
    return _fingerprint(array)


def _fingerprint(array: np.ndarray) -> dict[str, Any]:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(raw.data).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}


def _made(spec: Mapping[str, Any], arrays: Mapping[str, Any]) -> QTensor | TransformedKernel:
    rotation = spec.get("rotation")
    if spec["kind"] == "transformed":
        return TransformedKernel(arrays["kernel"], arrays["mask"], rotation)
    return QTensor(
        **arrays,
        format=spec["format"],
        shape=tuple(spec["shape"]),
        group=spec["group"],
        act_bits=spec["act_bits"],
        rotation=rotation,
        act_symmetric=spec.get("act_symmetric", True),
    )
