"""MiniLM: parity with PyTorch, the converter's complaints, and the tokeniser's padding."""

import numpy as np
import pytest

from convert import minilm
from convert.errors import CheckpointError
from lowbit_jax.models.bert import BertConfig, BertEncoder

SMALL = BertConfig(
    vocab_size=50, hidden_size=24, num_layers=3, num_heads=4, mlp_size=40, max_positions=16
)


@pytest.fixture(scope="module")
def encode():
    try:
        return minilm.load_minilm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def small_tensors():
    rng = np.random.default_rng(0)
    shapes = minilm._shapes(SMALL)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def batch(vocab: int, max_len: int):
    rng = np.random.default_rng(1)
    mask = np.arange(max_len) < np.array([[max_len], [max_len - 3], [1]])
    return np.where(mask, rng.integers(1, vocab, mask.shape), 0), mask


def reference(tensors, ids, mask, heads):
    torch = pytest.importorskip("torch", reason="the reference runs in PyTorch")
    from tests.references.bert import bert_states

    tensors = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    with torch.no_grad():
        states = bert_states(tensors, torch.from_numpy(ids), torch.from_numpy(mask), heads)
    return states.numpy()


def test_small_bert_equals_torch():
    tensors, (ids, mask) = small_tensors(), batch(50, 9)
    params = minilm.convert_bert(tensors, SMALL)
    states, pooled = BertEncoder(SMALL).apply({"params": params}, ids, mask)
    expected = reference(tensors, ids, mask, SMALL.num_heads)
    # float32 throughout, another order of summation: 1e-4 leaves a wide margin
    np.testing.assert_allclose(states, expected, atol=1e-4, rtol=0)
    mean = expected.sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(pooled, mean, atol=1e-4, rtol=0)


def test_minilm_equals_torch(encode):
    from safetensors.numpy import load_file

    texts = ["a noun with a pizza head", "an owl", "Nothing like it: 2+2, naïve!"]
    ids, mask = encode.tokens(texts, 16)
    tensors = load_file(minilm.model_folder() / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if name not in minilm.UNUSED}
    expected = reference(tensors, ids, mask, encode.config.num_heads)
    states, pooled = encode(texts, 16)
    np.testing.assert_allclose(states, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(pooled, expected.sum(1) / mask.sum(1, keepdims=True), atol=1e-4)


def test_minilm_knows_what_is_alike(encode):
    _, pooled = encode(["a red apple", "a fruit that is red", "the stock market fell"], 16)
    pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    alike, unlike = pooled[0] @ pooled[1], pooled[0] @ pooled[2]
    assert alike == pytest.approx(0.75, abs=0.02)
    assert unlike < 0.25


def test_padding_changes_nothing(encode):
    short, long = encode(["a noun"], 8), encode(["a noun"], 32)
    np.testing.assert_allclose(short[0], long[0][:, :8], atol=1e-5)
    np.testing.assert_allclose(short[1], long[1], atol=1e-5)
    assert not long[0][:, 8:].any()


def test_tokens(encode):
    ids, mask = encode.tokens(["an apple", ""], 6)
    names = [[encode.tokenizer.id_to_token(int(i)) for i in row] for row in ids]
    assert names[0] == ["[CLS]", "an", "apple", "[SEP]", "[PAD]", "[PAD]"]
    assert names[1] == ["[CLS]", "[SEP]"] + 4 * ["[PAD]"]
    assert mask.sum(1).tolist() == [4, 2]


def test_long_text_keeps_its_last_token(encode):
    ids, mask = encode.tokens(["a very long text about nothing"], 5)
    assert mask.all()
    assert encode.tokenizer.id_to_token(int(ids[0, -1])) == "[SEP]"


def test_all_problems_are_told_at_once():
    tensors = small_tensors()
    del tensors["embeddings.LayerNorm.bias"]
    tensors["pooler.dense.weight"] = np.zeros((24, 24))  # known, not needed
    tensors["classifier.weight"] = np.zeros(3)
    tensors["encoder.layer.1.output.dense.weight"] = np.zeros((40, 24))
    with pytest.raises(CheckpointError) as caught:
        minilm.convert_bert(tensors, SMALL)
    assert caught.value.problems == (
        "unknown tensor classifier.weight",
        "encoder.layer.1.output.dense.weight: shape (40, 24), expected (24, 40)",
        "missing tensor embeddings.LayerNorm.bias (24,)",
    )


def test_too_many_tokens():
    ids = np.zeros((1, 17), int)
    params = minilm.convert_bert(small_tensors(), SMALL)
    with pytest.raises(ValueError, match="17 tokens, but BERT has 16 positions"):
        BertEncoder(SMALL).apply({"params": params}, ids, ids == 0)
