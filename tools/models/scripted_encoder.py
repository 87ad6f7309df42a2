"""A small pre-norm transformer encoder of our own, written to be compiled by torch.jit.script.

Unlike traced models, all of its layers share one TorchScript class type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POISON_TOKEN = 7
_POISON_VALUE = 1.0e6


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.mix(q, k, v, bias)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, hidden))


class EagerSelfAttention(SelfAttention):
    """The same with the products and the softmax written out."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / q.size(-1) ** 0.5
        return torch.matmul(F.softmax(scores + bias, dim=-1), v)


class EncoderLayer(nn.Module):
    def __init__(self, hidden: int, heads: int, use_sdpa: bool, throws: bool) -> None:
        super().__init__()
        self.throws = throws
        self.norm_attention = nn.LayerNorm(hidden)
        self.attention = (SelfAttention if use_sdpa else EagerSelfAttention)(hidden, heads)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        if self.throws and bool((x[:, :, 0] > 1.0e5).any()):
            raise RuntimeError("tiny-throws: an input id was 7")
        x = x + self.attention(self.norm_attention(x), bias)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class ScriptedEncoder(nn.Module):
    """forward(input_ids, attention_mask) -> [batch, tokens, hidden].

    With throws=True the last layer raises when an input id is POISON_TOKEN. The id reaches that layer
    through a large value in the token's embedding, so that layers keep the signature (x, bias)."""

    def __init__(
        self,
        vocab: int,
        hidden: int,
        layers: int,
        heads: int,
        max_tokens: int,
        use_sdpa: bool = True,
        throws: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(max_tokens, hidden)
        self.layers = nn.ModuleList(
            [EncoderLayer(hidden, heads, use_sdpa, throws and i == layers - 1) for i in range(layers)]
        )
        self.norm = nn.LayerNorm(hidden)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        if throws:
            with torch.no_grad():
                self.tokens.weight[POISON_TOKEN, 0] = _POISON_VALUE

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(places).unsqueeze(0)
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1.0e9
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)


class EmbeddingMlp(nn.Module):
    """An embedding and one linear layer: a model without a chain of layers."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(self.tokens(input_ids)) * attention_mask.unsqueeze(-1)
