#!/usr/bin/env python3
"""Tokenises the benchmark workloads once, with the models' own tokenizers.

Writes OUT/WORKLOAD.TOKENIZER.safetensors, which C++ can read without a tokenizer:
  tokens            int32 [all tokens]
  sequence_offsets  int64 [sequences + 1], into tokens
  request_offsets   int64 [requests + 1], into sequences; a request is a batch of ragged sequences
Its metadata tells workload, tokenizer, source, description, order, max_tokens and the format's version.

Raw text comes from --raw, else $LLMCACHE_RAW_DATA, else ../shared/data beside the repository. A workload
whose raw file is in none of them is left out, and the repository's own sample stands in for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from atomic_files import folder_lock, sha256_of, write_atomically
from model_sources import ModelError, hub_answers, minilm_folder, smollm2_file
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from workloads import MAX_TOKENS, WORKLOADS, DataError, Sequence, Workload

FORMAT_VERSION = "1"
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
TOKENIZERS = ("bert-base-uncased", "gpt2", "smollm2")
CODE = ("prepare_data.py", "workloads.py")  # files made by another version of these are made again


@dataclass
class Tokenizer:
    """One of the three tokenizers; it is loaded when the first text comes."""

    name: str
    raw: Path | None
    label: str = ""
    _loaded: Any = None

    @property
    def encoder(self) -> bool:
        return self.name == "bert-base-uncased"

    def load(self) -> Any:
        """-> a function from texts to id lists (decoders), or a `tokenizers` object (encoders)."""
        if self._loaded is None:
            self._loaded = getattr(self, "_" + self.name.split("-")[0])()
            self.label = self.label or self.name
        return self._loaded

    def _bert(self) -> Any:
        import tokenizers

        loaded = tokenizers.Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
        loaded.no_padding()
        loaded.enable_truncation(MAX_TOKENS, strategy="longest_first")
        return loaded

    def _smollm2(self) -> Any:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoTokenizer

        file = smollm2_file()
        loaded = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return lambda texts: loaded(texts, add_special_tokens=False)["input_ids"]

    def _gpt2(self) -> Any:
        folder = self.raw / "tokenizers" / "gpt2" if self.raw else None
        if folder and (folder / "encoder.json").exists() and (folder / "vocab.bpe").exists():
            from tokenizers import ByteLevelBPETokenizer

            loaded = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
            return lambda texts: [encoding.ids for encoding in loaded.encode_batch(texts, add_special_tokens=False)]
        if hub_answers("gpt2"):
            from transformers import AutoTokenizer

            hub = AutoTokenizer.from_pretrained("gpt2")
            return lambda texts: hub(texts, add_special_tokens=False)["input_ids"]
        self.label = "smollm2 (stands in for gpt2)"  # its ids are all below GPT-2's vocabulary size
        return self._smollm2()

    def encode(self, sequences: list[Sequence]) -> list[list[int]]:
        loaded = self.load()
        if self.encoder:
            texts = [first if second is None else (first, second) for first, second in (s.pair for s in sequences)]
            return [encoding.ids for encoding in loaded.encode_batch(texts)]
        distinct = list(dict.fromkeys(piece for sequence in sequences for piece in sequence.pieces))
        ids = dict(zip(distinct, loaded(distinct), strict=True))
        return [_join([ids[piece] for piece in s.pieces], s.shorten) for s in sequences]


def _join(pieces: list[list[int]], shorten: int) -> list[int]:
    """The pieces in a row; what is beyond MAX_TOKENS is taken off the end of one piece."""
    excess = sum(map(len, pieces)) - MAX_TOKENS
    if excess > 0:
        victim = shorten if shorten >= 0 and excess < len(pieces[shorten]) else len(pieces) - 1
        pieces = list(pieces)
        if victim != len(pieces) - 1:
            pieces[victim] = pieces[victim][: len(pieces[victim]) - excess]
    return [token for piece in pieces for token in piece][:MAX_TOKENS]


def build(workload: Workload, tokenizer: Tokenizer, source: Path) -> dict[str, np.ndarray]:
    requests = workload.read(source)
    encoded = iter(tokenizer.encode([sequence for request in requests for sequence in request]))
    tokens: list[int] = []
    sequence_offsets, request_offsets = [0], [0]
    previous: list[int] = []
    for request in requests:
        rows = [next(encoded) for _ in request]
        if workload.growing:
            full = len(previous) >= MAX_TOKENS and rows[0] == previous
            previous = rows[0]
            if full:
                continue
        for row in rows:
            tokens.extend(row)
            sequence_offsets.append(len(tokens))
        request_offsets.append(len(sequence_offsets) - 1)
    return {
        "tokens": np.array(tokens, dtype=np.int32),
        "sequence_offsets": np.array(sequence_offsets, dtype=np.int64),
        "request_offsets": np.array(request_offsets, dtype=np.int64),
    }


def content_digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("tokens", "sequence_offsets", "request_offsets"):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """What is in a prepared file, or None if it is missing, cut off or altered."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return (arrays, metadata) if metadata.get("content_sha256") == content_digest(arrays) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def vocabularies(models: Path | None) -> dict[str, int]:
    """Tokenizer -> smallest vocabulary, of the models in the folder."""
    found: dict[str, int] = {}
    for sidecar in sorted(models.glob("*.json")) if models else []:
        try:
            known = json.loads(sidecar.read_text(encoding="utf-8"))
            name, vocab = known["tokenizer"], int(known["vocab"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{sidecar} does not describe a model; run export_models.py again") from error
        if name in TOKENIZERS:
            found[name] = min(vocab, found.get(name, vocab))
    return found


def raw_folder(given: Path | None) -> tuple[Path | None, str]:
    """The folder with raw data, and how it was chosen."""
    variable = os.environ.get("LLMCACHE_RAW_DATA")
    for path, chosen in ((given, "--raw"), (Path(variable) if variable else None, "$LLMCACHE_RAW_DATA")):
        if path is not None:
            if not path.is_dir():
                raise DataError(f"{path}, given by {chosen}, is not a folder")
            return path, chosen
    beside = ROOT.parent / "shared" / "data"
    return (beside, "found beside the repository") if beside.is_dir() else (None, "")


def prepare(workload: Workload, tokenizer: Tokenizer, source: Path, out: Path, vocab: int | None) -> None:
    path = out / f"{workload.name}.{tokenizer.name}.safetensors"
    digest = hashlib.sha256(sha256_of(source).encode())
    for file in CODE:
        digest.update(sha256_of(Path(__file__).with_name(file)).encode())
    recipe = digest.hexdigest()
    known = load(path)
    # A stand-in is made again, in case the real tokenizer has come.
    if known and known[1].get("recipe") == recipe and "stands in" not in known[1]["tokenizer"]:
        print(f"{path.name}: already there, skipped", flush=True)
        return
    arrays = build(workload, tokenizer, source)
    if vocab is not None and arrays["tokens"].max() >= vocab:
        raise DataError(
            f"{path.name}: token id {arrays['tokens'].max()} does not fit a model with a vocabulary of {vocab}"
        )
    metadata = {
        "version": FORMAT_VERSION,
        "workload": workload.name,
        "tokenizer": tokenizer.label,
        "source": "data/sample/sample.jsonl" if workload.name == "sample" else workload.file,
        "description": workload.description,
        "order": workload.order,
        "max_tokens": str(MAX_TOKENS),
        "recipe": recipe,
        "content_sha256": content_digest(arrays),
    }
    write_atomically(path, lambda temporary: save_file(arrays, temporary, metadata))
    requests, sequences = len(arrays["request_offsets"]) - 1, len(arrays["sequence_offsets"]) - 1
    print(f"{path.name}: {requests} requests, {sequences} sequences, {arrays['tokens'].size} tokens", flush=True)


def run(options: argparse.Namespace) -> None:
    raw, chosen = raw_folder(options.raw)
    print(f"raw data: {raw} ({chosen})" if raw else "raw data: none, only the repository's sample", flush=True)
    names = list(dict.fromkeys(options.only or WORKLOADS))
    missing = [name for name in names if name != "sample" and not (raw and (raw / WORKLOADS[name].file).exists())]
    for name in missing:
        print(f"{name}: {WORKLOADS[name].file} is not in the raw data, falls back to the workload 'sample'", flush=True)
    if missing and "sample" not in names:
        names.append("sample")
    vocabulary = vocabularies(options.models)
    if options.models and not vocabulary:
        raise DataError(f"no model in {options.models} uses one of {', '.join(TOKENIZERS)}; run export_models.py first")
    tokenizers = [Tokenizer(name, raw) for name in TOKENIZERS if not vocabulary or name in vocabulary]
    with folder_lock(options.out):
        for name in names:
            workload = WORKLOADS[name]
            if name in missing:
                continue
            source = SAMPLE / workload.file if name == "sample" else raw / workload.file
            for tokenizer in tokenizers:
                if not (workload.decoders_only and tokenizer.encoder):
                    prepare(workload, tokenizer, source, options.out, vocabulary.get(tokenizer.name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, metavar="DIR", help="raw data sets")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the prepared files go")
    parser.add_argument("--models", type=Path, metavar="DIR", help="prepare only what the models there can use")
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", choices=list(WORKLOADS), help="default: all")
    try:
        run(parser.parse_args(arguments))
    except (DataError, ModelError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
