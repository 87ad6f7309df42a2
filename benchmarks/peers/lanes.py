"""The lanes of compare.py: what runs side by side, each in a process of its own."""

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


class LaneError(RuntimeError):
    """A lane cannot be started, failed, or gave no answer. One line."""


@dataclass(frozen=True)
class LaneSpec:
    name: str
    title: str
    family: str  # "encoder" or "decoder"
    program: str  # "peer" (peer.cpp) or "worker" (worker.py)
    settings: dict[str, Any] = field(default_factory=dict)
    keeps: bool = True  # decoder: a step computes one token; else the whole sequence

    @property
    def onnx(self) -> bool:
        return self.settings["lane"] == "onnxruntime"

    @property
    def ours(self) -> bool:
        return self.settings["lane"] == "ours"


def _ours(family: str) -> list[LaneSpec]:
    return [
        LaneSpec("ours" + suffix, f"LLMCache, {text}", family, "peer", {"lane": "ours", "weights": weights})
        for suffix, weights, text in (
            ("", "as-loaded", "weights as loaded"),
            ("-fp32", "packed-fp32", "packed fp32"),
            ("-fp16", "packed-fp16", "packed fp16"),
        )
    ]


def _torchscript(family: str, **settings: Any) -> list[LaneSpec]:
    frozen = "TorchScript, freeze + optimize_for_inference"
    return [
        LaneSpec("torchscript", "TorchScript, plain", family, "peer", {"lane": "plain"}, **settings),
        LaneSpec("torchscript-frozen", frozen, family, "peer", {"lane": "frozen"}, **settings),
    ]


# The first lane of a family is what the others' results are compared with.
LANES = {
    "encoder": [
        LaneSpec("transformers", "transformers", "encoder", "worker", {"lane": "transformers", "cache": False}),
        *_torchscript("encoder"),
        LaneSpec("onnxruntime", "ONNX Runtime", "encoder", "worker", {"lane": "onnxruntime", "cache": False}),
        *_ours("encoder"),
    ],
    "decoder": [
        LaneSpec(
            "transformers",
            "transformers, past_key_values",
            "decoder",
            "worker",
            {"lane": "transformers", "cache": True},
        ),
        LaneSpec(
            "transformers-nocache",
            "transformers, no cache",
            "decoder",
            "worker",
            {"lane": "transformers", "cache": False},
            keeps=False,
        ),
        LaneSpec("onnxruntime", "ONNX Runtime, with past", "decoder", "worker", {"lane": "onnxruntime", "cache": True}),
        LaneSpec(
            "onnxruntime-nocache",
            "ONNX Runtime, no past",
            "decoder",
            "worker",
            {"lane": "onnxruntime", "cache": False},
            keeps=False,
        ),
        *_torchscript("decoder", keeps=False),
        *_ours("decoder"),
    ],
}


def kilobytes(process: int) -> dict[str, int]:
    """Memory of a process in KiB, as the kernel counts it: resident now, its peak, and the proportional share (pages
    that several processes have in common, such as libraries, count a part)."""
    found = {}
    for file, names in (("status", {"VmRSS": "resident", "VmHWM": "peak"}), ("smaps_rollup", {"Pss": "proportional"})):
        for line in Path(f"/proc/{process}/{file}").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in names:
                found[names[key]] = int(value.split()[0])
    return found


class Lane:
    """A running lane. Requests that fail raise LaneError, with the lane's name."""

    def __init__(self, spec: LaneSpec, peer: Path, threads: int, timeout: float) -> None:
        self.spec = spec
        self.timeout = timeout
        command = (
            [str(peer)]
            if spec.program == "peer"
            else [
                sys.executable,
                str(HERE / "worker.py"),
                spec.settings["lane"],
            ]
        )
        # ONNX Runtime has threads of its own; the others take this.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
            )
        except OSError as error:
            raise LaneError(f"{spec.name}: {command[0]} cannot be started ({error.strerror})") from error
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
            raise LaneError(f"{self.spec.name}: {self.ending()}") from error
        return self.receive()

    def receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise LaneError(f"{self.spec.name}: no answer in {self.timeout:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                raise LaneError(f"{self.spec.name}: {self.ending()}")
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise LaneError(f"{self.spec.name}: its answer is no JSON: {line[:100]!r}") from error
        if "error" in answer:
            raise LaneError(f"{self.spec.name}: {answer['error']}")
        return answer

    def ending(self) -> str:
        try:
            return f"its process ended (status {self.process.wait(5)})"
        except subprocess.TimeoutExpired:
            return "its process no longer answers"

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
