#!/usr/bin/env python3
"""Fits the linear probes that turn a sentence embedding into a class: they show what a cache does to answers.

For each workload of task "classification" it runs the exported model on every text of the token file
DATA/WORKLOAD.TOKENIZER.safetensors, without any cache, and fits a multinomial logistic regression with an L2
penalty on the fill part (the training split), or on the first requests of it: a classifier is surer of the texts that
it was fitted on than of others, so an error budget must be calibrated on requests of the fill part behind those. The
asking part (the test split) is only measured. A model that takes a pooling mask gets the file's `pool`; without --only
it gets probes for the workloads that have one. Writes DATA/WORKLOAD.MODEL.probe.safetensors, which
benchmarks/linear_probe.h describes.

A probe that is whole and was made from the same model, tokens and code is left as it is. A workload without
token file (no raw data) is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import folder_lock, sha256_of
from tools.data import token_file
from tools.data.raw_files import DataError
from tools.data.workloads import WORKLOADS
from tools.models.model_list import POOLING_MASK
from tools.models.model_sources import ModelError

PROBE_VERSION = "2"
MODELS = ("minilm-pooled", "minilm-pooled-mask")
NAMES = tuple(name for name, workload in WORKLOADS.items() if workload.task == "classification")
OUT_OF_SCOPE = "oos"  # CLINC150's class of queries without an intent: 1 % of its training split, 18 % of its test split
BATCH = 16  # queries of one length at once: large enough for full speed on a core, small enough for its cache
L2 = 1e-3  # penalty on standardised embeddings; 1e-2 to 1e-5 differ by a point at most on a tenth held out
L2_FOR_FEW = (1e-3, 1e-2, 1e-1)  # of these one is chosen where only a part of the fill part is used
HELD_OUT = 0.25  # share of the texts that choose it
STEPS = 100  # of L-BFGS at most


@dataclass(frozen=True)
class Queries:
    """The labelled texts of a token file."""

    ids: list[np.ndarray]
    pools: list[np.ndarray]  # for each text, 1 where it is pooled: at all tokens, if the file has no `pool`
    has_pool: bool
    labels: np.ndarray
    requests: np.ndarray  # first text of each request, and the number of texts
    fill: int  # the first that many requests fill
    classes: list[str]
    content: str  # digest

    @property
    def train(self) -> int:
        """That many texts, the first ones, fill."""
        return int(self.requests[self.fill])


def embed(
    model: torch.jit.ScriptModule, queries: list[np.ndarray], pools: list[np.ndarray] | None = None
) -> torch.Tensor:
    """float32 [queries, dims], in the order given; queries of equal length run together, so nothing is padded.

    Where pools are given, they are the model's third input."""
    by_length: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        by_length.setdefault(len(query), []).append(number)
    embedded: list[tuple[list[int], torch.Tensor]] = []
    with torch.inference_mode():
        for _, numbers in sorted(by_length.items()):
            for start in range(0, len(numbers), BATCH):
                some = numbers[start : start + BATCH]
                ids, *pooling = (
                    torch.from_numpy(np.stack([rows[number] for number in some]).astype(np.int64))
                    for rows in ((queries,) if pools is None else (queries, pools))
                )
                embedded.append((some, model(ids, torch.ones_like(ids), *pooling)))
    first = embedded[0][1]
    if not isinstance(first, torch.Tensor) or first.dim() != 2:
        raise ModelError("the model's output is not one embedding [batch, dims] for each query; use a pooled model")
    result = torch.empty(len(queries), first.size(1), dtype=torch.float32)
    for some, rows in embedded:
        result[some] = rows
    if not result.isfinite().all():
        raise ModelError("the model gives NaN or infinite embeddings; export it again")
    return result


def fit(rows: torch.Tensor, labels: torch.Tensor, classes: int, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [classes, dims] and bias [classes] of the minimum of mean cross-entropy + l2 / 2 * |weight|^2, on
    embeddings shifted to mean 0 and scaled to mean square 1; the result is for embeddings as they are."""
    mean = rows.mean(0)
    scale = (rows - mean).square().mean().sqrt().clamp(min=1e-12)
    inputs = (rows - mean) / scale
    weight = torch.zeros(classes, rows.size(1), dtype=rows.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=rows.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = cross_entropy(inputs @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ mean


def accuracy(rows: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    return (rows @ weight.T + bias).argmax(1).eq(labels).double().mean().item()


def chosen_l2(rows: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Chooses the penalty of L2_FOR_FEW with the best accuracy on the last of the texts, fitted on the others."""
    kept = max(1, round((1 - HELD_OUT) * len(rows)))

    def held_out(l2: float) -> float:
        return accuracy(rows[kept:], labels[kept:], *fit(rows[:kept], labels[:kept], classes, l2))

    return max(L2_FOR_FEW, key=held_out)


def read_queries(path: Path) -> Queries:
    loaded = token_file.load(path)
    if loaded is None:
        raise DataError(f"{path} is damaged; run prepare_data.py again")
    arrays, metadata = loaded
    try:
        classes = json.loads(metadata["label_names"])
        fill, labels, offsets = int(metadata["fill_requests"]), arrays["labels"], arrays["sequence_offsets"]
        requests = arrays["request_offsets"]
        train = int(requests[fill])
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path} holds no labelled queries ({error}); run prepare_data.py again") from error
    ids = np.split(arrays["tokens"], offsets[1:-1])
    if not 0 < train < len(ids):
        raise DataError(f"{path} has {train} training queries of {len(ids)}; both splits must have some")
    if len(labels) != len(ids):
        raise DataError(f"{path} has {len(labels)} labels for {len(ids)} queries; run prepare_data.py again")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{path} has labels outside 0 to {len(classes) - 1}; run prepare_data.py again")
    pool = arrays.get("pool", np.ones(len(arrays["tokens"]), dtype=np.int64))
    if len(pool) != len(arrays["tokens"]):
        raise DataError(f"{path} has {len(pool)} entries of pool for {len(arrays['tokens'])} tokens; prepare it again")
    pools = np.split(pool, offsets[1:-1])
    return Queries(ids, pools, "pool" in arrays, labels, requests, fill, classes, metadata["content_sha256"])


def load_probe(path: Path) -> dict[str, str] | None:
    """Reads the metadata of a probe. The result is None if it is missing, damaged or not a probe."""
    loaded = token_file.load(path)
    if loaded is None:
        return None
    arrays, metadata = loaded
    whole = set(arrays) == {"weight", "bias"} and metadata.get("version") == PROBE_VERSION
    return metadata if whole else None


def make_probe(workload: str, model_file: Path, pooling: bool, tokens: Path, queries: Queries, share: float) -> None:
    """Fits on the first `share` of the requests that fill."""
    target = tokens.with_name(f"{workload}.{model_file.stem}.probe.safetensors")
    digest, code = sha256_of(model_file), sha256_of(Path(__file__))
    recipe = hashlib.sha256(f"{digest} {queries.content} {share} {code} {torch.__version__}".encode()).hexdigest()
    if (load_probe(target) or {}).get("recipe") == recipe:
        print(f"{target.name}: already there, skipped", flush=True)
        return
    started = time.monotonic()
    rows = embed_all(model_file, pooling, tokens, queries)
    embedded = time.monotonic()
    labels = torch.from_numpy(queries.labels)
    fitted, train = int(queries.requests[max(1, round(share * queries.fill))]), queries.train
    known = rows[:fitted], labels[:fitted]
    l2 = L2 if fitted == train else chosen_l2(*known, len(queries.classes))
    weight, bias = fit(*known, len(queries.classes), l2)
    on_train = accuracy(*known, weight, bias)
    on_test = accuracy(rows[train:], labels[train:], weight, bias)
    metadata = {
        "version": PROBE_VERSION,
        "workload": workload,
        "model": model_file.stem,
        "model_sha256": digest,
        "classes": json.dumps(queries.classes),
        "fit_sequences": str(fitted),
        "train_accuracy": f"{on_train:.6f}",
        "test_accuracy": f"{on_test:.6f}",
        "l2": repr(l2),
        "recipe": recipe,
    }
    token_file.save(target, {"weight": weight.contiguous().numpy(), "bias": bias.numpy()}, metadata)
    print(
        f"{target.name}: {len(queries.classes)} classes, accuracy {100 * on_train:.2f} % on {fitted} training queries, "
        f"{100 * on_test:.2f} % on {len(queries.ids) - train} test queries"
        f"{in_scope(rows[train:], labels[train:], weight, bias, queries.classes)}; embedding "
        f"{embedded - started:.0f} s, fitting {time.monotonic() - embedded:.0f} s",
        flush=True,
    )


def embed_all(model_file: Path, pooling: bool, tokens: Path, queries: Queries) -> torch.Tensor:
    try:
        model = torch.jit.load(str(model_file), map_location="cpu").eval()
    except RuntimeError as error:
        raise ModelError(f"{model_file} cannot be loaded as TorchScript; run export_models.py again") from error
    try:
        return embed(model, queries.ids, queries.pools if pooling else None)
    except ModelError:
        raise
    except (RuntimeError, torch.jit.Error) as error:
        raise ModelError(f"{model_file} does not run on {tokens.name}: {str(error)[:500]}") from error


def in_scope(
    rows: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, classes: list[str]
) -> str:
    """Says how well the queries that have an intent are classified, where some have none."""
    if OUT_OF_SCOPE not in classes:
        return ""
    inside = labels != classes.index(OUT_OF_SCOPE)
    return f" ({100 * accuracy(rows[inside], labels[inside], weight, bias):.2f} % of those in scope)"


def read_sidecar(model_file: Path) -> tuple[str, bool]:
    """Reads the name of the model's tokenizer, and whether the model takes a pooling mask."""
    sidecar = model_file.with_suffix(".json")
    try:
        known = json.loads(sidecar.read_text(encoding="utf-8"))
        return known["tokenizer"], POOLING_MASK in known.get("inputs", [])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{sidecar} does not describe a model; run export_models.py again") from error
    except OSError as error:
        raise ModelError(f"{sidecar}: {error.strerror}; run export_models.py --only {model_file.stem} first") from error


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    exported = [name for name in MODELS if (options.models / f"{name}.json").exists()]
    with folder_lock(options.data):
        for model in options.model or exported or MODELS[:1]:
            model_file = options.models / f"{model}.pt"
            tokenizer, pooling = read_sidecar(model_file)
            for workload in dict.fromkeys(options.only or NAMES):
                tokens = options.data / f"{workload}.{tokenizer}.safetensors"
                if not tokens.exists():
                    print(f"{workload}: no {tokens.name} in {options.data}, no probe", flush=True)
                    continue
                queries = read_queries(tokens)
                if options.only or queries.has_pool or not pooling:
                    share = options.fit_share or WORKLOADS[workload].fit_share
                    make_probe(workload, model_file, pooling, tokens, queries, share)


def fit_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0, 1 at most")
    return share


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, metavar="DIR", required=True, help="exported models")
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="token files; the probes go there too")
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help=f"default: those of {', '.join(MODELS)} that are exported"
    )
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", choices=NAMES, help=f"default: {', '.join(NAMES)}")
    parser.add_argument(
        "--fit-share",
        type=fit_share,
        metavar="SHARE",
        help="fit on the first SHARE (above 0, at most 1) of the requests that fill; default: as the workload says",
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default: 1, always the same result")
    try:
        run(parser.parse_args(arguments))
    except (DataError, ModelError, OSError) as error:
        print(f"fit_probe: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
