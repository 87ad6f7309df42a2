#!/usr/bin/env python3
"""Times decode steps of transformers, with past_key_values and with a static cache, for a GPT-2 of the size that the
sidecar SIDECAR.json of an exported model tells. Weights are random. One JSON object goes to standard output."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

WARM_UP = 3


def model_of(sidecar: dict[str, Any], device: str) -> nn.Module:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=sidecar["hidden"],
        n_layer=sidecar["layers"],
        n_head=sidecar["heads"],
        vocab_size=sidecar["vocab"],
        n_positions=sidecar["max_tokens"],
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, sidecar["dtype"]))
    return model.to(device).eval()


def wait_for(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def step_ms(model: nn.Module, context: int, rounds: int, device: str, past: Any) -> float:
    """Median milliseconds of a step of one token behind `context` tokens."""
    import torch

    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(10, model.config.vocab_size, (1, context + WARM_UP + rounds), generator=generator).to(device)
    model(input_ids=ids[:, :context], past_key_values=past, use_cache=True, logits_to_keep=1)
    times = []
    for place in range(context, context + WARM_UP + rounds):
        wait_for(device)
        started = time.perf_counter()
        model(input_ids=ids[:, place : place + 1], past_key_values=past, use_cache=True, logits_to_keep=1)
        wait_for(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UP:])


def attempt(measure: Callable[[], float]) -> dict[str, Any]:
    try:
        return {"ms": measure()}
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sidecar", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1000])
    chosen = parser.parse_args(arguments)

    import torch
    import transformers

    torch.set_num_threads(1)
    model = model_of(json.loads(chosen.sidecar.read_text(encoding="utf-8")), chosen.device)
    found: dict[str, Any] = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    with torch.no_grad():
        for context in chosen.contexts:
            room = context + WARM_UP + chosen.rounds
            caches: dict[str, Callable[[], Any]] = {
                "past_key_values": lambda: transformers.DynamicCache(config=model.config),
                "static_cache": lambda room=room: transformers.StaticCache(config=model.config, max_cache_len=room),
            }
            found[f"decode_at_{context}"] = {
                name: attempt(lambda c=context, m=make: step_ms(model, c, chosen.rounds, chosen.device, m()))
                for name, make in caches.items()
            }
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
