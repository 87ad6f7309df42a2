#!/usr/bin/env python3
"""Tokenises the benchmark workloads once, with the models' own tokenizers.

Writes OUT/WORKLOAD.TOKENIZER.safetensors, which C++ can read without a tokenizer; token_file.py describes the
format.

Raw text comes from --raw, else $LLMCACHE_RAW_DATA, else from what download_data.py left in --downloaded, and what is
not there from ../shared/data beside the repository. A workload whose raw files are in none of them is left out, and
the repository's own sample stands in for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from atomic_files import folder_lock, sha256_of
from data_sources import LOCK_FILE
from model_sources import ModelError, hub_answers, minilm_folder, smollm2_file
from raw_files import DataError
from token_file import FORMAT_VERSION, Arrays, load, save
from traffic import (
    ANSWER,
    AS_IT_IS,
    ASSISTANT,
    EDIT_KINDS,
    INSTRUCTED,
    MAX_TOKENS,
    NEXT_USER,
    SYSTEM,
    USER,
    Sequence,
    Traffic,
)
from workloads import SHOTS, WORKLOADS, Workload, named, stand_in_for, with_shots

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
SCORED_TASKS = ("choice", "perplexity")  # mean nothing for an encoder, whose log-likelihoods are not defined
TOKENIZERS = ("bert-base-uncased", "gpt2", "smollm2")
GPT2_FILES = ("tokenizers/gpt2/encoder.json", "tokenizers/gpt2/vocab.bpe")
CODE = (  # files made by another version of these are made again
    "prepare_data.py",
    "workloads.py",
    "traffic.py",
    "readers.py",
    "edits.py",
    "instructions.py",
    "shared_texts.py",
    "raw_files.py",
    "token_file.py",
)
# How the turns of a conversation are marked: as the model was trained to read them, or in plain words.
PLAIN_MARKS = {
    SYSTEM: "",
    INSTRUCTED: "{}\n\n",
    USER: "User: ",
    ASSISTANT: "\nAssistant:",
    ANSWER: " ",
    NEXT_USER: "\nUser: ",
}
END_OF_TURN = "<|im_end|>"
CHAT_MARKS = {
    "smollm2": {
        SYSTEM: "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
        INSTRUCTED: "<|im_start|>system\n{}<|im_end|>\n",
        USER: "<|im_start|>user\n",
        ASSISTANT: f"{END_OF_TURN}\n<|im_start|>assistant\n",
        ANSWER: "",
        NEXT_USER: f"{END_OF_TURN}\n<|im_start|>user\n",
    }
}


@dataclass
class Tokenizer:
    """One of the three tokenizers; it is loaded when the first text comes."""

    name: str
    raw: Path | None  # the folder that has GPT2_FILES
    stand_in: str = ""  # the tokenizer whose ids are taken instead; known once it is loaded
    _loaded: Any = None

    @property
    def encoder(self) -> bool:
        return self.name == "bert-base-uncased"

    def load(self) -> Any:
        """-> a function from texts to id lists (decoders), or a `tokenizers` object (encoders)."""
        if self._loaded is None:
            self._loaded = getattr(self, "_" + self.name.split("-")[0])()
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
        if self.raw:
            from tokenizers import ByteLevelBPETokenizer

            loaded = ByteLevelBPETokenizer(*(str(self.raw / file) for file in GPT2_FILES))
            return lambda texts: [encoding.ids for encoding in loaded.encode_batch(texts, add_special_tokens=False)]
        if hub_answers("gpt2"):
            from transformers import AutoTokenizer

            hub = AutoTokenizer.from_pretrained("gpt2")
            return lambda texts: hub(texts, add_special_tokens=False)["input_ids"]
        self.stand_in = "smollm2"  # its ids are all below GPT-2's vocabulary size
        return self._smollm2()

    def encode(self, sequences: list[Sequence]) -> list[Encoded]:
        loaded = self.load()
        if self.encoder:
            texts = [first if second is None else (first, second) for first, second in (s.pair for s in sequences)]
            encodings = loaded.encode_batch(texts)
            return [
                Encoded(encoding.ids, cut=bool(encoding.overflowing), pool=pooled(encoding, sequence.pool_from))
                for encoding, sequence in zip(encodings, sequences, strict=True)
            ]
        marks = CHAT_MARKS.get(self.name, PLAIN_MARKS)
        distinct = list(dict.fromkeys(piece for sequence in sequences for piece in sequence.pieces))
        ids = dict(zip(distinct, loaded([written(piece, marks) for piece in distinct]), strict=True))
        return [join([ids[piece] for piece in s.pieces], s.shorten, s.scored) for s in sequences]

    def end_of_turn(self) -> int | None:
        """The token that ends an answer, if the model knows one."""
        return self.load()([END_OF_TURN])[0][0] if self.name in CHAT_MARKS else None


@dataclass
class Encoded:
    ids: list[int]
    scored: tuple[int, int] | None = None  # [begin, end)
    cut: bool = False  # tokens beyond MAX_TOKENS were left out
    pool: list[int] | None = None  # for each token, whether the output is read there (1) or not (0)


def written(piece: str, marks: dict[str, str]) -> str:
    if piece.startswith(ANSWER):
        return marks[ANSWER] + piece.removeprefix(ANSWER)
    if piece.startswith(INSTRUCTED):
        return marks[INSTRUCTED].format(piece.removeprefix(INSTRUCTED))
    return marks.get(piece, piece)


def pooled(encoding: Any, start: int | None) -> list[int] | None:
    """1 for the tokens of the first text from character `start` on; None without a start."""
    if start is None:
        return None
    places = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    return [int(text == 0 and begin >= start) for (begin, _), text in places]


def join(pieces: list[list[int]], shorten: int, scored: int | None) -> Encoded:
    """The pieces in a row, and where the scored one is; what is beyond MAX_TOKENS is taken off the end of one piece."""
    excess = sum(map(len, pieces)) - MAX_TOKENS
    if excess > 0 and shorten >= 0 and excess < len(pieces[shorten]):
        pieces = list(pieces)
        pieces[shorten] = pieces[shorten][: len(pieces[shorten]) - excess]
    ids = [token for piece in pieces for token in piece][:MAX_TOKENS]
    if scored is None:
        return Encoded(ids, (len(ids), len(ids)), cut=excess > 0)
    start = sum(map(len, pieces[:scored]))
    begin = min(max(start, 1), len(ids))  # the first token has no probability
    return Encoded(ids, (begin, max(begin, min(start + len(pieces[scored]), len(ids)))), cut=excess > 0)


def build(workload: Workload, tokenizer: Tokenizer, traffic: Traffic) -> tuple[Arrays, str, int]:
    """The tensors of a token file, its task, and how many of its requests fill."""
    encoded = iter(tokenizer.encode([sequence for request in traffic.requests for sequence in request.sequences]))
    task = "" if tokenizer.encoder and workload.task in SCORED_TASKS else workload.task
    arrays: dict[str, list[Any]] = {"tokens": [], "sequence_offsets": [0], "request_offsets": [0]}
    previous: list[int] = []
    original_fits = True
    fill = 0

    def add(name: str, value: Any) -> None:
        if value is not None:
            arrays.setdefault(name, []).append(value)

    for number, request in enumerate(traffic.requests):
        rows = [next(encoded) for _ in request.sequences]
        if workload.growing:
            full = len(previous) >= MAX_TOKENS and rows[0].ids == previous
            previous = rows[0].ids
            if full:
                continue
        if workload.whole:
            fits = not any(row.cut for row in rows)
            if request.sequences[0].edit_kind in (None, AS_IT_IS):
                original_fits = fits
            if not (fits and original_fits):
                continue
        if workload.prompt_tokens:
            if min(len(row.ids) for row in rows) < workload.prompt_tokens:
                continue
            rows = [Encoded(row.ids[: workload.prompt_tokens]) for row in rows]
        elif workload.new_tokens and sum(len(row.ids) + workload.new_tokens for row in rows) > MAX_TOKENS:
            continue
        for row, sequence in zip(rows, request.sequences, strict=True):
            arrays["tokens"].extend(row.ids)
            arrays["sequence_offsets"].append(len(arrays["tokens"]))
            if task in ("choice", "classification"):
                add("labels", sequence.label)
            if task in ("choice", "perplexity", "answer"):
                add("scored", row.scored)
            if task == "choice":
                add("scored_bytes", len(sequence.pieces[sequence.scored or 0].strip().encode()))
            arrays.setdefault("pool", []).extend(row.pool or [])
            add("edit_kind", EDIT_KINDS.index(sequence.edit_kind) if sequence.edit_kind else None)
            add("edit_percent", sequence.edit_percent)
        fill += number < traffic.fill
        arrays["request_offsets"].append(len(arrays["sequence_offsets"]) - 1)
        for name in ("group", "partner", "pair_label", "pair_score"):
            add(name, getattr(request, name))
    if not arrays.get("pool"):
        arrays.pop("pool", None)
    types = {"tokens": np.int32, "pair_score": np.float32, "edit_percent": np.float32}
    made = {name: np.array(values, dtype=types.get(name, np.int64)) for name, values in arrays.items()}
    return made, task, fill


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


def raw_folders(given: Path | None, downloaded: Path | None = None) -> list[tuple[Path, str]]:
    """The folders with raw data, and how each was chosen: files are looked for in the first, then in the next."""
    variable = os.environ.get("LLMCACHE_RAW_DATA")
    for path, chosen in ((given, "--raw"), (Path(variable) if variable else None, "$LLMCACHE_RAW_DATA")):
        if path is not None:
            if not path.is_dir():
                raise DataError(f"{path}, given by {chosen}, is not a folder")
            return [(path, chosen)]
    found: list[tuple[Path, str]] = []
    if downloaded and (downloaded / LOCK_FILE).is_file():
        found.append((downloaded, "downloaded"))
    beside = ROOT.parent / "shared" / "data"
    if beside.is_dir():
        found.append((beside, "found beside the repository"))
    return found


def raw_folder_of(files: tuple[str, ...], folders: list[Path]) -> Path | None:
    """The first folder that has all these files."""
    return next((folder for folder in folders if all((folder / file).exists() for file in files)), None)


def prepare(workload: Workload, tokenizer: Tokenizer, sources: list[Path], out: Path, vocab: int | None) -> None:
    path = out / f"{workload.name}.{tokenizer.name}.safetensors"
    digest = hashlib.sha256()
    for file in (*sources, *map(Path(__file__).with_name, CODE)):
        digest.update(sha256_of(file).encode())
    recipe = digest.hexdigest()
    known = load(path)
    # A stand-in is made again, in case the real tokenizer has come.
    if known and known[1].get("recipe") == recipe and "stand_in" not in known[1]:
        print(f"{path.name}: already there, skipped", flush=True)
        return
    traffic = workload.read(*sources)
    arrays, task, fill = build(workload, tokenizer, traffic)
    if not arrays["tokens"].size:
        raise DataError(f"{sources[0]}: no text in it is long enough for {workload.name}; fetch the file again")
    if vocab is not None and arrays["tokens"].max() >= vocab:
        raise DataError(
            f"{path.name}: token id {arrays['tokens'].max()} does not fit a model with a vocabulary of {vocab}"
        )
    source = ", ".join(f"data/sample/{file}" if workload.of_sample else file for file in workload.files)
    if tokenizer.stand_in:
        source += f" (token ids of {tokenizer.stand_in}, which stand in for {tokenizer.name}'s)"
    metadata = {
        "version": FORMAT_VERSION,
        "workload": workload.name,
        "tokenizer": tokenizer.name,
        "source": source,
        "description": workload.description,
        "order": workload.order,
        "max_tokens": str(MAX_TOKENS),
        "task": task,
        "fill_requests": str(fill),
        "recipe": recipe,
    }
    if tokenizer.stand_in:
        metadata["stand_in"] = tokenizer.stand_in
    if workload.new_tokens:
        metadata["new_tokens"] = str(workload.new_tokens)
        end = tokenizer.end_of_turn() if workload.conversations else None
        if end is not None:
            metadata["stop_token"] = str(end)
    if traffic.label_names:
        metadata["label_names"] = json.dumps(traffic.label_names)
    if "edit_kind" in arrays:
        metadata["edit_kinds"] = json.dumps(EDIT_KINDS)
    save(path, arrays, metadata)
    requests, sequences = len(arrays["request_offsets"]) - 1, len(arrays["sequence_offsets"]) - 1
    filling = f" ({fill} of them fill)" if fill else ""
    stand_in = f", token ids of {tokenizer.stand_in}" if tokenizer.stand_in else ""
    print(
        f"{path.name}: {requests} requests{filling}, {sequences} sequences, {arrays['tokens'].size} tokens{stand_in}",
        flush=True,
    )


def asked_for(options: argparse.Namespace) -> list[Workload]:
    default = [name for name, workload in WORKLOADS.items() if not (workload.on_request or workload.of_sample)]
    names = list(dict.fromkeys(name for given in options.only or default for name in named(given)))
    if not options.shots:
        return [WORKLOADS[name] for name in names]
    if not options.only:
        return [*(WORKLOADS[name] for name in names), with_shots(WORKLOADS[SHOTS], options.shots)]
    takes_shots = {name for name, workload in WORKLOADS.items() if workload.examples}
    asked = [
        with_shots(WORKLOADS[name], options.shots) if name in takes_shots else WORKLOADS[name] for name in names
    ]
    return asked if takes_shots & set(names) else [*asked, with_shots(WORKLOADS[SHOTS], options.shots)]


def found_or_stand_in(workload: Workload, folders: list[Path]) -> tuple[Workload, Path] | None:
    """The workload, or the sample of its kind, and where its files are; None if neither is there."""
    if workload.of_sample:
        return workload, SAMPLE
    folder = raw_folder_of(workload.files, folders)
    if folder:
        return workload, folder
    absent = [file for file in workload.files if raw_folder_of((file,), folders) is None] or workload.files
    instead = stand_in_for(workload)
    falls_back = f"the workload '{instead.name}' stands in" if instead else "left out: no sample is of its kind"
    print(f"{workload.name}: {', '.join(absent)} is not in the raw data, {falls_back}", flush=True)
    return (instead, SAMPLE) if instead else None


def run(options: argparse.Namespace) -> None:
    chosen = raw_folders(options.raw, options.downloaded)
    for folder, how in chosen:
        print(f"raw data: {folder} ({how})", flush=True)
    if not chosen:
        print("raw data: none, only the repository's sample", flush=True)
    folders = [folder for folder, _ in chosen]
    wanted = [found for workload in asked_for(options) if (found := found_or_stand_in(workload, folders))]
    if not wanted:
        raise DataError("nothing of what was asked for is there; give --raw, or fetch it: tools/run.sh data")
    vocabulary = vocabularies(options.models)
    if options.models and not vocabulary:
        raise DataError(f"no model in {options.models} uses one of {', '.join(TOKENIZERS)}; run export_models.py first")
    gpt2 = raw_folder_of(GPT2_FILES, folders)
    tokenizers = [Tokenizer(name, gpt2) for name in TOKENIZERS if not vocabulary or name in vocabulary]
    with folder_lock(options.out):
        for workload, folder in {workload.name: (workload, folder) for workload, folder in wanted}.values():
            sources = [folder / file for file in workload.files]
            for tokenizer in tokenizers:
                if not (workload.decoders_only if tokenizer.encoder else workload.encoders_only):
                    prepare(workload, tokenizer, sources, options.out, vocabulary.get(tokenizer.name))


def shot_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 99")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, metavar="DIR", help="raw data sets")
    parser.add_argument("--downloaded", type=Path, metavar="DIR", help="where download_data.py writes, if it was run")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the prepared files go")
    parser.add_argument("--models", type=Path, metavar="DIR", help="prepare only what the models there can use")
    names = sorted({*WORKLOADS, *(re.sub(r"-\d+$", "", name) for name in WORKLOADS)})
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORKLOAD",
        choices=names,
        help=f"of {', '.join(names)} [all but those for error budgets]",
    )
    parser.add_argument(
        "--shots",
        type=shot_count,
        default=0,
        metavar="N",
        help=f"{SHOTS} with N solved examples in front, the same for all questions, as the workload {SHOTS}-Nshot",
    )
    try:
        run(parser.parse_args(arguments))
    except (DataError, ModelError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
