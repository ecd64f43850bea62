"""Where a model's files may lie, and every layout that is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.safetensors import write_safetensors, write_sharded

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
TENSORS = {f"blocks.{i}.weight": np.full((4, 8), i, np.float32) for i in range(5)}


def shard(number: int, of: int = 3) -> str:
    return f"{STEM}-{number:05d}-of-{of:05d}.safetensors"


def sharded(folder: Path) -> Path:
    """Five tensors of 128 bytes in shards of at most 300: 2 + 2 + 1."""
    write_sharded(folder, TENSORS, 300)
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    return folder


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


def refused(path: Path, *expected: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    for text in expected:
        assert text in str(caught.value)
    return caught.value


def test_sharded_folder_index_and_pipeline(tmp_path: Path):
    folder = sharded(tmp_path / "pipe" / "transformer")
    assert json.loads((folder / INDEX).read_text())["metadata"] == {"total_size": 5 * 128}
    for path in (folder, folder / INDEX, tmp_path / "pipe"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.names == tuple(TENSORS) and checkpoint.total_bytes == 5 * 128
            assert checkpoint.config == {"_class_name": "DiTTransformer2DModel"}
            assert checkpoint.source == folder / INDEX
            assert checkpoint.files == [folder / shard(i) for i in (1, 2, 3)]
            assert checkpoint.info("blocks.2.weight").path == folder / shard(2)
            for name, x in TENSORS.items():
                np.testing.assert_array_equal(checkpoint.read(name), x)
                checkpoint.release(name)
            with pytest.raises(CheckpointError, match="no tensor 'blocks.9.weight' among its 5"):
                checkpoint.read("blocks.9.weight")


def test_digests_of_every_file_with_progress(tmp_path: Path):
    steps: list[tuple[int, int]] = []
    with open_checkpoint(sharded(tmp_path)) as checkpoint:
        digests = checkpoint.digests(lambda done, total: steps.append((done, total)))
    wanted = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.files}
    assert digests == wanted and len(steps) == 3 and steps[-1][0] == steps[-1][1]


def test_shards_and_index_are_the_hub_librarys(tmp_path: Path):
    hub = pytest.importorskip("huggingface_hub")
    folder = sharded(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    split = hub.split_state_dict_into_shards_factory(
        TENSORS,
        get_storage_size=lambda x: x.nbytes,
        filename_pattern=STEM + "{suffix}.safetensors",
        max_shard_size=300,
    )
    assert split.tensor_to_filename == index["weight_map"]
    assert split.metadata == index["metadata"]


@pytest.mark.parametrize("name", [f"{STEM}.safetensors", "model.safetensors", "v.safetensors"])
def test_single_file_and_its_folder(tmp_path: Path, name: str):
    write_safetensors(tmp_path / name, TENSORS)
    if name[0] != "v":
        write_safetensors(tmp_path / "other.fp16.safetensors", {})
    for path in (tmp_path, tmp_path / name):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.files == [tmp_path / name] and checkpoint.config is None
            assert checkpoint.names == tuple(TENSORS)


def test_index_is_the_authority(tmp_path: Path):
    folder = sharded(tmp_path)
    edit_index(folder, **{"blocks.0.weight": None, "x": shard(3), "blocks.2.weight": shard(3)})
    error = refused(
        folder,
        f"tensor 'blocks.0.weight' is in '{shard(1)}' but not in the index",
        f"tensor 'blocks.2.weight' is in '{shard(2)}', the index says '{shard(3)}'",
        f"tensor 'x' is in the index but not in '{shard(3)}'",
    )
    assert len(error.problems) == 3


def test_tensor_in_two_shards(tmp_path: Path):
    folder = sharded(tmp_path)
    both = {name: TENSORS[name] for name in ("blocks.3.weight", "blocks.4.weight")}
    write_safetensors(folder / shard(3), both, overwrite=True)
    error = refused(folder, "tensor 'blocks.3.weight' is in 2 shards")
    assert len(error.problems) == 1


def test_damaged_and_missing_shards_are_all_named(tmp_path: Path):
    folder = sharded(tmp_path)
    (folder / shard(1)).write_bytes((folder / shard(1)).read_bytes()[:-1])
    (folder / shard(2)).unlink()
    error = refused(
        folder,
        f"shard '{shard(1)}': the data has 255 bytes",
        f"shard '{shard(2)}' is named by the index but is not in the folder",
    )
    assert len(error.problems) == 2


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "x.bin", "",
     "c:x.safetensors", "\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_shard_names_must_be_plain(tmp_path: Path, name: str):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    folder = sharded(tmp_path / "model")
    edit_index(folder, y=name)
    refused(folder, "must be the plain name of a .safetensors file beside the index")


def test_links_stay_in_the_folder_or_the_hub_cache(tmp_path: Path):
    outside = write_safetensors(tmp_path / "outside.safetensors", {"y": np.zeros(1, np.int8)})
    folder = sharded(tmp_path / "model")
    (folder / "link.safetensors").symlink_to(outside)
    edit_index(folder, y="link.safetensors")
    refused(folder, "shard 'link.safetensors' is a link that leaves the folder")

    cache = tmp_path / "models--a--b"
    folder = sharded(cache / "snapshots" / "0123" / "transformer")
    (cache / "blobs").mkdir()
    for number in (1, 2, 3):
        blob = cache / "blobs" / f"{number}"
        os.replace(folder / shard(number), blob)
        (folder / shard(number)).symlink_to(os.path.relpath(blob, folder))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names == tuple(TENSORS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "must hold a JSON object"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {}}', "weight_map must map"),
        ('{"weight_map": {"a": 1}}', "weight_map['a'] must be a file name, it is 1"),
        ('{"weight_map": {"a": "b", "a": "b"}}', "'a' appears twice"),
        ('{"weight_map": NaN}', "literal NaN"),
        ("[" * 100_000, "too deeply"),
        ("", "not valid JSON"),
    ],
)
def test_hostile_index(tmp_path: Path, text: str, expected: str):
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, expected, INDEX)


def test_config_must_be_an_object(tmp_path: Path):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS)
    (tmp_path / "config.json").write_text("3")
    refused(path, "config.json", "must hold a JSON object, it holds 3")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("random_states_0.pkl", "is a Python pickle"),
        ("flux1-dev-Q4_K.gguf", "give the original .safetensors"),
        ("notes.txt", ""),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, expected: str):
    (tmp_path / name).write_bytes(b"1234")
    refused(tmp_path / name, expected or "expected .safetensors, .bin, .pt", name)
    refused(tmp_path, expected or "only: 'notes.txt'", "holds no ", name)


def test_nothing_or_too_much(tmp_path: Path):
    refused(tmp_path / "facebook" / "DiT", "does not exist; download the model first")
    refused(tmp_path, "only: nothing")
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", TENSORS)
    refused(tmp_path, "holds 2 candidates, give one: 'a.safetensors', 'b.safetensors'")
    folder = sharded(tmp_path / "model")
    write_safetensors(folder / f"{STEM}.safetensors", TENSORS)
    refused(folder, "holds both")
    (folder / f"{STEM}.safetensors").unlink()
    (folder / INDEX).unlink()
    refused(folder, "shards without their index")
    for number in (2, 3):
        (folder / shard(number)).unlink()
    refused(folder, "shards without their index")  # a lone first shard is not a model


def test_write_sharded_replaces_only_when_told(tmp_path: Path):
    sharded(tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="exists already; pass overwrite=True"):
        write_sharded(tmp_path, TENSORS, 10_000)
    assert write_sharded(tmp_path, TENSORS, 10_000, overwrite=True) == [
        tmp_path / f"{STEM}.safetensors"
    ]
    names = {f"{STEM}.safetensors", "config.json", "mine.txt"}
    assert set(os.listdir(tmp_path)) == names
    written = write_sharded(tmp_path, TENSORS, 1, overwrite=True)  # each tensor its own shard
    assert [p.name for p in written] == [shard(i, 5) for i in range(1, 6)] + [INDEX]
    with open_checkpoint(tmp_path) as checkpoint:  # may be rewritten while it is being read
        write_sharded(tmp_path, {n: checkpoint.read(n) for n in TENSORS}, 300, overwrite=True)
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(np.array_equal(checkpoint.read(n), x) for n, x in TENSORS.items())


def test_huge_index_is_not_read(tmp_path: Path):
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, (64 << 20) + 1)  # sparse: costs no disk
    refused(tmp_path, "is 67108865 bytes of JSON, over 67108864")
