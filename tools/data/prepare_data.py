#!/usr/bin/env python3
"""Tokenises the benchmark workloads once, with the models' own tokenizers.

Writes OUT/WORKLOAD.TOKENIZER.safetensors, which C++ can read without a tokenizer; benchmarks/token_file.h
describes the format.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import folder_lock, sha256_of
from tools.data.raw_files import GPT2_FILES, SAMPLE, DataError, raw_folder_of, raw_folders
from tools.data.token_file import FORMAT_VERSION, Arrays, load, save
from tools.data.tokenization import TOKENIZERS, Encoded, Tokenizer
from tools.data.traffic import AS_IT_IS, EDIT_KINDS, MAX_TOKENS, Request, Sequence, Traffic
from tools.data.workloads import SHOTS, WORKLOADS, Workload, named, stand_in_for
from tools.models.model_sources import ModelError

SCORED_TASKS = ("choice", "perplexity")  # mean nothing for an encoder, whose log-likelihoods are not defined
CODE = sorted(Path(__file__).parent.glob("*.py"))  # files made by another version of these are made again


def build(workload: Workload, tokenizer: Tokenizer, traffic: Traffic) -> tuple[Arrays, str, int]:
    """Makes the tensors of a token file. It also tells the task, and how many of the requests fill."""
    task = "" if tokenizer.encoder and workload.task in SCORED_TASKS else workload.task
    arrays: dict[str, list[Any]] = {"tokens": [], "sequence_offsets": [0], "request_offsets": [0], "pool": []}
    texts: list[str] = []  # of tokens
    golds: list[str] = []
    fill = 0

    def add(entries: dict[str, Any]) -> None:
        for name, value in entries.items():
            if value is not None:
                arrays.setdefault(name, []).append(value)

    encoded = tokenizer.encode([sequence for request in traffic.requests for sequence in request.sequences])
    for number, request, rows in fitting(workload, traffic.requests, iter(encoded)):
        for row, sequence in zip(rows, request.sequences, strict=True):
            arrays["tokens"].extend(row.ids)
            arrays["sequence_offsets"].append(len(arrays["tokens"]))
            arrays["pool"].extend(row.pool or [])
            add(entries_of(task, row, sequence))
            if row.passage:
                texts.extend(row.passage.texts)
                golds.append("".join(f"{answer}\n" for answer in sequence.answers or ()))
        fill += number < traffic.fill
        arrays["request_offsets"].append(len(arrays["sequence_offsets"]) - 1)
        add({name: getattr(request, name) for name in ("group", "partner", "pair_label", "pair_score")})
    if not arrays["pool"]:
        arrays.pop("pool")
    types = {"tokens": np.int32, "pair_score": np.float32, "edit_percent": np.float32}
    made = {name: np.array(values, dtype=types.get(name, np.int64)) for name, values in arrays.items()}
    if golds:
        made["token_text"], made["token_text_offsets"] = packed_texts(texts)
        made["gold"], made["gold_offsets"] = packed_texts(golds)
    return made, task, fill


def fitting(
    workload: Workload, requests: list[Request], encoded: Iterator[Encoded]
) -> Iterator[tuple[int, Request, list[Encoded]]]:
    """The requests that the workload sends, with their numbers among all: those that are not too long or too short."""
    previous: list[int] = []
    original_fits = True
    for number, request in enumerate(requests):
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
        yield number, request, rows


def entries_of(task: str, row: Encoded, sequence: Sequence) -> dict[str, Any]:
    """What a sequence adds to the arrays that have one entry for each; None where it adds nothing."""
    return {
        "labels": sequence.label if task in ("choice", "classification") else None,
        "scored": row.scored if task in ("choice", "perplexity", "answer") else None,
        "scored_bytes": len(sequence.pieces[sequence.scored or 0].strip().encode()) if task == "choice" else None,
        "passage": row.passage.tokens if row.passage else None,
        "edit_kind": EDIT_KINDS.index(sequence.edit_kind) if sequence.edit_kind else None,
        "edit_percent": sequence.edit_percent,
    }


def packed_texts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Puts the texts' bytes one after another, and tells where each begins, with the end of the last one."""
    coded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(coded), dtype=np.uint8), np.cumsum([0, *map(len, coded)], dtype=np.int64)


def prepare(workload: Workload, tokenizer: Tokenizer, sources: list[Path], out: Path) -> None:
    path = out / f"{workload.name}.{tokenizer.name}.safetensors"
    recipe = hashlib.sha256("".join(map(sha256_of, (*sources, *CODE))).encode()).hexdigest()
    known = load(path)
    # A stand-in is made again, in case the real tokenizer has come.
    if known and known[1].get("recipe") == recipe and "stand_in" not in known[1]:
        print(f"{path.name}: already there, skipped", flush=True)
        return
    traffic = workload.read(*sources)
    arrays, task, fill = build(workload, tokenizer, traffic)
    if not arrays["tokens"].size:
        raise DataError(f"{sources[0]}: no text in it is long enough for {workload.name}; fetch the file again")
    known_for_all = {"task": task, "fill_requests": str(fill), "recipe": recipe}
    save(path, arrays, known_for_all | metadata_of(workload, tokenizer, traffic, "edit_kind" in arrays))
    requests, sequences = len(arrays["request_offsets"]) - 1, len(arrays["sequence_offsets"]) - 1
    filling = f" ({fill} of them fill)" if fill else ""
    stand_in = f", token ids of {tokenizer.stand_in}" if tokenizer.stand_in else ""
    print(
        f"{path.name}: {requests} requests{filling}, {sequences} sequences, {arrays['tokens'].size} tokens{stand_in}",
        flush=True,
    )


def metadata_of(workload: Workload, tokenizer: Tokenizer, traffic: Traffic, edited: bool) -> dict[str, str]:
    source = ", ".join(f"data/sample/{file}" if workload.of_sample else file for file in workload.files)
    if tokenizer.stand_in:
        source += f" (token ids of {tokenizer.stand_in}, which stand in for {tokenizer.name}'s)"
    end = tokenizer.end_of_turn() if workload.new_tokens and workload.conversations else None
    found = {
        "version": FORMAT_VERSION,
        "workload": workload.name,
        "tokenizer": tokenizer.name,
        "source": source,
        "description": workload.description,
        "order": workload.order,
        "max_tokens": str(MAX_TOKENS),
        "stand_in": tokenizer.stand_in or None,
        "new_tokens": str(workload.new_tokens) if workload.new_tokens else None,
        "stop_token": None if end is None else str(end),
        "label_names": json.dumps(traffic.label_names) if traffic.label_names else None,
        "edit_kinds": json.dumps(EDIT_KINDS) if edited else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def asked_for(options: argparse.Namespace) -> list[Workload]:
    default = [name for name, workload in WORKLOADS.items() if not (workload.on_request or workload.of_sample)]
    return list({workload.name: workload for given in options.only or default for workload in named(given)}.values())


def found_or_stand_in(workload: Workload, folders: list[Path]) -> tuple[Workload, Path] | None:
    """Finds the workload, or the sample of its kind, and where its files are. The result is None if neither is there."""
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
    gpt2 = raw_folder_of(GPT2_FILES, folders)
    tokenizers = [Tokenizer(name, gpt2) for name in options.tokenizer]
    with folder_lock(options.out):
        for workload, folder in {workload.name: (workload, folder) for workload, folder in wanted}.values():
            sources = [folder / file for file in workload.files]
            for tokenizer in tokenizers:
                if not (workload.decoders_only if tokenizer.encoder else workload.encoders_only):
                    prepare(workload, tokenizer, sources, options.out)


def workload_name(text: str) -> str:
    if not named(text):
        raise argparse.ArgumentTypeError(f"no workload is called '{text}'")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, metavar="DIR", help="raw data sets")
    parser.add_argument("--downloaded", type=Path, metavar="DIR", help="where download_data.py writes, if it was run")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the prepared files go")
    parser.add_argument("--tokenizer", nargs="+", choices=TOKENIZERS, default=TOKENIZERS, help="for these only")
    names = sorted({*WORKLOADS, *(re.sub(r"-\d+$", "", name) for name in WORKLOADS)})
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORKLOAD",
        type=workload_name,
        help=f"of {', '.join(names)}, or {SHOTS}-Nshot, with N solved examples in front [all but those for error budgets]",
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run(parser.parse_args(arguments))
    except (DataError, ModelError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
