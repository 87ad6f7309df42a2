"""Small models whose form is unusual for a wrapper: the fast paths of nn.TransformerEncoder, lists of states that grow
from layer to layer, keys and values among the outputs. Each has the inputs (input_ids, attention_mask)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _spread(module: nn.Module) -> None:
    """Draws weights that are large enough to matter."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.normal_(parameter, mean=1.0 if bool(parameter.mean() > 0.5) else 0.0, std=0.05)


class Embedded(nn.Module):
    def __init__(self, vocab: int, hidden: int, max_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(max_tokens, hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        return self.tokens(input_ids) + self.positions(places).unsqueeze(0)


# --- nn.TransformerEncoder ----------------------------------------------------------------------------


class TorchEncoder(Embedded):
    """nn.TransformerEncoder as it comes; in eval mode it makes nested tensors of padded batches."""

    def __init__(self, vocab: int, hidden: int, heads: int, max_tokens: int, nested: bool = True) -> None:
        super().__init__(vocab, hidden, max_tokens)
        layer = nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested)
        _spread(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)


class PooledTorchEncoder(TorchEncoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return states[:, 0]


class TorchLayers(Embedded):
    """Its layers called one by one: no nested tensors, but one fused operator a layer."""

    def __init__(self, vocab: int, hidden: int, heads: int, max_tokens: int) -> None:
        super().__init__(vocab, hidden, max_tokens)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, batch_first=True) for _ in range(3)]
        )
        _spread(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        return x


# --- a decoder of our own, whose layers give their keys and values -------------------------------------


class DecoderLayer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, hidden))
        return x + self.down(F.gelu(self.up(x))), k, v


class Decoder(Embedded):
    def __init__(self, vocab: int, hidden: int, heads: int, max_tokens: int) -> None:
        super().__init__(vocab, hidden, max_tokens)
        self.layers = nn.ModuleList([DecoderLayer(hidden, heads) for _ in range(3)])
        self.norm = nn.LayerNorm(hidden)
        _spread(self)

    def bias(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = x.size(1)
        places = torch.arange(tokens, device=x.device)
        seen = (places.unsqueeze(1) >= places.unsqueeze(0)).to(x.dtype)
        return (1.0 - seen * attention_mask[:, None, None, :].to(x.dtype)) * -1.0e9


class KeysInPairs(Decoder):
    """(states, [(keys, values) of each layer]), as exports with use_cache=True have them."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        past: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            x, k, v = layer(x, bias)
            past.append((k, v))
        return self.norm(x), past


class KeysInATuple(Decoder):
    """(states, keys and values of each layer): one flat tuple."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        past: list[Tensor] = []
        for layer in self.layers:
            x, k, v = layer(x, bias)
            past.append(k)
            past.append(v)
        return self.norm(x), past[0], past[1], past[2], past[3], past[4], past[5]


class KeysStacked(Decoder):
    """(states, keys of all layers [layers, batch, heads, tokens, dim])."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        keys: list[Tensor] = []
        for layer in self.layers:
            x, k, _ = layer(x, bias)
            keys.append(k)
        return self.norm(x), torch.stack(keys)


class KeysOnly(Decoder):
    """What it says stands in the keys alone, which have their tokens in dimension 2."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        k = x
        for layer in self.layers:
            x, k, _ = layer(x, bias)
        return k, x.transpose(1, 2)


# --- lists of states ------------------------------------------------------------------------------------


class StatesReturned(Decoder):
    """Returns all states, in a list that starts empty."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        states: list[Tensor] = []
        for layer in self.layers:
            x, _, _ = layer(x, bias)
            states.append(x)
        return states


class StatesBeside(Decoder):
    """(last state, all of them, the embeddings first)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        states: list[Tensor] = []
        for layer in self.layers:
            states.append(x)
            x, _, _ = layer(x, bias)
        states.append(x)
        return self.norm(x), states


class StatesMixed(Decoder):
    """Returns the mean of all states."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        states: list[Tensor] = []
        for layer in self.layers:
            x, _, _ = layer(x, bias)
            states.append(x)
        return self.norm(torch.stack(states).mean(0))


class StatesAdded(Decoder):
    """The same with a new list for each layer."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        bias = self.bias(x, attention_mask)
        states: list[Tensor] = []
        for layer in self.layers:
            x, _, _ = layer(x, bias)
            states = states + [x]
        return self.norm(torch.cat(states, 2).view(x.size(0), x.size(1), 3, x.size(2)).sum(2))


class StatesFedBack(Decoder):
    """Each layer gets the last of the list, and the one before it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: list[Tensor] = []
        states.append(self.embed(input_ids))
        bias = self.bias(states[0], attention_mask)
        for layer in self.layers:
            x, _, _ = layer(states[-1], bias)
            states.append(x + 0.1 * states[0])
        return self.norm(states[-1])


class WithPast(nn.Module):
    """A decoder of transformers as it is exported with use_cache=True: (logits, ((keys, values) of each layer))."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, return_dict=True)
        return out.logits, tuple((layer.keys, layer.values) for layer in out.past_key_values.layers)
