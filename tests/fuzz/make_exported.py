#!/usr/bin/env python3
"""Writes tests/fuzz/seeds/earlier/exported.pt2, a decoder of two layers as a program of torch.export, and exported.json
with what it answers. The file is never made again: every later version must open the one that is there. It has a tied
weight, a buffer, operators in place, checks, and lists of tensors.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, HIDDEN, PLACES = 16, 8, 24


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        y += x
        return y


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        self.places = nn.Embedding(PLACES, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("earlier", torch.ones(PLACES, PLACES, dtype=torch.bool).tril(), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = input_ids.size(1)
        x = self.tokens(input_ids) + self.places.weight[:tokens]
        seen = self.earlier[:tokens, :tokens] & attention_mask[:, None].to(torch.bool)
        for layer in self.layers:
            x = layer(x, seen)
        return self.head(x)


def example(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, VOCAB, mask.shape, generator=torch.Generator().manual_seed(seed))
    return ids * mask, mask


def main() -> int:
    folder = Path(__file__).parent / "seeds" / "earlier"
    if (folder / "exported.pt2").exists():
        print("it is there already, and is not made again", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    model = Decoder().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2).add_(torch.randn_like(parameter), alpha=0.1)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, example([7, 5, 4], 0), dynamic_shapes=(dynamic, dynamic), strict=False)
    for node in program.graph.nodes:
        for unneeded in ("stack_trace", "source_fn_stack", "torch_fn"):
            node.meta.pop(unneeded, None)
    program.example_inputs = None
    archive = io.BytesIO()
    torch.export.save(program, archive)
    (folder / "exported.pt2").write_bytes(archive.getvalue())
    answers = []
    for seed, lengths in enumerate(([5, 3, 2], [1], [9], [23])):
        ids, mask = example(lengths, seed + 1)
        answers.append({"ids": ids.tolist(), "mask": mask.tolist(), "output": model(ids, mask).tolist()})
    (folder / "exported.json").write_text(json.dumps(answers) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
