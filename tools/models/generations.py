"""What an encoder-decoder itself generates (greedily, and by beam search), for tests to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

NEW_TOKENS = 8
BEAMS = 3


def generations(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Generates NEW_TOKENS for each row. The end token is never chosen, and no token twice: random weights like repeating."""
    config = model.generation_config
    for name in ("forced_eos_token_id", "forced_bos_token_id"):
        setattr(config, name, None)
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "no_repeat_ngram_size": 1}

    def run(**more: Any) -> list[list[int]]:
        return model.generate(input_ids=ids, attention_mask=mask, **length, **more).tolist()

    return {
        "sources": [row[: int(real.sum())].tolist() for row, real in zip(ids, mask, strict=True)],
        "end": config.eos_token_id,
        "beams": BEAMS,
        "greedy": run(num_beams=1),
        "beam": run(num_beams=BEAMS, length_penalty=0.0, early_stopping=False),
    }
