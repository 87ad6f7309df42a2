"""The backends of compare.py: what runs side by side, each in a process of its own."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class BackendError(RuntimeError):
    """A backend cannot be started, failed, or gave no answer. One line."""


class Unavailable(BackendError):
    """What a backend needs is not here: its package, its format of the model, this way to hold weights."""


# Largest difference from the reference, as a share of the scale, by the precision of a lane. A wrong model is off by
# more than 3 %; so are some that are quantised, whose error the tables show and the reader judges.
TOLERANCES = {"float32": 0.03, "half": 0.03, "quantised": 1.0}


@dataclass(frozen=True)
class BackendSpec:
    name: str
    title: str
    family: str  # "encoder", "decoder" or "encoder-decoder"
    program: str  # "peer" (peer.cpp) or "worker" (worker.py)
    settings: dict[str, Any] = field(default_factory=dict)
    keeps: bool = True  # decoder: a step computes one token; else the whole sequence
    kind: str = ""  # of convert.py, the file that it loads; else the exported module (peer), or the model's name
    precision: str = "float32"  # one of TOLERANCES
    log_probabilities: bool = False  # decoder: instead of logits

    @property
    def ours(self) -> bool:
        return self.settings["backend"] == "ours"


OURS = (  # suffix of the name, Options::weights, title, precision
    ("", "as-loaded", "weights as loaded", "float32"),
    ("-fp32", "packed-fp32", "packed fp32", "float32"),
    ("-fp16", "packed-fp16", "packed fp16", "half"),
    ("-bf16", "packed-bf16", "packed bf16", "half"),
    ("-int8", "packed-int8", "packed int8", "quantised"),
)


def _lanes(family: str) -> list[BackendSpec]:
    encoder = family == "encoder"
    with_past, past = ("", "") if encoder else (", with past", "-past")

    def worker(name: str, title: str, kind: str = "", cache: bool = True, **more: Any) -> BackendSpec:
        """`more`: fields of the spec, the others are settings of the backend."""
        fields = {field: more.pop(field) for field in ("precision", "log_probabilities") if field in more}
        settings = {"backend": name.partition("-")[0], "cache": cache and not encoder, **more}
        return BackendSpec(name, title, family, "worker", settings, keeps=cache or encoder, kind=kind, **fields)

    def peer(name: str, title: str, kind: str = "", precision: str = "float32", **settings: str) -> BackendSpec:
        """TorchScript computes whole sequences."""
        keeps = encoder or settings["backend"] == "ours"
        return BackendSpec(name, title, family, "peer", settings, keeps, kind, precision)

    no_cache = [
        worker("transformers-nocache", "transformers, no cache", cache=False),
        worker("onnxruntime-nocache", "ONNX Runtime, no past", "onnx", cache=False),
    ]
    llama_cpp = [
        worker(f"llamacpp-{kind}", f"llama.cpp, {kind}", f"gguf-{kind}", precision=precision, log_probabilities=True)
        for kind, precision in (("f16", "half"), ("q8_0", "quantised"), ("q4_1", "quantised"))
    ]
    return [
        worker("transformers", "transformers" + ("" if encoder else ", past_key_values")),
        worker("onnxruntime", "ONNX Runtime" + with_past, f"onnx{past}"),
        worker("onnxruntime-int8", "ONNX Runtime, int8" + with_past, f"onnx{past}-int8", precision="quantised"),
        worker("openvino", "OpenVINO, float32", f"onnx{past}", compute="f32"),
        worker("openvino-bf16", "OpenVINO, bfloat16", f"onnx{past}", compute="bf16", precision="half"),
        *([] if encoder else [*llama_cpp, *no_cache]),
        worker("ctranslate2", "CTranslate2, float32", "ctranslate2", cache=False, compute="float32"),
        worker("ctranslate2-int8", "CTranslate2, int8", "ctranslate2", False, compute="int8", precision="quantised"),
        peer("torchscript", "TorchScript, plain", backend="plain"),
        peer("torchscript-frozen", "TorchScript, freeze + optimize_for_inference", backend="frozen"),
        peer("torchscript-bf16", "TorchScript, bfloat16", "torchscript-bf16", "half", backend="plain"),
        *(
            peer("ours" + suffix, f"LLMCache, {title}", precision=precision, backend="ours", weights=weights)
            for suffix, weights, title, precision in OURS
        ),
    ]


def _lanes_of_sources() -> list[BackendSpec]:
    """Of models that compute a target from a source."""

    def peer(name: str, title: str, precision: str = "float32", keeps: bool = True, **settings: str) -> BackendSpec:
        return BackendSpec(name, title, "encoder-decoder", "peer", settings, keeps, precision=precision)

    settings = {"backend": "seq2seq", "cache": True}
    return [
        BackendSpec("transformers", "transformers, past_key_values", "encoder-decoder", "worker", settings),
        peer("torchscript", "TorchScript, plain", keeps=False, backend="plain"),
        *(
            peer("ours" + suffix, f"LLMCache, {title}", precision, backend="ours", weights=weights)
            for suffix, weights, title, precision in OURS
        ),
    ]


# The first backend of a family is what the others' results are compared with.
BACKENDS = {family: _lanes(family) for family in ("encoder", "decoder")} | {"encoder-decoder": _lanes_of_sources()}


def kilobytes(process: int) -> dict[str, int]:
    """Memory of a process in KiB, as the kernel counts it: resident now, and its peak."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    found = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(found[key].split()[0]) for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


class Backend:
    """A running backend. Requests that fail raise BackendError, with the backend's name."""

    def __init__(self, spec: BackendSpec, peer: Path, threads: int, timeout: float) -> None:
        self.spec = spec
        self.timeout = timeout
        worker = [sys.executable, str(HERE / "worker.py"), spec.settings["backend"]]
        command = [str(peer)] if spec.program == "peer" else worker
        # ONNX Runtime has threads of its own; the others take this.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
            )
        except OSError as error:
            raise BackendError(f"{spec.name}: {command[0]} cannot be started ({error.strerror})") from error
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.buffer = b""
        try:
            self.versions: dict[str, str] = self.receive()["versions"]
            self.memory_before = kilobytes(self.process.pid)
        except BaseException:
            self.close()
            raise

    def ask(self, /, **request: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise BackendError(f"{self.spec.name}: {self.ending()}") from error
        return self.receive()

    def receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise BackendError(f"{self.spec.name}: no answer in {self.timeout:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                raise BackendError(f"{self.spec.name}: {self.ending()}")
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise BackendError(f"{self.spec.name}: its answer is no JSON: {line[:100]!r}") from error
        if "unavailable" in answer:
            raise Unavailable(f"{self.spec.name}: {answer['unavailable']}")
        if "error" in answer:
            raise BackendError(f"{self.spec.name}: {answer['error']}")
        return answer

    def ending(self) -> str:
        try:
            return f"its process ended (status {self.process.wait(5)})"
        except subprocess.TimeoutExpired:
            return "its process no longer answers"

    def processor_ms(self) -> float:
        """Processor time that all of its threads have taken, as Linux counts it."""
        parts = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(part.read_text(encoding="ascii").split()[0]) for part in parts) / 1e6

    def memory(self) -> dict[str, int]:
        return kilobytes(self.process.pid)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.selector.close()
