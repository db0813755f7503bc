"""A BERT encoder on packed texts: no work is done for padding, but for attention on a CPU.

`transformers` computes the same (a test compares them); written anew because a run of a few
seconds must not spend half of them on imports, padding and checks that wait for the device.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.drift.data import Packed, Texts, upload
from benchmarks.drift.settings import Setting


@dataclass(frozen=True)
class Shape:
    """What of a BERT's config.json matters here."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    @classmethod
    def read(cls, directory: Path) -> Shape:
        config = json.loads((directory / "config.json").read_text())
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, eps = shape.hidden_size, shape.layer_norm_eps
        self.heads = shape.num_attention_heads
        self.attention_dropout = shape.attention_probs_dropout_prob
        self.qkv = nn.Linear(d, 3 * d)
        self.attended = nn.Linear(d, d)
        self.attended_norm = nn.LayerNorm(d, eps)
        self.up = nn.Linear(d, shape.intermediate_size)
        self.down = nn.Linear(shape.intermediate_size, d)
        self.norm = nn.LayerNorm(d, eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob)

    def forward(self, x: Tensor, texts: Packed) -> Tensor:
        """x: (T, d)."""
        heads = self.qkv(x).view(len(x), 3, self.heads, -1)
        dropout = self.attention_dropout if self.training else 0.0
        attend = _attend_packed if heads.is_cuda and heads.dtype == torch.bfloat16 else _attend
        q, k, v = heads.unbind(1)
        context = attend(q, k, v, texts, dropout).flatten(1)
        x = self.attended_norm(x + self.dropout(self.attended(context)))
        return self.norm(x + self.dropout(self.down(functional.gelu(self.up(x)))))


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, texts: Packed, dropout: float) -> Tensor:
    """(T, heads, d / heads) each. Flash attention by its ATen op: the public ones for packed
    texts know no dropout.
    """
    starts, longest = texts.starts, texts.longest
    return torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, dropout, False, False
    )[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, texts: Packed, dropout: float) -> Tensor:
    """The same through padding."""
    batch, t = len(texts.lengths), texts.longest
    place = texts.text * t + texts.position  # (T,) of each token in the padded (B, t)
    real = torch.arange(t, device=place.device) < texts.lengths[:, None]

    def padded(x: Tensor) -> Tensor:  # (B, heads, t, d / heads)
        rows = x.new_zeros(batch * t, *x.shape[1:]).index_copy_(0, place, x)
        return rows.unflatten(0, (batch, t)).transpose(1, 2)

    context = functional.scaled_dot_product_attention(
        padded(q), padded(k), padded(v), real[:, None, None], dropout
    )
    return context.transpose(1, 2).flatten(0, 1).index_select(0, place)


class Encoder(nn.Module):
    """Mean-pooled BERT.

    Args:
        shape: of the network.
        normalize: scale each vector to length 1.
    """

    def __init__(self, shape: Shape, normalize: bool) -> None:
        super().__init__()
        d = shape.hidden_size
        self.normalize = normalize
        self.dim = d
        self.words = nn.Embedding(shape.vocab_size, d)
        self.positions = nn.Embedding(shape.max_position_embeddings, d)
        self.segment = nn.Parameter(torch.zeros(d))
        self.norm = nn.LayerNorm(d, shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_hidden_layers))

    def forward(self, texts: Packed) -> Tensor:
        """(B, d) fp32, also under autocast."""
        batch = len(texts.lengths)
        # Not by calling nn.Embedding: its backward pass sorts the tokens, this one adds in place.
        words = self.words.weight.index_select(0, texts.tokens)
        x = words + self.positions.weight.index_select(0, texts.position) + self.segment
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, texts)
        sums = torch.zeros(batch, self.dim, device=x.device).index_add_(0, texts.text, x.float())
        pooled = sums / texts.lengths[:, None]
        return functional.normalize(pooled, dim=-1) if self.normalize else pooled

    @torch.no_grad()
    def encode(self, texts: Texts, ids: np.ndarray, bf16: bool, dropout: bool = False) -> Tensor:
        """(len(ids), d) without gradient; each text is encoded once."""
        training = self.training
        self.train(dropout)
        unique, inverse = np.unique(ids, return_inverse=True)
        device = self.words.weight.device
        found = torch.empty(len(unique), self.dim, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for places, packed in texts.chunks(unique):
                found[upload(places, device)] = self(packed)
        self.train(training)
        return found[upload(inverse.reshape(ids.shape), device)]


class Towers(nn.Module):
    """The query and the passage encoder, the same module twice when shared."""

    def __init__(self, query: Encoder, shared: bool) -> None:
        super().__init__()
        self.query = query
        self.passage = query if shared else copy.deepcopy(query)


def build(model: Path, setting: Setting) -> Towers:
    """The encoders at the start of a run, on the CPU.

    Raises:
        ValueError: the prepared model has fewer layers than the setting asks for.
    """
    shape = Shape.read(model)
    if setting.layers > shape.num_hidden_layers:
        raise ValueError(
            f"layers: {model} holds {shape.num_hidden_layers}, the setting has {setting.layers}"
        )
    values = dict(vars(shape)) | {"num_hidden_layers": setting.layers}
    if setting.dropout is not None:
        values |= dict.fromkeys(
            ("hidden_dropout_prob", "attention_probs_dropout_prob"), setting.dropout
        )
    encoder = Encoder(Shape(**values), setting.similarity == "cosine")
    if setting.start == "random":
        _initialise(encoder)
    else:
        encoder.load_state_dict(translate(load_file(model / "model.safetensors"), setting.layers))
    return Towers(encoder, setting.towers == "shared")


def _initialise(encoder: Encoder) -> None:
    """BERT's: normal of 0.02, biases zero, norms one."""
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def translate(stored: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The state of an `Encoder` from that of a transformers BertModel, in fp32."""
    names = {
        "words": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "norm": "embeddings.LayerNorm",
    }
    state = {"segment": stored["embeddings.token_type_embeddings.weight"][0]}
    for number in range(layers):
        ours, theirs = f"layers.{number}", f"encoder.layer.{number}"
        names |= {
            f"{ours}.attended": f"{theirs}.attention.output.dense",
            f"{ours}.attended_norm": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.up": f"{theirs}.intermediate.dense",
            f"{ours}.down": f"{theirs}.output.dense",
            f"{ours}.norm": f"{theirs}.output.LayerNorm",
        }
        for part in ("weight", "bias"):
            state[f"{ours}.qkv.{part}"] = torch.cat(
                [stored[f"{theirs}.attention.self.{x}.{part}"] for x in ("query", "key", "value")]
            )
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in stored:
                state[f"{ours}.{part}"] = stored[f"{theirs}.{part}"]
    return {name: value.float() for name, value in state.items()}
