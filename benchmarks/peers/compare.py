#!/usr/bin/env python3
"""Runs LLMCache and what else there is for the same purpose side by side: see README.md in this folder.

Each lane is a process of its own with the same weights and number of threads. One computes at a time: every
measurement goes through all lanes, in an order that turns, before the next one begins.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tools")]

import onnx_export
from lanes import LANES, Lane, LaneError, LaneSpec
from model_list import MODELS
from table import Quality, Times, markdown_report, paired_ratio, summary, text_report

DEFAULT_MODELS = ("minilm", "bert-base", "gpt2", "smollm2")
FIRST_ID = 10  # leaves special tokens out
SETTLE = 2  # steps of a decoder, and three passes of an encoder, before the first that counts
TOLERANCE = 0.03  # of the scale: half precision stays far below, a wrong model does not
CAPACITY_MIB = 512


class CompareError(RuntimeError):
    """What was asked for cannot be done; one line, with what to do."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    build = Path(os.environ.get("LLMCACHE_BUILD_DIR", ROOT / "build"))
    parser.add_argument("--model", nargs="+", default=list(DEFAULT_MODELS), metavar="NAME", help="%(default)s")
    parser.add_argument("--lane", nargs="+", metavar="NAME", help="only these (and the reference)")
    parser.add_argument("--threads", type=int, default=1, help="of each lane (%(default)s)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 128], help="encoders (%(default)s)")
    parser.add_argument("--context", nargs="+", type=int, default=[128, 512, 1000], help="decoders (%(default)s)")
    parser.add_argument("--passes", type=int, default=21, help="of an encoder (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="sequences of a decoder (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of each of them (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few and short measurements: to see that it runs")
    parser.add_argument("--models", type=Path, default=build / "models", help="exported models (%(default)s)")
    parser.add_argument("--bin", type=Path, default=build / "bin", help="where llmcache-peer is (%(default)s)")
    parser.add_argument("--onnx", type=Path, default=build / "onnx", help="where ONNX files go (%(default)s)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one answer (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, for a README")
    parser.add_argument("--list", action="store_true", help="print the lanes and stop")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.context = [16], [32]
        options.passes, options.rounds, options.steps = 3, 1, 3
    for name in options.model:
        if name not in MODELS:
            parser.error(f"--model: no model is called '{name}'; tools/export_models.py --list shows the names")
    known = {spec.name for specs in LANES.values() for spec in specs}
    for name in options.lane or []:
        if name not in known:
            parser.error(f"--lane: no lane is called '{name}'; --list shows the names")
    numbers = ("threads", "passes", "rounds", "steps")
    if min(getattr(options, name) for name in numbers) < 1 or min(options.tokens + options.context) < 1:
        parser.error("numbers of threads, tokens and measurements must be above 0")
    return options


def chosen_lanes(family: str, names: list[str] | None, onnx: bool) -> list[LaneSpec]:
    specs = LANES[family]
    wanted = [spec for i, spec in enumerate(specs) if i == 0 or not names or spec.name in names]
    return [spec for spec in wanted if onnx or not spec.onnx]


def export_onnx(name: str, file: Path, sidecar: Path, past: bool) -> None:
    if onnx_export.present(file, sidecar):
        return
    started = time.monotonic()
    print(f"exporting {file.name} ...", flush=True)
    command = [sys.executable, HERE / "onnx_export.py", name, file, "--sidecar", sidecar]
    done = subprocess.run(
        [*map(str, command), *(["--past"] if past else [])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LaneError(f"{file.name} cannot be exported: {reason}")
    print(f"exporting {file.name}: {time.monotonic() - started:.0f} s", flush=True)


class Comparison:
    """One model: its lanes, and what they did."""

    def __init__(self, name: str, options: argparse.Namespace, scratch: Path) -> None:
        self.name, self.options, self.scratch = name, options, scratch
        self.sidecar = options.models / f"{name}.json"
        try:
            self.known = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CompareError(
                f"{self.sidecar} is missing or damaged: run tools/export_models.py --only {name}"
            ) from error
        self.decoder = self.known["family"] == "decoder"
        self.generator = np.random.default_rng(0)
        self.running: list[Lane] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.quality: dict[str, Quality] = {}
        self.versions: dict[str, str] = {}
        self.turn = 0

    def failed(self, spec: LaneSpec, error: Exception) -> None:
        print(f"  {error}", file=sys.stderr, flush=True)
        self.records[spec.name]["failed"] = str(error).removeprefix(f"{spec.name}: ")
        for lane in [lane for lane in self.running if lane.spec is spec]:
            lane.close()
            self.running.remove(lane)

    def start(self) -> None:
        onnx = importlib.util.find_spec("onnxruntime") is not None
        for spec in chosen_lanes(self.known["family"], self.options.lane, onnx):
            self.records[spec.name] = {"lane": spec.name, "title": spec.title, "ours": spec.ours}
            self.quality[spec.name] = Quality()
            try:
                self.load(spec)
            except LaneError as error:
                self.failed(spec, error)
        reference = LANES[self.known["family"]][0]
        self.records[reference.name]["reference"] = True
        if not any(lane.spec is reference for lane in self.running):
            raise CompareError(f"{self.name}: without the lane {reference.name} there is nothing to compare with")

    def load(self, spec: LaneSpec) -> None:
        settings: dict[str, Any] = {**spec.settings, "threads": self.options.threads, "capacity_mib": CAPACITY_MIB}
        settings["model"] = str(self.options.models / f"{self.name}.pt") if spec.program == "peer" else self.name
        if spec.onnx:
            past = spec.settings["cache"]
            file = self.options.onnx / f"{self.name}{'-past' if past else ''}.onnx"
            export_onnx(self.name, file, self.sidecar, past)
            settings["model"] = str(file)
        lane = Lane(spec, self.options.bin / "llmcache-peer", self.options.threads, self.options.timeout)
        self.running.append(lane)
        answer = lane.ask(op="load", **settings)
        weights = answer.get("weights", self.known["weights"])
        if weights != self.known["weights"]:
            raise LaneError(
                f"{spec.name}: its weights are {weights}, those of {self.name}.pt are {self.known['weights']}"
            )
        self.versions |= lane.versions
        record = self.records[spec.name]
        record["load_ms"], record["note"] = answer["load_ms"], answer["note"]
        print(f"  {spec.name}: loaded in {answer['load_ms'] / 1000:.1f} s", flush=True)

    def in_turn(self, lanes: list[Lane]) -> list[Lane]:
        self.turn += 1
        at = self.turn % max(1, len(lanes))
        return lanes[at:] + lanes[:at]

    def ids(self, count: int) -> list[int]:
        return self.generator.integers(FIRST_ID, self.known["vocab"], count).tolist()

    def measure(
        self, lanes: list[Lane], times: dict[str, Times] | None, number: int, compare: bool, **request: Any
    ) -> None:
        """Asks all lanes the same, one after the other. Without `times` it only warms up."""
        outputs: dict[str, np.ndarray] = {}
        for lane in self.in_turn(lanes):
            file = self.scratch / "output"
            saving = {"save": str(file)} if compare else {}
            try:
                answer = lane.ask(**request, **saving)
                if times is not None and answer["ms"] > 0:
                    times.setdefault(lane.spec.name, {})[number] = answer["ms"]
                    if request["op"] == "step":
                        share = self.records[lane.spec.name].setdefault("steps", {"tokens": 0, "reused": 0})
                        share["tokens"] += answer["tokens"]
                        share["reused"] += answer["reused"]
                if compare:
                    outputs[lane.spec.name] = np.fromfile(file, np.float32)
                    file.unlink()
            except (LaneError, OSError) as error:
                self.failed(lane.spec, error)
            if self.options.threads > 1:
                time.sleep(0.02)  # threads that wait by spinning have gone to sleep before the next lane's turn
        reference = outputs.pop(LANES[self.known["family"]][0].name, None)
        if compare and reference is None:
            raise CompareError(f"{self.name}: the reference lane failed")
        for name, output in outputs.items():
            try:
                self.quality[name].add(output, reference)
            except ValueError as error:
                self.failed(next(lane.spec for lane in self.running if lane.spec.name == name), error)

    def encode(self, tokens: int) -> dict[str, Any]:
        times: dict[str, Times] = {}
        for number in range(-SETTLE - 1, self.options.passes):
            measured = times if number >= 0 else None
            # Nothing comes twice: no lane of ours finds a whole output known.
            self.measure(self.running, measured, number, number >= 0, op="pass", ids=[self.ids(tokens)])
        return self.case(tokens, times)

    def decode(self, context: int) -> dict[str, Any]:
        times: dict[str, Times] = {}
        prefill: dict[str, Times] = {}
        for round_ in range(-1, self.options.rounds):  # the first only warms up
            warm_up = round_ < 0
            keeping = [lane for lane in self.running if lane.spec.keeps]
            others = [lane for lane in self.running if not lane.spec.keeps]
            sequence = self.ids(context)
            self.measure(keeping, None if warm_up else prefill, round_, False, op="start", ids=sequence, run=True)
            self.measure(others, None, round_, False, op="start", ids=sequence, run=False)
            steps = SETTLE if warm_up else SETTLE + self.options.steps
            for step, token in enumerate(self.ids(steps)):
                number = round_ * self.options.steps + step - SETTLE
                counts = not warm_up and step >= SETTLE
                # A lane that computes the whole sequence each time is asked twice in a round; the token is known to all.
                all_take_part = warm_up or step in (SETTLE, SETTLE + self.options.steps // 2)
                lanes = [lane for lane in self.running if lane.spec.keeps or all_take_part]
                if not all_take_part:
                    self.note_token(token)
                self.measure(lanes, times if counts else None, number, counts, op="step", id=token, run=True)
        return self.case(context, times) | {"prefill": {name: summary(values) for name, values in prefill.items()}}

    def note_token(self, token: int) -> None:
        for lane in [lane for lane in self.running if not lane.spec.keeps]:
            try:
                lane.ask(op="step", id=token, run=False)
            except LaneError as error:
                self.failed(lane.spec, error)

    def case(self, tokens: int, times: dict[str, Times]) -> dict[str, Any]:
        ours = [name for name in times if self.records[name]["ours"]]
        return {
            "tokens": tokens,
            "times": {name: summary(values) for name, values in times.items()},
            "raw": {name: list(values.values()) for name, values in times.items()},
            "ratios": {
                name: {own: paired_ratio(values, times[own]) for own in ours}
                for name, values in times.items()
                if name not in ours
            },
        }

    def run(self) -> dict[str, Any]:
        print(f"{self.name}:", flush=True)
        try:
            self.start()
            limit = self.known["max_tokens"] - (SETTLE + self.options.steps if self.decoder else 0)
            cases = []
            for tokens in self.options.context if self.decoder else self.options.tokens:
                if tokens > limit:
                    print(f"  {tokens} tokens: left out, the model takes {self.known['max_tokens']}", flush=True)
                    continue
                cases.append(self.decode(tokens) if self.decoder else self.encode(tokens))
                print(f"  {tokens} tokens: done", flush=True)
            for lane in self.running:
                self.records[lane.spec.name]["memory"] = lane.memory() | {"before": lane.memory_before["resident"]}
        finally:
            for lane in self.running:
                lane.close()
        reference = LANES[self.known["family"]][0].name
        for name, record in self.records.items():
            record["quality"] = self.quality[name].record(argmax=self.decoder)
            if name == reference:
                record["quality"]["argmax_agreement"] = 1.0 if self.decoder else None
            elif "failed" not in record and self.quality[name].wrong(TOLERANCE):
                record["failed"] = f"its results are not those of {reference}: {record['quality']}"
                print(f"  {name}: {record['failed']}", file=sys.stderr, flush=True)
        return {
            "model": self.name,
            "family": self.known["family"],
            "weights": self.known["weights"],
            "sha256": self.known["sha256"],
            "cases": cases,
            "lanes": list(self.records.values()),
        }


def machine() -> dict[str, Any]:
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": pages / 2**30}


def command(arguments: list[str]) -> str:
    """To be shown: without the options that name files and folders."""
    shown, folders = [], ("--models", "--bin", "--onnx", "--json", "--markdown")
    skip = False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in folders:
            shown.append(argument)
        skip = argument in folders
    return shlex.join(["tools/run.sh", "peers", *shown])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for family, specs in LANES.items():
            for spec in specs:
                print(f"{family:8} {spec.name:22} {spec.title}")
        return 0
    if importlib.util.find_spec("onnxruntime") is None:
        print("onnxruntime is not installed: its lanes are left out (benchmarks/peers/requirements.txt)", flush=True)
    models, versions = [], {}
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
            for name in options.model:
                comparison = Comparison(name, options, Path(scratch))
                models.append(comparison.run())
                versions |= comparison.versions
    except CompareError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    document = {
        "machine": machine(),
        "threads": options.threads,
        "versions": versions,
        "command": command(sys.argv[1:] if arguments is None else arguments),
        "quick": options.quick,
        "models": models,
    }
    print("\n" + text_report(document), end="")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown_report(document), encoding="utf-8")
    return 1 if any("failed" in lane for model in models for lane in model["lanes"]) else 0


if __name__ == "__main__":
    sys.exit(main())
