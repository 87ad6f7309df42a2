#!/usr/bin/env python3
"""A lane of compare.py in Python: transformers or ONNX Runtime. The protocol is that of peer.cpp, which describes it;
"model" is a name of tools/model_list.py or an .onnx file, and "cache" says whether keys and values are kept.

    worker.py transformers | onnxruntime    loads that library before it says that it is ready
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

Answer = dict[str, Any]


class Transformers:
    @staticmethod
    def load_library() -> None:
        import torch  # noqa: F401
        from transformers import DynamicCache, PreTrainedModel  # noqa: F401

    def __init__(self, request: Answer) -> None:
        import torch
        from model_list import MODELS

        torch.set_num_interop_threads(1)
        torch.set_num_threads(request["threads"])
        self.torch = torch
        self.cache = request["cache"]
        self.model, self.weights = MODELS[request["model"]].build()
        self.model.eval().requires_grad_(False)
        self.past: Any = None

    def prepare(self, ids: list[list[int]], new: int | None = None) -> Answer:
        """The arguments of the call; `new`: of the last so many tokens, the others are in the cache."""
        tensor = self.torch.tensor(ids)
        if new is None:
            return {"input_ids": tensor, "attention_mask": self.torch.ones_like(tensor)}
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


class OnnxRuntime:
    @staticmethod
    def load_library() -> None:
        import onnxruntime  # noqa: F401

    def __init__(self, request: Answer) -> None:
        import onnxruntime

        self.onnxruntime = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = request["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = onnxruntime.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
        self.cache = request["cache"]
        self.weights = json.loads(Path(request["model"]).with_suffix(".json").read_text(encoding="utf-8"))["weights"]
        self.inputs = self.session.get_inputs()
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.past: list[Any] = []

    def value(self, array: np.ndarray) -> Any:
        return self.onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def prepare(self, ids: list[list[int]], new: int | None = None) -> Answer:
        array = np.array(ids, dtype=np.int64)
        mask = np.ones_like(array)
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


LANES = {"transformers": Transformers, "onnxruntime": OnnxRuntime}


class Worker:
    def __init__(self, lane: type) -> None:
        self.type = lane
        self.lane: Any = None
        self.sequence: list[int] = []

    def answer(self, request: Answer) -> Answer:
        operation = request["op"]
        if operation == "load":
            start = time.perf_counter()
            self.lane = self.type(request)
            return {"load_ms": (time.perf_counter() - start) * 1000, "note": "", "weights": self.lane.weights}
        if self.lane is None:
            raise RuntimeError("nothing is loaded")
        if operation == "pass":
            return self.run(request["ids"], None, request)
        if operation == "start":
            self.sequence = list(request["ids"])
            return self.run([self.sequence], len(self.sequence), request) if request["run"] else {"ms": 0}
        if operation == "step":
            self.sequence.append(request["id"])
            return self.run([self.sequence], 1, request) if request["run"] else {"ms": 0}
        raise ValueError(f"no operation is called {operation}")

    def run(self, ids: list[list[int]], new: int | None, request: Answer) -> Answer:
        arguments = self.lane.prepare(ids, new)
        start = time.perf_counter()
        output = self.lane.call(arguments)
        ms = (time.perf_counter() - start) * 1000
        array = self.lane.finish(output, last=new is not None)
        if "save" in request:
            np.ascontiguousarray(array, dtype=np.float32).tofile(request["save"])
        tokens = sum(len(row) for row in ids)
        return {"ms": ms, "tokens": tokens, "reused": tokens - new if new is not None and self.lane.cache else 0}


def versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("torch", "transformers", "onnx", "onnxruntime", "onnxscript"):
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

    lane = LANES[arguments[0]]
    lane.load_library()
    say({"ready": True, "versions": versions()})
    worker = Worker(lane)
    for line in sys.stdin:
        try:
            say(worker.answer(json.loads(line)))
        except Exception as error:  # noqa: BLE001  the script decides what a failed lane means
            say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
