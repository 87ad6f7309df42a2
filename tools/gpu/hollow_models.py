#!/usr/bin/env python3
"""Models for gpu_check.sh, small enough to be taken along: exported, with zeros for weights, and filled where they run.

`make FOLDER` exports BERT-base and GPT-2 in bfloat16, GPT-2 with room for long prefixes, and a small one of each; large
weights are zero, so that the files shrink to nothing once packed. `fill FOLDER` draws random weights for them. They
tell speed only, nothing about answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import sha256_of, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn

LARGE = 4096  # weights: what has fewer is kept
RANDOM = "random (seed 0)"
LONGEST = 8448  # tokens: a prefix of 8,192, and what is behind it
_SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 1024}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-bf16": ("BertModel", {"max_position_embeddings": 512}),
    "gpt2-bf16": ("GPT2LMHeadModel", {"max_position_embeddings": LONGEST}),
    "bert-small-bf16": ("BertModel", {**_SMALL, "intermediate_size": 128, "max_position_embeddings": 512}),
    "gpt2-small-bf16": ("GPT2LMHeadModel", {**_SMALL, "max_position_embeddings": 512}),
}


def build(model_class: str, settings: dict[str, Any]) -> tuple[nn.Module, str]:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, model_class).config_class(attn_implementation="sdpa", **settings)
    return getattr(transformers, model_class)(config).to(torch.bfloat16), RANDOM


def weights_of(model: torch.jit.ScriptModule) -> list[torch.Tensor]:
    return [parameter.data for parameter in model.parameters() if parameter.numel() >= LARGE]


def save(model: torch.jit.ScriptModule, path: Path, sidecar: dict[str, Any]) -> None:
    """Writes a model and what describes it."""
    import torch

    write_atomically(path, lambda part: torch.jit.save(model, str(part)))
    text = json.dumps({**sidecar, "bytes": path.stat().st_size, "sha256": sha256_of(path)}, indent=2) + "\n"
    write_atomically(path.with_suffix(".json"), lambda part: part.write_text(text, encoding="utf-8"))


def make(folder: Path, names: list[str]) -> None:
    import torch

    from tools.models.export_models import export
    from tools.models.model_list import ModelSpec

    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        model_class, settings = MODELS[name]
        family, output = ("encoder", "last_hidden_state") if model_class == "BertModel" else ("decoder", "logits")
        make_model = partial(build, model_class, settings)
        spec = ModelSpec(name, family, model_class, make_model, output=output, dtype="bfloat16")
        sidecar = export(spec, folder)
        model = torch.jit.load(str(folder / f"{name}.pt"))
        for weight in weights_of(model):
            weight.zero_()
        save(model, folder / f"{name}.pt", sidecar)
        print(f"{name}: {sidecar['parameters']:,} weights, most of them left out", flush=True)


def fill(folder: Path, names: list[str]) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    for name in names:
        path = folder / f"{name}.pt"
        model = torch.jit.load(str(path), map_location="cpu")
        for weight in weights_of(model):
            if not weight.any():  # a tied one is filled once
                weight.normal_(0, 0.02, generator=generator)
        save(model, path, json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        print(f"{name}: filled", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "fill"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS), help="of models (default: all)")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in MODELS]:
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    {"make": make, "fill": fill}[chosen.action](chosen.folder, chosen.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
