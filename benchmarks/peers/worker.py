#!/usr/bin/env python3
"""A backend of compare.py in Python: one of the classes below. The protocol is that of peer.cpp; "model" is a name of
tools/models/model_list.py or a file that convert.py made, "cache" says whether keys and values are kept, and "compute"
is the library's own name of the type that it computes in. With "cache", a sequence that goes on from the one before,
such as the next turn of a conversation, costs its new tokens only.

    worker.py BACKEND    loads that library before it says that it is ready, or that it is {"unavailable": TEXT}
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Answer = dict[str, Any]
Rows = list[list[int]]


def padded(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The ids, and the mask that tells them from the padding on the right."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def weights_of(file: str) -> str:
    path = Path(file)
    return json.loads(path.with_name(f"{path.stem}.json").read_text(encoding="utf-8"))["weights"]


class Backend:
    """`prepare` makes the arguments of `call`, which is timed; `finish` makes an array of what it returned: all of the
    output, or with `last` the logits of the last token. `prepare` is told how many tokens are `new`, the others being
    in the cache; None for an encoder."""

    libraries: tuple[str, ...] = ()
    note = ""
    own_ms: float | None = None  # set by call(): the library's own time, instead of that of the call

    def __init__(self, request: Answer) -> None:
        self.cache: bool = request["cache"]
        self.source: list[int] = []  # of an encoder-decoder


class Transformers(Backend):
    libraries = ("torch", "transformers.cache_utils", "transformers.modeling_utils")

    def __init__(self, request: Answer) -> None:
        import torch

        from tools.models.model_list import MODELS

        super().__init__(request)
        torch.set_num_interop_threads(1)
        torch.set_num_threads(request["threads"])
        self.torch = torch
        self.model, self.weights = MODELS[request["model"]].build()
        self.model.eval().requires_grad_(False)
        self.past: Any = None

    def prepare(self, rows: Rows, new: int | None) -> Answer:
        ids, mask = padded(rows)
        tensor = self.torch.from_numpy(ids)
        if new is None:
            return {"input_ids": tensor, "attention_mask": self.torch.from_numpy(mask)}
        if not self.cache:
            return {"input_ids": tensor, "use_cache": False, "logits_to_keep": 1}
        if new == tensor.shape[1]:
            self.past = None
        return {
            "input_ids": tensor[:, -new:],
            "past_key_values": self.past,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def call(self, arguments: Answer) -> Any:
        with self.torch.inference_mode():
            return self.model(**arguments)

    def finish(self, output: Any, last: bool) -> np.ndarray:
        if not last:
            return output[0].numpy()
        if self.cache:
            self.past = output.past_key_values
        return output.logits[:, -1].numpy()


class Seq2Seq(Transformers):
    """An encoder-decoder: the encoder's states are kept for the steps of a target, as generate() keeps them."""

    def prepare(self, rows: Rows, new: int | None) -> Answer:
        ids, mask = (self.torch.from_numpy(array) for array in padded([self.source]))
        target = self.torch.tensor(rows)
        if new == target.shape[1]:
            return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target, "use_cache": True}
        return {
            "encoder_outputs": self.states,
            "attention_mask": mask,
            "decoder_input_ids": target[:, -new:],
            "past_key_values": self.past,
            "use_cache": True,
        }

    def finish(self, output: Any, last: bool) -> np.ndarray:
        self.states = (output.encoder_last_hidden_state,)
        return super().finish(output, last)


class OnnxRuntime(Backend):
    libraries = ("onnxruntime",)

    def __init__(self, request: Answer) -> None:
        import onnxruntime

        super().__init__(request)
        self.onnxruntime = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = request["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = onnxruntime.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
        self.weights = weights_of(request["model"])
        self.inputs = self.session.get_inputs()
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.past: list[Any] = []

    def value(self, array: np.ndarray) -> Any:
        return self.onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def prepare(self, rows: Rows, new: int | None) -> Answer:
        array, mask = padded(rows)
        if new is not None and self.cache:
            if new == array.shape[1]:
                self.past = [
                    self.value(np.zeros((1, known.shape[1], 0, known.shape[3]), np.float32))
                    for known in self.inputs[2:]
                ]
            array = np.ascontiguousarray(array[:, -new:])
        names = [known.name for known in self.inputs]
        past = self.past if self.cache else []
        return dict(zip(names, [self.value(array), self.value(mask), *past], strict=True))

    def call(self, arguments: Answer) -> Any:
        # Keys and values stay where they are: nothing is copied between calls.
        return self.session.run_with_ort_values(self.outputs, arguments)

    def finish(self, output: Any, last: bool) -> np.ndarray:
        if last and self.cache:
            self.past = output[1:]
        array = output[0].numpy()
        return array[:, -1] if last else array


class OpenVino(Backend):
    libraries = ("openvino",)

    def __init__(self, request: Answer) -> None:
        import openvino

        super().__init__(request)
        core = openvino.Core()
        model = core.read_model(request["model"])
        if self.cache:  # keys and values become its state, as openvino's own tools export decoders
            from openvino._offline_transformations import apply_make_stateful_transformation

            shapes = {known.get_any_name(): known.get_partial_shape() for known in model.inputs}
            pasts = [name for name in shapes if name.startswith("past_")]
            for name, shape in shapes.items():
                shape[0] = 1
                if name in pasts:
                    shape[2] = -1
            model.reshape(shapes)
            pairs = {name: name.replace("past_", "present_", 1) for name in pasts}
            apply_make_stateful_transformation(model, pairs)
        compute = request["compute"]
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": request["threads"],
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": compute,
            "KV_CACHE_PRECISION": compute,  # else 8 bits
        }
        compiled = core.compile_model(model, "CPU", settings)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.note = "" if used == compute else f"computes in {used} on this CPU"
        self.run = compiled.create_infer_request()
        self.weights = weights_of(request["model"])

    def prepare(self, rows: Rows, new: int | None) -> Answer:
        ids, mask = padded(rows)
        if new is not None and self.cache:
            if new == ids.shape[1]:
                self.run.reset_state()
            ids = np.ascontiguousarray(ids[:, -new:])
        return {"input_ids": ids, "attention_mask": mask}

    def call(self, arguments: Answer) -> Any:
        self.run.infer(arguments, share_inputs=True)
        return self.run.get_output_tensor(0).data

    def finish(self, output: Any, last: bool) -> np.ndarray:
        return output[:, -1] if last else output


class CTranslate2(Backend):
    libraries = ("ctranslate2",)

    def __init__(self, request: Answer) -> None:
        import ctranslate2

        super().__init__(request)
        self.float32 = ctranslate2.DataType.float32
        self.weights = weights_of(request["model"])
        one = {"inter_threads": 1, "intra_threads": request["threads"], "compute_type": request["compute"]}
        decoder = request["family"] == "decoder"
        self.model = (ctranslate2.Generator if decoder else ctranslate2.Encoder)(request["model"], "cpu", **one)
        used = self.model.compute_type
        self.note = "" if used == request["compute"] else f"computes in {used}"

    def prepare(self, rows: Rows, new: int | None) -> Rows:
        return rows

    def call(self, rows: Rows) -> Any:
        return self.model.forward_batch(rows)

    def finish(self, output: Any, last: bool) -> np.ndarray:
        array = np.array((output if last else output.last_hidden_state).to(self.float32))
        return array[:, -1] if last else array


class LlamaCpp(Backend):
    """Through the server inside the package, without HTTP: one token is asked for, and the server finds out what of
    the sequence it has already. Its time is the server's own, of the prompt: it has no JSON and no texts in it."""

    libraries = ("xllamacpp",)

    def __init__(self, request: Answer) -> None:
        import xllamacpp

        super().__init__(request)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = request["model"]
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
        parameters.n_parallel, parameters.n_ctx, parameters.warmup = 1, request["max_tokens"], False
        parameters.verbosity = -1
        self.vocab: int = request["vocab"]
        self.server = xllamacpp.Server(parameters)
        built_for = [name for name in ("AVX2", "AVX512", "AMX_INT8") if f"{name} = 1" in xllamacpp.get_system_info()]
        self.note = f"the package is built for {', '.join(built_for) or 'no such instructions'}"
        self.weights = weights_of(request["model"])

    def prepare(self, rows: Rows, new: int | None) -> Answer:
        return {"prompt": rows[0], "n_predict": 1, "temperature": 0, "n_probs": self.vocab, "cache_prompt": True}

    def call(self, arguments: Answer) -> Any:
        output = self.server.handle_completions(arguments)
        if "timings" not in output:
            raise RuntimeError(str(output)[:200])
        self.own_ms = output["timings"]["prompt_ms"]
        return output

    def finish(self, output: Any, last: bool) -> np.ndarray:
        found = output["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        array = np.full((1, self.vocab), np.nan, np.float32)
        array[0, [one["id"] for one in found]] = [one["logprob"] for one in found]
        return array


BACKENDS: dict[str, type[Backend]] = {
    "transformers": Transformers,
    "seq2seq": Seq2Seq,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "ctranslate2": CTranslate2,
    "llamacpp": LlamaCpp,
}


class Worker:
    def __init__(self, backend: type[Backend]) -> None:
        self.type = backend
        self.backend: Any = None
        self.sequence: list[int] = []

    def answer(self, request: Answer) -> Answer:
        operation = request["op"]
        if operation == "load":
            start = time.perf_counter()
            try:
                self.backend = self.type(request)
            except Exception as error:  # noqa: BLE001  whatever it is, this library does not load this model
                return {"unavailable": one_line(error)}
            ms = (time.perf_counter() - start) * 1000
            return {"load_ms": ms, "note": self.backend.note, "weights": self.backend.weights}
        if self.backend is None:
            raise RuntimeError("nothing is loaded")
        if operation == "pass":
            return self.run(request["ids"], None, request)
        if operation == "start":
            known, self.sequence = self.sequence, list(request["ids"])
            if "source" in request:
                known, self.backend.source = [], request["source"]
            goes_on = self.backend.cache and len(self.sequence) > len(known) and self.sequence[: len(known)] == known
            new = len(self.sequence) - (len(known) if goes_on else 0)
            return self.run([self.sequence], new, request) if request["run"] else {"ms": 0}
        if operation == "step":
            self.sequence.append(request["id"])
            return self.run([self.sequence], 1, request) if request["run"] else {"ms": 0}
        raise ValueError(f"no operation is called {operation}")

    def run(self, rows: Rows, new: int | None, request: Answer) -> Answer:
        arguments = self.backend.prepare(rows, new)
        start = time.perf_counter()
        output = self.backend.call(arguments)
        ms = (time.perf_counter() - start) * 1000
        array = self.backend.finish(output, last=new is not None)
        if "save" in request:
            np.ascontiguousarray(array, dtype=np.float32).tofile(request["save"])
        tokens = sum(len(row) for row in rows)
        reused = tokens - new if new is not None and self.backend.cache else 0
        return {"ms": self.backend.own_ms or ms, "tokens": tokens, "reused": reused}


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def versions() -> dict[str, str]:
    found = {}
    packages = "torch transformers onnx onnxruntime onnxscript openvino ctranslate2 xllamacpp gguf"
    for name in packages.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: list[str]) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(answer: Answer) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    backend = BACKENDS[arguments[0]]
    try:
        for library in backend.libraries:
            importlib.import_module(library)
    except ImportError as error:
        say({"unavailable": f"not installed ({error})"})
        return 0
    say({"ready": True, "versions": versions()})
    worker = Worker(backend)
    for line in sys.stdin:
        try:
            say(worker.answer(json.loads(line)))
        except Exception as error:  # noqa: BLE001  the script decides what a failed backend means
            say({"error": one_line(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
