#!/usr/bin/env python3
"""Exports one of the models of tools/model_list.py to ONNX, in a process of its own.

    onnx_export.py MODEL FILE [--past]

With --past, for a decoder: (input_ids, attention_mask, past_key_0, past_value_0, ...) -> (logits of the last token,
present_key_0, present_value_0, ...). Without: as tools/export_models.py exports it to TorchScript. Through
torch.export: what the older exporter makes of these models gives other results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from atomic_files import sha256_of, write_atomically
from model_list import MODELS, ModelSpec


def past_names(layers: int, tense: str) -> list[str]:
    return [f"{tense}_{part}_{layer}" for layer in range(layers) for part in ("key", "value")]


def past_shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, their width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width


def with_past(model: Any) -> Any:
    from torch import nn
    from transformers import DynamicCache

    class WithPast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            layers = output.past_key_values.layers
            return output.logits, *(state for layer in layers for state in (layer.keys, layer.values))

    return WithPast()


def export(spec: ModelSpec, path: Path, past: bool) -> str:
    """Returns where the weights came from."""
    import torch
    from export_models import example, wrap

    model, weights = spec.build()
    model.eval().requires_grad_(False)
    dynamic = torch.export.Dim.AUTO
    names, results = ["input_ids", "attention_mask"], ["output"]
    if past:
        layers, heads, width = past_shape(model.config)
        generator = torch.Generator().manual_seed(0)
        states = [torch.randn(2, heads, 5, width, generator=generator) for _ in range(2 * layers)]
        ids = torch.randint(10, model.config.vocab_size, (2, 3), generator=generator)
        arguments = (ids, torch.ones(2, 8, dtype=torch.long), *states)
        shapes: Any = (
            {0: dynamic, 1: dynamic},
            {0: dynamic, 1: dynamic},
            tuple({0: dynamic, 2: dynamic} for _ in states),
        )
        names, results = [*names, *past_names(layers, "past")], ["logits", *past_names(layers, "present")]
        module = with_past(model).eval()
    else:
        arguments = example(spec, model.config.vocab_size, [7, 5], 0)
        shapes = tuple({0: dynamic, 1: dynamic} for _ in arguments)
        module = wrap(model, spec).eval()
    with torch.no_grad():
        torch.onnx.export(
            module,
            arguments,
            str(path),
            input_names=names,
            output_names=results,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return weights


def recipe(model_sidecar: Path) -> dict[str, Any]:
    """What an exported file depends on, beside its name."""
    import onnx
    import onnxscript

    return {
        "code": sha256_of(Path(__file__)),
        "model": json.loads(model_sidecar.read_text(encoding="utf-8"))["sha256"],
        "versions": {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__},
    }


def present(path: Path, model_sidecar: Path) -> bool:
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return path.exists() and known.get("bytes") == path.stat().st_size and known.get("recipe") == recipe(model_sidecar)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS), metavar="MODEL")
    parser.add_argument("file", type=Path)
    parser.add_argument("--sidecar", type=Path, required=True, help="the .json beside the TorchScript model")
    parser.add_argument("--past", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    sidecar = options.file.with_suffix(".json")
    sidecar.unlink(missing_ok=True)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    weights: list[str] = []
    write_atomically(options.file, lambda path: weights.append(export(MODELS[options.model], path, options.past)))
    known = {"weights": weights[0], "bytes": options.file.stat().st_size, "recipe": recipe(options.sidecar)}
    write_atomically(sidecar, lambda path: path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
