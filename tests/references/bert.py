"""BERT out of PyTorch's own encoder layers, fed with Hugging Face tensor names."""

import torch


def bert_states(tensors, ids, mask, heads: int, eps: float = 1e-12):
    """Last states (b, t, k), zero where padded; `torch.nn.TransformerEncoderLayer` does the work.

    Args:
        tensors: name -> float32 torch tensor, without a prefix.
        ids: integer tensor (b, t).
        mask: bool tensor (b, t), True for real tokens.
        heads: number of attention heads.
        eps: of the layer norms.
    """
    embed = {name: tensors[f"embeddings.{name}_embeddings.weight"] for name in NAMES}
    x = embed["word"][ids] + embed["position"][: ids.shape[1]] + embed["token_type"][0]
    norm = [tensors[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")]
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], *norm, eps)
    count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder."))
    for i in range(count):
        x = _layer(tensors, f"encoder.layer.{i}.", x.shape[-1], heads, eps)(
            x, src_key_padding_mask=~mask
        )
    return x * mask[..., None]


NAMES = ("word", "position", "token_type")


def _layer(tensors, prefix, width, heads, eps):
    part = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    qkv = [f"attention.self.{name}" for name in ("query", "key", "value")]
    state = {
        "self_attn.in_proj_weight": torch.cat([part[f"{name}.weight"] for name in qkv]),
        "self_attn.in_proj_bias": torch.cat([part[f"{name}.bias"] for name in qkv]),
    }
    rest = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for theirs, name in rest.items():
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = part[f"{name}.{kind}"]
    layer = torch.nn.TransformerEncoderLayer(
        width,
        heads,
        dim_feedforward=state["linear1.weight"].shape[0],
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=eps,
        batch_first=True,
    )
    layer.load_state_dict(state)
    # Not eval(): its fused fast path packs away the padding, which the mask above expects in place.
    return layer.train()
