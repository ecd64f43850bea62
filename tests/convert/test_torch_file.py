"""PyTorch's files against PyTorch itself: what it saves is read bit for bit, or refused by name."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.torch_file import TorchFile

torch = pytest.importorskip("torch", reason="the other side is torch")

ODD = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
       torch.float8_e5m2: ml_dtypes.float8_e5m2}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.float64, torch.int8, torch.int16, torch.int32,
          torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
          *ODD]  # fmt: skip


def as_numpy(tensor) -> np.ndarray:
    """A torch tensor as torch itself says it is, through bytes where numpy lacks the dtype."""
    tensor = tensor.detach()
    if tensor.dtype in ODD:
        carrier = torch.int16 if tensor.dtype.itemsize == 2 else torch.uint8
        raw = tensor.contiguous().view(carrier).numpy()
        return raw.view(ODD[tensor.dtype])
    return tensor.numpy()


def save(value, path: Path, legacy: bool = False, protocol: int = 2) -> Path:
    new = not legacy
    torch.save(value, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    return path


def refused(path: Path, *expected: str, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path, **options)
    for text in (str(path), *expected):
        assert text in str(caught.value)
    return caught.value


def assert_reads(path: Path, tensors, **options) -> None:
    with TorchFile(path, **options) as file:
        assert file.names == tuple(sorted(tensors))
        for name, tensor in tensors.items():
            wanted, got = np.ascontiguousarray(as_numpy(tensor)), file.read(name)
            info = file.info(name)
            assert (got.dtype, got.shape) == (wanted.dtype, tuple(tensor.shape)), name
            assert (info.dtype, info.shape, info.nbytes) == (got.dtype, got.shape, wanted.nbytes)
            assert got.tobytes() == wanted.tobytes(), name
            assert not got.flags.writeable and (got.size == 0 or got.flags.c_contiguous)
            file.release(name)
            assert got.tobytes() == wanted.tobytes(), name


def every_kind() -> dict:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype in DTYPES:
        for shape in ((), (0,), (3,), (2, 5), (0, 4), (1, 2, 3, 4)):
            top = 2 if dtype == torch.bool else 100
            whole = torch.randint(0, top, shape, generator=generator)
            found[f"{dtype}{list(shape)}"] = whole.to(dtype)
    base = torch.arange(60.0).reshape(3, 4, 5)
    table = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    return found | {
        "parameter": torch.nn.Parameter(table.float()),
        "half parameter": torch.nn.Parameter(table.half(), requires_grad=False),
        "transposed": table.T,
        "permuted": base.permute(2, 0, 1),
        "sliced": base[1:, ::2, 1:4],
        "column": base[:, 2, 3],
        "row of a shared storage": base[2],
        "the last element": base[2, 3, 4],
        "again the same": base,
        "flags": torch.tensor([[True, False], [False, False]]).T,
        "one row, odd stride": base.as_strided((1, 5), (60, 1), 5),
        "empty, odd stride": base[:, 4:, ::2],
        "channels last": base[None].contiguous(memory_format=torch.channels_last),
    }  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_shape_and_view_is_what_torch_saved(tmp_path: Path, legacy, protocol):
    tensors = every_kind()
    assert_reads(save(tensors, tmp_path / "a.pt", legacy, protocol), tensors)


def test_whole_tensors_of_a_zip_are_views_and_shared_storages_are_stored_once(tmp_path: Path):
    base = torch.arange(6.0).reshape(2, 3)
    path = save({"a": base, "b": base[1], "c": base.T, "d": torch.ones(3)}, tmp_path / "a.pt")
    with TorchFile(path) as file:
        a, b, c, d = (file.read(name) for name in "abcd")
        assert np.shares_memory(a, b) and not np.shares_memory(a, d)
        assert not np.shares_memory(a, c) and file.info("c").span == 24
        # torch's own alignment, so that nothing has to be copied
        assert file.info("a").offset % 64 == file.info("d").offset % 64 == 0
    assert not a.flags.owndata


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_state_dict_of_a_module(tmp_path: Path, legacy):
    """An OrderedDict with the attribute `_metadata`; and Parameters, saved with their dict."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    assert_reads(save(module.state_dict(), tmp_path / "a.pt", legacy), module.state_dict())
    parameters = dict(module.named_parameters())
    parameters["0.weight"].note = "torch saves attributes of parameters too"
    assert_reads(save(parameters, tmp_path / "b.pt", legacy), parameters)


W = {"w": torch.ones(2), "b.c": torch.zeros(3)}
V = {"w": torch.zeros(2), "b.c": torch.ones(3)}


@pytest.mark.parametrize(
    ("saved", "weights", "taken", "notes"),
    [
        (W, "auto", W, ()),
        ({"ema": V, "model": W, "opt": {"state": {0: W}, "lr": 1e-4}}, "auto", V,
         ("took 'ema'; left 'model', 'opt'",)),
        ({"model": W, "ema": V}, "model", W, ("took 'model'; left 'ema'",)),
        ({"model": W, "epoch": 3, "name": "x"}, "auto", W, ("took 'model'; left 'epoch', 'name'",)),
        ({"model": W, "ema": None, "loss": W["w"]}, "auto", W,
         ("took 'model'; left 'ema', 'loss'",)),
        ({"state_dict": W}, "auto", W, ("took 'state_dict'; left nothing",)),
        ({"state_dict": W, "state_dict_ema": V}, "auto", V,
         ("took 'state_dict_ema'; left 'state_dict'",)),
        ({"state_dict": W, "state_dict_ema": V}, "model", W,
         ("took 'state_dict'; left 'state_dict_ema'",)),
        ({f"module.{k}": v for k, v in W.items()}, "auto", W,
         ("took the prefix 'module.' off every name",)),
        ({"module": {f"_orig_mod.{k}": v for k, v in W.items()}}, "auto", W,
         ("took 'module'; left nothing", "took the prefix '_orig_mod.' off every name")),
        ({"module.w": W["w"], "b": W["w"]}, "auto", {"module.w": W["w"], "b": W["w"]}, ()),
        ({"model": W["w"], "b": W["b.c"]}, "auto", {"model": W["w"], "b": W["b.c"]}, ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_which_part_is_taken_is_said(tmp_path: Path, legacy, saved, weights, taken, notes):
    path = save(saved, tmp_path / "a.pt", legacy)
    assert_reads(path, taken, weights=weights)
    with TorchFile(path, weights) as file:
        assert file.notes == notes


@pytest.mark.parametrize(
    ("saved", "weights", "expected"),
    [
        ({"ema": V}, "model", "weights 'model': it holds none of model, state_dict, module"),
        ({"model": V, "x": 1}, "ema",
         "'ema': it holds none of ema, state_dict_ema; its keys are 'model', 'x'"),
        ({"model": W, "state_dict": W}, "auto", "weights 'model': it holds 'model', 'state_dict'"),
        (W, "ema", "holds one set of tensors, --weights ema has nothing to choose"),
        ({"generator": W, "step": 1}, "auto", "holds no tensors and none of ('ema', "),
        ({"model": {"a": W}}, "auto", "holds no tensors"),
        ({"model": 3}, "auto", "holds no tensors and none of ('ema', "),
        ({"model": {}}, "auto", "'model' is empty; its keys are 'model'"),
        (W | {"epoch": 3}, "auto", "'epoch' is no tensor but 'int'"),
        ({"model": W | {"more": W}}, "auto", "'more' is no tensor but 'dict'"),
        ({1: W["w"]}, "auto", "1 is not the name of a tensor"),
        (W | {"../w": W["w"]}, "auto", "'../w': the name is a path that leaves its folder"),
        (W | {"": W["w"]}, "auto", "empty name"),
        ({}, "auto", "holds a dict, not a dict of tensors"),
        ([W["w"]], "auto", "holds a list, not a dict of tensors"),
        (W["w"], "auto", "holds a StoredTensor, not a dict"),
        (3, "auto", "holds a int, not a dict"),
    ],
)  # fmt: skip
def test_what_holds_no_such_part_is_refused(tmp_path: Path, saved, weights, expected):
    refused(save(saved, tmp_path / "a.pt"), expected, weights=weights)


def test_an_unknown_choice(tmp_path: Path):
    with pytest.raises(ValueError, match="weights 'best' is none of: auto, ema, model"):
        TorchFile(save(W, tmp_path / "a.pt"), "best")  # type: ignore[arg-type]


ASK = {
    "complex": (torch.ones(2, dtype=torch.complex64), "'torch.ComplexFloatStorage'"),
    "sparse": (torch.eye(3).to_sparse(), "'torch._utils._rebuild_sparse_tensor'"),
    "quantised": (
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "'torch._utils._rebuild_qtensor'",
    ),
    "on no device": (torch.ones(2, device="meta"), "'torch._utils._rebuild_meta_tensor_no_st"),
    "a module": (torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear'"),
    "negated": (torch.ones(2, dtype=torch.complex64).conj().imag, "metadata a dict changes"),
    "expanded": (torch.ones(2).expand(3, 2), "stride [0, 1], offset 0 repeats the 2 elements"),
    "a set": ({1, 2}, "the opcode EMPTY_SET is none that"),
    "bytes": (b"12", "the opcode SHORT_BINBYTES is none that"),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ASK)
def test_other_kinds_of_tensors_and_objects_are_refused_by_name(tmp_path: Path, kind, legacy):
    if kind == "negated" and legacy:
        pytest.skip("shares a complex storage, which torch's legacy writer refuses")
    value, expected = ASK[kind]
    protocol = 4 if kind in ("a set", "bytes") else 2
    path = save(W | {"x": value}, tmp_path / "a.pt", legacy, protocol)
    torch.load(path, weights_only=False)  # a good file in itself
    refused(path, expected)


def test_the_objects_training_programs_keep_are_never_made_and_never_weights(tmp_path: Path):
    from argparse import Namespace
    from collections import Counter, defaultdict

    args = Namespace(model="DiT-XL/2", lr=1e-4, path=Path("x"), nested=Namespace(a=[1, {2}]))
    extras = {"args": args, "count": Counter("aab"), "best": np.float64(0.5), "rng": np.arange(3),
              "lists": defaultdict(list, a=[1]), "device": torch.device("cpu")}  # fmt: skip
    for legacy in (False, True):
        path = save({"ema": W, **extras}, tmp_path / "a.pt", legacy)
        assert_reads(path, W)
        with TorchFile(path) as file:
            left = ", ".join(map(repr, extras))
            assert file.notes == (f"took 'ema'; left {left}",)
        path = save(W | {"args": args}, tmp_path / "b.pt", legacy)
        refused(path, "'args' is no tensor but 'argparse.Namespace'")
        refused(save(args, tmp_path / "c.pt", legacy), "holds argparse.Namespace, not a dict")


def sharded(folder: Path, stem: str = "pytorch_model") -> Path:
    import json

    names = [f"{stem}-0000{i}-of-00002.bin" for i in (1, 2)]
    save({"w": W["w"]}, folder / names[0])
    save({"b.c": W["b.c"]}, folder / names[1], legacy=True)
    index = {"metadata": {}, "weight_map": {"w": names[0], "b.c": names[1]}}
    (folder / f"{stem}.bin.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.bin.index.json"


def test_folders_and_shards(tmp_path: Path):
    inner = tmp_path / "transformer"
    inner.mkdir()
    (inner / "config.json").write_text("{}")
    index = sharded(inner)
    for path in (tmp_path, inner, index):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.names == ("b.c", "w") and checkpoint.total_bytes == 20
            assert checkpoint.config == {} and len(checkpoint.files) == 2
            np.testing.assert_array_equal(checkpoint.read("w"), [1, 1])
            assert len(checkpoint.digests()) == 2
    with pytest.raises(CheckpointError, match="--weights ema has nothing to choose"):
        open_checkpoint(index, "ema")
    index.unlink()
    with pytest.raises(CheckpointError, match="holds shards without their index"):
        open_checkpoint(inner)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "DiT-XL-2-256x256.pt", "v.pth", "v.ckpt"])
def test_a_folder_with_one_file(tmp_path: Path, name):
    save({"model": W, "ema": V}, tmp_path / name)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.source == tmp_path / name
        assert checkpoint.notes == (f"{name}: took 'ema'; left 'model'",)
        np.testing.assert_array_equal(checkpoint.read("w"), [0, 0])
    with open_checkpoint(tmp_path, "model") as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("w"), [1, 1])
    save(W, tmp_path / "another.pt")
    if not name.startswith("pytorch_model"):
        with pytest.raises(CheckpointError, match="holds 2 candidates, give one: .*'another.pt'"):
            open_checkpoint(tmp_path)


def test_safetensors_beside_it_come_first(tmp_path: Path):
    from safetensors.torch import save_file

    save(V, tmp_path / "pytorch_model.bin")
    save_file(W, tmp_path / "weights.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.source == tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match="--weights model has nothing to choose"):
        open_checkpoint(tmp_path, "model")


SMALL = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.nn.Parameter(torch.ones(4)),
         "c": torch.arange(4, dtype=torch.int16)}  # fmt: skip
EDITS = st.lists(
    st.tuples(st.sampled_from(["put", "flip", "cut", "insert", "move"]), st.integers(0, 1 << 20),
              st.integers(0, 255)),
    min_size=1, max_size=4,
)  # fmt: skip


def mutate(raw: bytearray, edits) -> bytes:
    for kind, where, byte in edits:
        at = where % max(len(raw), 1)
        if kind == "put":
            raw[at : at + 1] = bytes([byte])
        elif kind == "flip":
            raw[at : at + 1] = bytes([raw[at] ^ 1 << byte % 8]) if raw else b""
        elif kind == "cut":
            del raw[at : at + 1 + byte % 7 * 40]
        elif kind == "insert":
            raw[at:at] = bytes([byte])
        else:
            raw[at:at] = raw[at // 2 : at // 2 + byte]
    return bytes(raw)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@settings(max_examples=400)
@given(edits=EDITS)
def test_a_damaged_file_is_refused_or_means_what_torch_makes_of_it(tmp_path_factory, legacy, edits):
    folder = tmp_path_factory.getbasetemp()
    good, path = folder / f"good-{legacy}.pt", folder / f"fuzz-{legacy}.pt"
    if not good.exists():
        save({"model": SMALL, "step": 3}, good, legacy)
    path.write_bytes(mutate(bytearray(good.read_bytes()), edits))
    try:
        file = TorchFile(path)
    except CheckpointError as error:
        str(error).encode()
        return
    with file:
        try:
            theirs = torch.load(path, weights_only=True)
        except Exception:  # torch checks sums and alignments that do not change a meaning
            for name in file.names:
                file.read(name)
            return
        part = next(key for key in ("ema", "state_dict_ema", "model", "state_dict", "module", None)
                    if key is None or key in theirs)  # fmt: skip
        assert_same(file, theirs if part is None else theirs[part])


def assert_same(file: TorchFile, tensors) -> None:
    assert set(file.names) == set(tensors)
    for name, tensor in tensors.items():
        wanted = as_numpy(tensor)
        got = file.read(name)
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert got.tobytes() == np.ascontiguousarray(wanted).tobytes()
