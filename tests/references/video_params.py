"""Open-Sora's names to our trees, written apart from `convert`."""

import jax
import jax.numpy as jnp
import numpy as np


class Names:
    """A state dict that notes what was taken from it."""

    def __init__(self, state, unused=()):
        self.state = dict(state)
        for name in unused:
            self.state.pop(name)

    def take(self, name):
        """A tensor, once."""
        return self.state.pop(name)

    def linear(self, name):
        """Kernel and bias."""
        weight, bias = self.take(f"{name}.weight"), self.take(f"{name}.bias")
        return {"kernel": weight.reshape(len(weight), -1).T, "bias": bias}

    def attention(self, name, qk_norm=False):
        """Self-attention."""
        found = {part: self.linear(f"{name}.{part}") for part in ("qkv", "proj")}
        if qk_norm:
            for part in ("q_norm", "k_norm"):
                found[part] = {"scale": self.take(f"{name}.{part}.weight")}
        return found

    def cross_attention(self, name):
        """Cross-attention."""
        return {p: self.linear(f"{name}.{p}") for p in ("q_linear", "kv_linear", "proj")}

    def embedder(self, name):
        """The MLP of a number."""
        return {"in_layer": self.linear(f"{name}.mlp.0"), "out_layer": self.linear(f"{name}.mlp.2")}

    def block(self, name, attentions=("attn",), qk_norm=False):
        """A block of any kind."""
        return {
            "scale_shift_table": self.take(f"{name}.scale_shift_table"),
            **{part: self.attention(f"{name}.{part}", qk_norm) for part in attentions},
            "cross_attn": self.cross_attention(f"{name}.cross_attn"),
            "mlp": {part: self.linear(f"{name}.mlp.{part}") for part in ("fc1", "fc2")},
        }

    def tree(self, blocks, **more):
        """The whole tree; everything must have been taken."""
        params = more | {
            "x_embedder": {"proj": self.linear("x_embedder.proj")},
            "t_embedder": self.embedder("t_embedder"),
            "blocks": {"0": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)},
        }
        if self.state:
            raise ValueError(f"no place for {sorted(self.state)}")
        return jax.tree.map(jnp.asarray, params)

    def text_tree(self, blocks, **more):
        """The whole tree of a network for text, with adaLN-single."""
        caption = {part: self.linear(f"y_embedder.y_proj.{part}") for part in ("fc1", "fc2")}
        parts = {
            "t_block": self.linear("t_block.1"),
            "y_embedder": {
                "y_proj": caption,
                "y_embedding": self.take("y_embedder.y_embedding"),
            },
            "final_layer": {
                "scale_shift_table": self.take("final_layer.scale_shift_table"),
                "linear": self.linear("final_layer.linear"),
            },
        }
        return self.tree(blocks, **parts, **more)


def latte_params(state, config):
    """Latte, class-conditional."""
    names = Names(state, unused=("pos_embed", "temp_embed"))

    def block(i):
        return {
            "adaLN_modulation": names.linear(f"blocks.{i}.adaLN_modulation.1"),
            "attn": names.attention(f"blocks.{i}.attn"),
            "mlp": {part: names.linear(f"blocks.{i}.mlp.{part}") for part in ("fc1", "fc2")},
        }

    pairs = [{"spatial": block(i), "temporal": block(i + 1)} for i in range(0, config.depth, 2)]
    final = "final_layer"
    parts = {
        final: {
            "adaLN_modulation": names.linear(f"{final}.adaLN_modulation.1"),
            "linear": names.linear(f"{final}.linear"),
        }
    }
    if config.num_classes:
        table = names.take("y_embedder.embedding_table.weight")
        parts["y_embedder"] = {"embedding_table": table}
    return names.tree(pairs, **parts)


def stdit_params(state, config):
    """STDiT."""
    names = Names(state, unused=("pos_embed", "pos_embed_temporal"))
    kinds = ("attn", "attn_temp")
    return names.text_tree([names.block(f"blocks.{i}", kinds) for i in range(config.depth)])


def stdit3_params(state, config):
    """STDiT3."""
    names = Names(state, unused=("rope.freqs",))
    pairs = [
        {
            kind: names.block(f"{kind}_blocks.{i}", qk_norm=config.qk_norm)
            for kind in ("spatial", "temporal")
        }
        for i in range(config.pairs)
    ]
    return names.text_tree(pairs, fps_embedder=names.embedder("fps_embedder"))


def random_tree(abstract, seed=0):
    """Float32 parameters for a tree of shapes, nothing at zero: outputs as large as inputs."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        is_kernel = path[-1].key == "kernel"
        scale = shape.shape[-2] ** -0.5 if is_kernel else 0.3
        return jnp.asarray(scale * rng.standard_normal(shape.shape, np.float32))

    return jax.tree.map_with_path(leaf, abstract)
