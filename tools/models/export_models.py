#!/usr/bin/env python3
"""Exports the models that tests and benchmarks use, with a JSON sidecar each.

DIR/NAME.pt, a TorchScript file, takes (input_ids, attention_mask), int64 [batch, tokens], and some models a third input
like these. Encoder-decoders take the ids of the target, and perhaps their mask, behind those of the source.
DIR/NAME.json describes it: "inputs" has their names, "output" what is returned. The sidecar is written last, and a
model counts as present only while size and SHA-256 in it match the file.
With --format pt2 the same is written as DIR/NAME.pt2, by torch.export, and DIR/NAME.pt2.json.
With --jobs N, N processes share the models; each takes about 1 GB for small ones.
The models' tokenizers go to DIR/tokenizers (tokenizer_files.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import folder_lock, sha256_of, write_atomically
from tools.models import tokenizer_files
from tools.models.generations import generations
from tools.models.model_list import GROUPS, MODELS, POOLING_MASK, VOCAB, ModelSpec
from tools.models.model_sources import RANDOM, ModelError, NoHub

if TYPE_CHECKING:
    import torch
    from torch import nn

EXPORT_VERSION = 1  # raise it when a model of the same name changes: files made before are made again


def files_of(folder: Path, name: str, file_format: str) -> tuple[Path, Path]:
    """Names the model file and its sidecar."""
    sidecar = f"{name}.json" if file_format == "pt" else f"{name}.{file_format}.json"
    return folder / f"{name}.{file_format}", folder / sidecar


def present(folder: Path, name: str, file_format: str = "pt") -> tuple[bool, str]:
    """Tells whether NAME is there, whole and up to date, and if not, why."""
    import torch
    import transformers

    model, sidecar = files_of(folder, name, file_format)
    if not sidecar.exists() or not model.exists():
        return False, "not there"
    try:
        known: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        size, digest, version = known["bytes"], known["sha256"], known["export_version"]
        versions = known["versions"]
    except (ValueError, KeyError, TypeError):
        return False, "its .json is damaged"
    if model.stat().st_size != size or sha256_of(model) != digest:
        return False, f"its {model.suffix} is not the file that its .json describes"
    if version != EXPORT_VERSION:
        return False, "made by another version of the exporter"
    if versions != {"torch": torch.__version__, "transformers": transformers.__version__}:
        return False, f"made with {versions}"
    return True, ""


def padded(vocab: int, lengths: list[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws random ids, right-padded to the longest of the given lengths, and makes their mask."""
    import torch

    ids = torch.randint(10, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def example(spec: ModelSpec, vocab: int, lengths: list[int], seed: int) -> tuple[torch.Tensor, ...]:
    """Draws inputs of the given lengths. The targets of an encoder-decoder have others."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids, mask = padded(vocab, lengths, generator)
    if spec.family == "encoder-decoder":
        target = padded(vocab, [length // 2 + 1 for length in reversed(lengths)], generator)
        return ids, mask, *target[: len(spec.inputs) - 2]
    if len(spec.inputs) == 2:
        return ids, mask
    third = torch.randint(0, 2, ids.shape, generator=generator)
    if POOLING_MASK in spec.inputs:
        third = third * mask
        third[:, 0] = 1  # each sequence has a token to pool over
    return ids, mask, third


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Lists the tensors of an output, which may be tuples and lists of them, in order."""
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in tensors_of(part)]
    return [output]


BATCHES = ([12, 9, 3], [1], [33], [1, 1])  # lengths of the rows


def verify(
    exported: nn.Module, module: nn.Module, spec: ModelSpec, vocab: int, batches: Sequence[list[int]] = BATCHES
) -> None:
    """Fails unless the exported model gives what the original gives, on shapes it was not exported with."""
    import torch

    tolerance = 3e-2 if spec.dtype == "bfloat16" else 2e-4
    for seed, lengths in enumerate(batches):
        inputs = example(spec, vocab, lengths, seed + 1)
        for got, want in zip(tensors_of(exported(*inputs)), tensors_of(module(*inputs)), strict=True):
            if got.shape != want.shape or got.dtype != want.dtype:
                raise ModelError(
                    f"traced output is {tuple(got.shape)} {got.dtype}, the model's own is "
                    f"{tuple(want.shape)} {want.dtype}, for lengths {lengths}"
                )
            if spec.how == "train":
                continue  # dropout: values differ by design
            # What padding positions hold is not defined.
            mask = inputs[3 if spec.family == "encoder-decoder" and len(inputs) > 3 else 1].bool()
            if got.dim() >= 2 and got.shape[:2] == mask.shape:
                got, want = got[mask], want[mask]
            scale = max(1.0, want.float().nan_to_num().abs().max().item())
            if not torch.allclose(got.float(), want.float(), rtol=0, atol=tolerance * scale, equal_nan=True):
                error = (got.float() - want.float()).abs().max().item()
                raise ModelError(f"traced and original model differ by {error:.2g} for lengths {lengths}")
            if spec.name != "tiny-nan" and not want.isfinite().all():
                raise ModelError(f"the model gives NaN or infinity for lengths {lengths}")


def verify_program(
    program: torch.export.ExportedProgram, module: nn.Module, spec: ModelSpec, vocab: int
) -> None:
    """The same. In Python a program refuses one row and one token: torch.export takes every size to be unlike 1, and
    says nothing of what would have been otherwise. The library runs it for them, so they are compared as well."""
    verify(program.module(), module, spec, vocab, ([12, 9, 3], [33, 20]))
    verify(program.module(check_guards=False), module, spec, vocab)


def check_attention(exported: torch.jit.ScriptModule, spec: ModelSpec) -> None:
    sites = len(exported.inlined_graph.findAllNodes("aten::scaled_dot_product_attention"))
    if (sites > 0) != (spec.attention == "sdpa"):
        raise ModelError(f"listed as {spec.attention}, but scaled_dot_product_attention is called {sites} times")


def convert(spec: ModelSpec, module: nn.Module, vocab: int) -> nn.Module:
    """The model as TorchScript."""
    import torch

    module.train(spec.how == "train")
    module.requires_grad_(False)
    if spec.how == "script":
        return torch.jit.script(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings: verify() decides instead
        traced = torch.jit.trace(module, example(spec, vocab, [7, 5], 0), strict=False, check_trace=False)
    return torch.jit.freeze(traced) if spec.how == "freeze" else traced


def convert_to_program(spec: ModelSpec, module: nn.Module, vocab: int) -> torch.export.ExportedProgram:
    """The model as an exported program, with any number of rows and tokens.

    The example has unlike many of them, at least two each: of a size of 0 or 1 torch.export makes a constant, and two
    sizes that are equal may become one. Non-strict export runs the model in Python, so that any Python will do.
    """
    import torch

    module.train(spec.how == "train")
    module.requires_grad_(False)
    inputs = example(spec, vocab, [7, 5, 4], 0)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple({0: dynamic, 1: dynamic} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:  # where in which file: names of folders are nobody's business
        node.meta.pop("stack_trace", None)
    return program


def describe(spec: ModelSpec, model: nn.Module, weights: str, file: Path) -> dict[str, Any]:
    import torch
    import transformers

    config = getattr(model, "config", None)

    def setting(*names: str, default: int) -> int:
        found = (getattr(config, name, None) for name in names)
        return int(next((value for value in found if isinstance(value, int) and value > 0), default))

    layers = len(model.layers) if hasattr(model, "layers") else 0
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "family": spec.family,
        "weights": weights,
        "tokenizer": spec.tokenizer,
        "attention": spec.attention,
        "dtype": spec.dtype,
        "hidden": setting("hidden_size", "dim", "d_model", "n_embd", default=64),
        "layers": setting("num_hidden_layers", "num_layers", "n_layers", "n_layer", default=layers),
        "heads": setting("num_attention_heads", "num_heads", "n_heads", "n_head", default=4 if layers else 0),
        "vocab": setting("vocab_size", default=VOCAB),
        "max_tokens": setting("max_position_embeddings", "n_positions", default=256),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "inputs": list(spec.inputs),
        "output": spec.output,
        "export_version": EXPORT_VERSION,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": sha256_of(file),
        "bytes": file.stat().st_size,
    }


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes to `path` whatever it ends in."""
    import torch

    with path.open("wb") as file:
        torch.export.save(program, file)


def export(spec: ModelSpec, folder: Path, file_format: str = "pt") -> dict[str, Any]:
    import torch

    from tools.models.wrappers import wrap

    model, weights = spec.build()
    vocab = getattr(getattr(model, "config", None), "vocab_size", VOCAB)
    module = wrap(model, spec)
    target, sidecar = files_of(folder, spec.name, file_format)
    with torch.no_grad():
        if file_format == "pt":
            scripted = convert(spec, module, vocab)
            check_attention(scripted, spec)
            verify(scripted, module, spec, vocab)
            save: Callable[[Path], object] = lambda path: torch.jit.save(scripted, str(path))  # noqa: E731
        else:
            program = convert_to_program(spec, module, vocab)
            verify_program(program, module, spec, vocab)
            save = lambda path: save_program(program, path)  # noqa: E731
        sidecar.unlink(missing_ok=True)
        write_atomically(target, save)
        generated = {}
        if spec.family == "encoder-decoder" and spec.dtype == "float32" and spec.group == "tiny":
            ids, mask, *_ = example(spec, vocab, [11, 6], 3)
            generated = {"generations": generations(model, ids, mask)}
    description = {**describe(spec, model, weights, target), **generated}
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(sidecar, lambda path: path.write_text(text, encoding="utf-8"))
    return description


def chosen(names: list[str] | None) -> list[ModelSpec]:
    if not names:
        return list(MODELS.values())
    picked: dict[str, ModelSpec] = {}
    for name in names:
        wanted = [name] if name in MODELS else [n for n, spec in MODELS.items() if name in spec.groups]
        if not wanted:
            raise ModelError(
                f"no model or group is called '{name}'; --list shows the names, the groups are {', '.join(GROUPS)}"
            )
        picked.update((n, MODELS[n]) for n in wanted)
    return list(picked.values())


@dataclass
class Run:
    """One call of the program: what is written where, and what became of it."""

    folder: Path
    force: bool
    file_format: str = "pt"
    jobs: int = 1
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def attempt(self, name: str, make: Callable[[], str]) -> None:
        """One failure does not stop the others. `make` says what it made."""
        try:
            print(f"{name}: {make()}", flush=True)
        except NoHub as error:
            self.left_out.append(name)
            print(f"{name}: left out: {error}, and random weights of it would say nothing", flush=True)
        except Exception as error:  # noqa: BLE001
            self.failed.append(name)
            print(f"{name}: FAILED: {type(error).__name__}: {str(error)[:1500]}", file=sys.stderr, flush=True)

    def model(self, spec: ModelSpec) -> None:
        there, why = present(self.folder, spec.name, self.file_format)
        if there and not self.force:
            print(f"{spec.name}: already there, skipped", flush=True)
            return
        started = time.monotonic()

        def make() -> str:
            known = export(spec, self.folder, self.file_format)
            note = RANDOM + " weights" if known["weights"] == RANDOM else known["weights"]
            again = "" if why == "not there" else f" (again: {why or '--force'})"
            return f"{known['bytes'] / 1e6:.1f} MB, {note}, {time.monotonic() - started:.1f} s{again}"

        self.attempt(spec.name, make)

    def tokenizer(self, name: str) -> None:
        if self.force or not tokenizer_files.present(self.folder / "tokenizers" / name):
            self.attempt(f"tokenizer {name}", lambda: tokenizer_files.write(self.folder, name))

    def side_by_side(self, specs: list[ModelSpec]) -> None:
        """Each process begins afresh, as torch must not be forked, and takes the next model when it is done with one."""
        alone = Run(self.folder, self.force, self.file_format)
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), quiet_libraries) as processes:
            for run in processes.map(alone.with_model, [spec.name for spec in specs]):
                self.failed += run.failed
                self.left_out += run.left_out

    def with_model(self, name: str) -> Run:
        """What became of this model alone."""
        import torch

        torch.set_num_threads(1)
        run = Run(self.folder, self.force, self.file_format)
        run.model(MODELS[name])
        return run

    def all(self, specs: list[ModelSpec]) -> int:
        with folder_lock(self.folder):
            if self.jobs > 1:
                self.side_by_side(specs)
            else:
                for spec in specs:
                    self.model(spec)
            made = len(specs) - len(self.failed) - len(self.left_out)
            for name in dict.fromkeys(spec.tokenizer for spec in specs):
                self.tokenizer(name)
        processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak = max(resource.getrusage(who).ru_maxrss for who in processes) / 1e6
        print(f"{made} of {len(specs)} models in {self.folder} (peak memory of a process {peak:.1f} GB)")
        if self.failed:
            print(f"failed: {', '.join(self.failed)}; see the messages above", file=sys.stderr)
        return 1 if self.failed else 0


def quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit is deprecated: we know


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the models go")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"models or groups ({', '.join(GROUPS)})")
    parser.add_argument(
        "--format", choices=("pt", "pt2"), default="pt", help="TorchScript (pt), or a program of torch.export (pt2)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--force", action="store_true", help="export again what is already there")
    options = parser.parse_args(arguments)
    try:
        specs = chosen(options.only)
    except ModelError as error:
        parser.error(str(error))
    if options.list:
        for spec in specs:
            print(f"{spec.name:24} {spec.group:6} {spec.family:15} {spec.attention:6} {spec.architecture}")
        return 0
    if options.out is None:
        parser.error("--out DIR is missing")
    quiet_libraries()
    return Run(options.out, options.force, options.format, options.jobs).all(specs)


if __name__ == "__main__":
    sys.exit(main())
