"""PixArt as others run it: diffusers' model, and the original network in plain torch.

The mappings are written name by name and share nothing with `convert`.
"""

import math

import jax
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel


def diffusers_model(config) -> PixArtTransformer2DModel:
    """diffusers' model of a `PixArtConfig`, as `torch.device` says where."""
    return PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels * (2 if config.learn_sigma else 1),
        num_layers=config.depth,
        cross_attention_dim=config.hidden_size,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        interpolation_scale=config.interpolation,
        use_additional_conditions=config.micro_conditions,
        caption_channels=config.caption_channels,
    )


def randomise(tensors: dict[str, torch.Tensor], seed: int = 0) -> None:
    """Fill with random numbers: biases and tables far from zero, outputs as large as inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            flat = tensor.ndim == 1 or "table" in name or "y_embedding" in name
            bound = 0.5 if flat else math.sqrt(3 / tensor[0].numel())
            tensor.uniform_(-bound, bound, generator=generator)


def random_diffusers(config, seed: int = 0) -> PixArtTransformer2DModel:
    """diffusers' model, all of it random."""
    model = diffusers_model(config).eval()
    randomise(dict(model.named_parameters()), seed)
    return model


def random_original(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of the original layout, all of it random."""
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    randomise(state, seed)
    return state


def pixart_inputs(config, batch=3, grid=None, tokens=7, seed=1) -> dict[str, np.ndarray]:
    """Random inputs of `PixArtTransformer.__call__`; captions of all, of some, and of one token."""
    rng = np.random.default_rng(seed)
    rows, columns = grid or (config.sample_size // config.patch_size,) * 2
    size = (batch, config.in_channels, rows * config.patch_size, columns * config.patch_size)
    lengths = [tokens, max(1, tokens // 2), 1, tokens - 1][:batch]
    inputs = {
        "x": rng.standard_normal(size, np.float32),
        "timestep": np.array([500, 3, 999, 250], np.int32)[:batch],
        "caption": rng.standard_normal((batch, tokens, config.caption_channels), np.float32),
        "caption_mask": np.arange(tokens) < np.array(lengths)[:, None],
    }
    if config.micro_conditions:
        inputs["resolution"] = np.float32([[1024, 1024], [768, 1344], [512, 32], [64, 64]])[:batch]
        inputs["aspect_ratio"] = inputs["resolution"][:, 0] / inputs["resolution"][:, 1]
    return inputs


def run_diffusers(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """diffusers' output for the inputs of `pixart_inputs`, in the dtype of the model."""
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    extra = {"resolution": None, "aspect_ratio": None}
    if "resolution" in given:
        extra = {"resolution": given["resolution"], "aspect_ratio": given["aspect_ratio"][:, None]}
    with torch.no_grad():
        out = model(
            given["x"].to(model.dtype),
            encoder_hidden_states=given["caption"].to(model.dtype),
            timestep=given["timestep"],
            added_cond_kwargs=extra,
            encoder_attention_mask=given["caption_mask"],
        )
    return out.sample.float().numpy()


def original_names(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """diffusers' state dict under the names of the original network."""
    state = dict(state)
    renamed = {}

    def move(ours, *theirs):
        for end in (".weight", ".bias"):
            renamed[ours + end] = torch.cat([state.pop(name + end) for name in theirs])

    move("x_embedder.proj", "pos_embed.proj")
    embedders = {"t_embedder": "timestep"}
    if config.micro_conditions:
        embedders |= {"csize_embedder": "resolution", "ar_embedder": "aspect_ratio"}
    for ours, theirs in embedders.items():
        move(f"{ours}.mlp.0", f"adaln_single.emb.{theirs}_embedder.linear_1")
        move(f"{ours}.mlp.2", f"adaln_single.emb.{theirs}_embedder.linear_2")
    move("t_block.1", "adaln_single.linear")
    move("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    move("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    move("final_layer.linear", "proj_out")
    renamed["final_layer.scale_shift_table"] = state.pop("scale_shift_table")
    for i in range(config.depth):
        a, b = f"blocks.{i}", f"transformer_blocks.{i}"
        renamed[f"{a}.scale_shift_table"] = state.pop(f"{b}.scale_shift_table")
        move(f"{a}.attn.qkv", f"{b}.attn1.to_q", f"{b}.attn1.to_k", f"{b}.attn1.to_v")
        move(f"{a}.attn.proj", f"{b}.attn1.to_out.0")
        move(f"{a}.cross_attn.q_linear", f"{b}.attn2.to_q")
        move(f"{a}.cross_attn.kv_linear", f"{b}.attn2.to_k", f"{b}.attn2.to_v")
        move(f"{a}.cross_attn.proj", f"{b}.attn2.to_out.0")
        move(f"{a}.mlp.fc1", f"{b}.ff.net.0.proj")
        move(f"{a}.mlp.fc2", f"{b}.ff.net.2")
    if state:
        raise ValueError(f"no place for {sorted(state)}")
    return renamed


def pixart_params(state: dict[str, torch.Tensor], config) -> dict:
    """Our parameter tree from a state dict with the original names."""
    state = {name: tensor.numpy() for name, tensor in state.items()}

    def linear(name):
        weight, bias = state.pop(f"{name}.weight"), state.pop(f"{name}.bias")
        return {"kernel": weight.reshape(len(weight), -1).T, "bias": bias}

    def linears(prefix, *names):
        return {name: linear(f"{prefix}.{name}") for name in names}

    def embedder(name):
        return {"in_layer": linear(f"{name}.mlp.0"), "out_layer": linear(f"{name}.mlp.2")}

    def block(i):
        b = f"blocks.{i}"
        attn = linears(f"{b}.attn", "qkv", "proj")
        if i in config.compressed_layers:
            attn["sr"] = {end: state.pop(f"{b}.attn.sr.{end}") for end in ("weight", "bias")}
            scale, bias = (state.pop(f"{b}.attn.norm.{end}") for end in ("weight", "bias"))
            attn["norm"] = {"scale": scale, "bias": bias}
        return {
            "scale_shift_table": state.pop(f"{b}.scale_shift_table"),
            "attn": attn,
            "cross_attn": linears(f"{b}.cross_attn", "q_linear", "kv_linear", "proj"),
            "mlp": linears(f"{b}.mlp", "fc1", "fc2"),
        }

    embedders = ["t_embedder"]
    embedders += ["csize_embedder", "ar_embedder"] if config.micro_conditions else []
    caption = {"y_proj": linears("y_embedder.y_proj", "fc1", "fc2")}
    if config.null_caption_length:
        caption["y_embedding"] = state.pop("y_embedder.y_embedding")
    params = {
        "x_embedder": linears("x_embedder", "proj"),
        **{name: embedder(name) for name in embedders},
        "t_block": linear("t_block.1"),
        "y_embedder": caption,
        "blocks": _stacked([block(i) for i in range(config.depth)]),
        "final_layer": {
            **linears("final_layer", "linear"),
            "scale_shift_table": state.pop("final_layer.scale_shift_table"),
        },
    }
    if state:
        raise ValueError(f"no place for {sorted(state)}")
    return params


def _stacked(blocks: list[dict]) -> dict:
    """Blocks in runs of equal structure, by the number of the first."""
    runs: dict[int, list[dict]] = {}
    for i, block in enumerate(blocks):
        alike = i > 0 and jax.tree.structure(block) == jax.tree.structure(blocks[i - 1])
        first = max(runs) if alike else i
        runs.setdefault(first, []).append(block)
    stack = lambda *leaves: np.stack(leaves)  # noqa: E731
    return {str(first): jax.tree.map(stack, *run) for first, run in runs.items()}


def run_original(state: dict[str, torch.Tensor], config, inputs: dict[str, np.ndarray]):
    """The original network's output, in float64 but for its sinusoids' angles.

    As published: padding is taken out of the captions, so each picture attends to its own tokens
    alone; positions are computed for the picture's size; keys and values of compressed layers pass
    a strided convolution and a LayerNorm.
    """
    with torch.no_grad():
        network = _Original({name: tensor.double() for name, tensor in state.items()}, config)
        return network({name: torch.tensor(value) for name, value in inputs.items()}).numpy()


class _Original:
    def __init__(self, state, config):
        self.state, self.config = state, config

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def embed(self, name, numbers):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = numbers.float()[..., None] * frequencies
        x = torch.cat([angles.cos(), angles.sin()], dim=-1).double()
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", x)))

    def gelu_mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def positions(self, rows, columns):
        config = self.config
        base, quarter = config.sample_size // config.patch_size, config.hidden_size // 4
        omega = 1 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
        axes = [
            np.arange(n, dtype=np.float32) / (n / base) / config.interpolation
            for n in (rows, columns)
        ]
        table = np.empty((rows, columns, 4, quarter))
        for y in range(rows):
            for x in range(columns):
                across, down = axes[1][x] * omega, axes[0][y] * omega
                table[y, x] = np.sin(across), np.cos(across), np.sin(down), np.cos(down)
        return torch.tensor(table.reshape(rows * columns, -1))

    def attend(self, q, k, v):
        heads = self.config.num_heads
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return (scores @ v).transpose(1, 2).flatten(2)

    def compress(self, name, x, grid):
        """(b, t, k) -> (b, cells, k)."""
        picture = x.transpose(1, 2).unflatten(2, grid)
        weight, bias = self.state[f"{name}.sr.weight"], self.state[f"{name}.sr.bias"]
        stride = self.config.compression
        cells = F.conv2d(picture, weight, bias, stride=stride, groups=len(weight))
        norm = [self.state[f"{name}.norm.{end}"] for end in ("weight", "bias")]
        return F.layer_norm(cells.flatten(2).transpose(1, 2), (x.shape[-1],), *norm, eps=1e-5)

    def block(self, i, x, captions, mod, grid):
        name, width = f"blocks.{i}", x.shape[-1]
        table = self.state[f"{name}.scale_shift_table"]
        shift1, scale1, gate1, shift2, scale2, gate2 = (table + mod).chunk(6, dim=1)
        normed = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.linear(f"{name}.attn.qkv", normed).chunk(3, dim=-1)
        if i in self.config.compressed_layers:
            k, v = (self.compress(f"{name}.attn", part, grid) for part in (k, v))
        x = x + gate1 * self.linear(f"{name}.attn.proj", self.attend(q, k, v))
        cross = f"{name}.cross_attn"
        q = self.linear(f"{cross}.q_linear", x)
        keys_values = [self.linear(f"{cross}.kv_linear", c).chunk(2, dim=-1) for c in captions]
        out = [self.attend(q[b : b + 1], k[None], v[None]) for b, (k, v) in enumerate(keys_values)]
        x = x + self.linear(f"{cross}.proj", torch.cat(out))
        normed = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.gelu_mlp(f"{name}.mlp", normed)

    def __call__(self, given):
        config = self.config
        p, width = config.patch_size, config.hidden_size
        weight, bias = self.state["x_embedder.proj.weight"], self.state["x_embedder.proj.bias"]
        picture = F.conv2d(given["x"].double(), weight, bias, stride=p)
        grid = picture.shape[2:]
        x = picture.flatten(2).transpose(1, 2) + self.positions(*grid)
        time = self.embed("t_embedder", given["timestep"])
        if config.micro_conditions:
            size = self.embed("csize_embedder", given["resolution"]).flatten(1)
            ratio = self.embed("ar_embedder", given["aspect_ratio"])
            time = time + torch.cat([size, ratio], dim=1)
        mod = self.linear("t_block.1", F.silu(time)).reshape(-1, 6, width)
        embedded = self.gelu_mlp("y_embedder.y_proj", given["caption"].double())
        captions = [e[m.bool()] for e, m in zip(embedded, given["caption_mask"], strict=True)]
        for i in range(config.depth):
            x = self.block(i, x, captions, mod, grid)
        table = self.state["final_layer.scale_shift_table"]
        shift, scale = (table + time[:, None]).chunk(2, dim=1)
        x = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
        out = self.linear("final_layer.linear", x).reshape(-1, *grid, p, p, config.out_channels)
        return torch.einsum("nyxpqc->ncypxq", out).flatten(2, 3).flatten(3)
