"""Tokenisers from a checkpoint's files against transformers' own."""

import json

import numpy as np
import pytest

from lowbit_jax.pipelines.folder import PipelineError
from lowbit_jax.pipelines.text import clip_tokenizer, t5_tokenizer

transformers = pytest.importorskip("transformers", reason="the reference is transformers")
pytest.importorskip("diffusers", reason="its tiny pipeline is used")
from tests.references import pipelines as reference  # noqa: E402

TEXTS = [
    "The CAT and  the fox's 2026,\tin the snow!",
    "",
    "caf\u00e9 \u72d0 <|endoftext|> \U0001f98a don't",
    "the cat and " * 20,
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return reference.write_clip_tokenizer(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    reference.t5_tokenizer().save_pretrained(folder)
    return folder


def theirs(tokenizer, length):
    return tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True).input_ids


SIZE = len(reference.clip_vocabulary())


@pytest.mark.parametrize("length", [77, 9])
def test_clip_s_equals_transformers(clip_folder, length):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    found = clip_tokenizer(clip_folder, SIZE, SIZE - 1)(TEXTS, length)
    assert found.ids.dtype == np.int32
    np.testing.assert_array_equal(found.ids, theirs(tokenizer, length))
    assert found.ids[1].tolist() == [SIZE - 2] + (length - 1) * [SIZE - 1]
    assert [bool(rest) for rest in found.dropped] == [length == 9, False, length == 9, length == 9]
    if length == 9:
        assert found.dropped[3] == ("cat and " + "the cat and " * 17).strip()


def test_clip_s_from_one_json_file_is_the_same(clip_folder, tmp_path):
    """As transformers 5 saves it."""
    transformers.CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    assert not (tmp_path / "merges.txt").exists()
    both = [clip_tokenizer(folder, SIZE, None)(TEXTS, 30).ids for folder in (clip_folder, tmp_path)]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("length", [64, 7])
def test_t5_s_equals_transformers(t5_folder, length):
    found = t5_tokenizer(t5_folder, 61)(TEXTS, length)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(t5_folder)
    np.testing.assert_array_equal(found.ids, theirs(tokenizer, length))
    assert found.ids[1].tolist() == [1] + (length - 1) * [0]
    assert found.dropped[3] == ("" if length == 64 else ("the cat and " * 18).strip())


def test_another_s_tokeniser_is_refused(clip_folder, t5_folder, tmp_path):
    with pytest.raises(PipelineError, match=f"it has {SIZE} tokens .* the encoder 49408"):
        clip_tokenizer(clip_folder, 49408, 49407)
    with pytest.raises(PipelineError, match="is token 519, the text encoder takes 7"):
        clip_tokenizer(clip_folder, SIZE, 7)
    with pytest.raises(PipelineError, match="not the tokeniser of this CLIP text encoder"):
        clip_tokenizer(t5_folder, 45, None)
    with pytest.raises(
        PipelineError, match="not the tokeniser of this T5 encoder: it has 45 tokens"
    ):
        t5_tokenizer(t5_folder, 32128)
    transformers.CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match="</s> is None"):
        t5_tokenizer(tmp_path, SIZE)


def test_files_that_cannot_be_read_are_named(clip_folder, t5_folder, tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\n")
    with pytest.raises(PipelineError, match="only spiece.model is there, .* add tokenizer.json"):
        t5_tokenizer(tmp_path, 32128)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PipelineError, match="no readable tokeniser"):
        t5_tokenizer(tmp_path, 32128)
    (tmp_path / "merges.txt").write_text("a b c\n")
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(PipelineError, match="no readable tokeniser"):
        clip_tokenizer(tmp_path, 1, None)


def test_padding_is_what_the_files_say(clip_folder, tmp_path):
    folder = reference.write_clip_tokenizer(tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    (folder / "tokenizer_config.json").write_text("{}")
    found = clip_tokenizer(folder, SIZE, None)(["a cat"], 8)
    assert found.ids[0, -1] == reference.clip_vocabulary()["!"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    with pytest.raises(PipelineError, match="padding token '<pad>' is not in the vocabulary"):
        clip_tokenizer(folder, SIZE, None)
