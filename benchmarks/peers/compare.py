#!/usr/bin/env python3
"""Runs LLMCache and what else there is for the same purpose side by side: see README.md in this folder.

Each backend is a process of its own with the same weights and number of threads. One computes at a time: every
measurement goes through all backends, in an order that turns, before the next one begins.
"""

from __future__ import annotations

import argparse
import itertools
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
sys.path[:0] = [str(HERE), str(ROOT)]

import convert
from backends import BACKENDS, TOLERANCES, Backend, BackendError, BackendSpec, Unavailable
from table import Quality, Times, log_softmax, markdown_report, paired_ratio, state, summary, text_report

from tools.data.token_file import load
from tools.data.workloads import WORKLOADS, stand_in_for
from tools.models.model_list import MODELS

Shares = dict[str, dict[str, int]]  # backend -> tokens, and how many of them were known

DEFAULT_MODELS = ("minilm", "bert-base", "gpt2", "smollm2")
FIRST_ID = 10  # leaves special tokens out
SETTLE = 2  # steps of a decoder, and three passes of an encoder, before the first that counts
LARGE = 256  # tokens: a pass of more is measured less often, at least
FEWEST = 3  # times
START = 0  # the token that targets begin with
CAPACITY_MIB = 512


class CompareError(RuntimeError):
    """What was asked for cannot be done; one line, with what to do."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    build = Path(os.environ.get("LLMCACHE_BUILD_DIR", ROOT / "build"))
    parser.add_argument("--model", nargs="+", default=list(DEFAULT_MODELS), metavar="NAME", help="%(default)s")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="only these (and the reference)")
    parser.add_argument("--threads", type=int, default=1, help="of each backend (%(default)s)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 128, 512], help="encoders (%(default)s)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sequences a pass, encoders (%(default)s)")
    parser.add_argument("--context", nargs="+", type=int, default=[128, 512, 1000], help="decoders (%(default)s)")
    parser.add_argument("--source", nargs="+", type=int, default=[256], help="tokens, encoder-decoders (%(default)s)")
    parser.add_argument("--target", type=int, default=64, help="tokens generated of each source (%(default)s)")
    parser.add_argument("--passes", type=int, default=21, help="of an encoder; fewer if long (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="sequences of a decoder, sources (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of each of them (%(default)s)")
    parser.add_argument(
        "--workload", nargs="*", default=["squad", "chat", "banking77"], metavar="NAME", help="%(default)s"
    )
    parser.add_argument("--requests", type=int, default=24, help="of each workload (%(default)s)")
    parser.add_argument(
        "--processor-time", action="store_true", help="of the backend instead of the time that passes: beside other work"
    )
    parser.add_argument("--quick", action="store_true", help="few and short measurements: to see that it runs")
    parser.add_argument("--models", type=Path, default=build / "models", help="exported models (%(default)s)")
    parser.add_argument("--bin", type=Path, default=build / "bin", help="where llmcache-peer is (%(default)s)")
    parser.add_argument("--data", type=Path, default=build / "data", help="prepared workloads (%(default)s)")
    parser.add_argument("--onnx", type=Path, default=build / "onnx", help="where converted models go (%(default)s)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one answer (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, for a README")
    parser.add_argument("--list", action="store_true", help="print the backends and stop")
    parser.add_argument("--needs", action="store_true", help="print which models and workloads it needs, and stop")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.batch, options.context = [16], [1], [32]
        options.passes, options.rounds, options.steps, options.requests = 3, 1, 3, 3
        options.source, options.target = [16], 4
    for name in options.model:
        if name not in MODELS:
            parser.error(f"--model: no model is called '{name}'; tools/models/export_models.py --list shows the names")
    known = {spec.name for specs in BACKENDS.values() for spec in specs}
    for name in options.backend or []:
        if name not in known:
            parser.error(f"--backend: no backend is called '{name}'; --list shows the names")
    for name in options.workload:
        if name not in WORKLOADS:
            parser.error(f"--workload: no workload is called '{name}'; those of prepare_data.py are known")
    numbers = ("threads", "passes", "rounds", "steps", "requests", "target")
    lengths = options.tokens + options.batch + options.context + options.source
    if min(getattr(options, name) for name in numbers) < 1 or min(lengths) < 1:
        parser.error("numbers of threads, tokens and measurements must be above 0")
    return options


def chosen_backends(family: str, names: list[str] | None) -> list[BackendSpec]:
    return [spec for i, spec in enumerate(BACKENDS[family]) if i == 0 or not names or spec.name in names]


def converted(name: str, kind: str, folder: Path, sidecar: Path) -> Path:
    file = convert.path_of(name, kind, folder)
    if convert.present(file, sidecar):
        return file
    started = time.monotonic()
    print(f"  making {file.name} ...", flush=True)
    command = [sys.executable, HERE / "convert.py", name, kind, folder, "--sidecar", sidecar]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{file.name} cannot be made: {reason}")
    print(f"  making {file.name}: {time.monotonic() - started:.0f} s", flush=True)
    return file


def rows_of(file: Path) -> tuple[list[list[list[int]]], int, dict[str, str]] | None:
    """The requests of a workload, each a batch of sequences; how many of them fill; what the file says of itself."""
    known = load(file) if file.exists() else None
    if known is None:
        return None
    arrays, metadata = known
    sequences = [part.tolist() for part in np.split(arrays["tokens"], arrays["sequence_offsets"][1:-1])]
    bounds = arrays["request_offsets"].tolist()
    return [sequences[a:b] for a, b in itertools.pairwise(bounds)], int(metadata["fill_requests"]), metadata


class Comparison:
    """One model: its backends, and what they did."""

    def __init__(self, name: str, options: argparse.Namespace, scratch: Path) -> None:
        self.name, self.options, self.scratch = name, options, scratch
        self.sidecar = options.models / f"{name}.json"
        try:
            self.known = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CompareError(
                f"{self.sidecar} is missing or damaged: run tools/models/export_models.py --only {name}"
            ) from error
        self.decoder = self.known["family"] == "decoder"
        self.generator = np.random.default_rng(0)
        self.running: list[Backend] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.quality: dict[str, Quality] = {}
        self.versions: dict[str, str] = {}
        self.steps: Shares = {}
        self.turn = 0

    def failed(self, spec: BackendSpec, error: Exception) -> None:
        absent = isinstance(error, Unavailable)
        reason = str(error).removeprefix(f"{spec.name}: ")
        print(f"  {spec.name}: {'not available: ' if absent else ''}{reason}", file=sys.stderr, flush=True)
        self.records[spec.name]["unavailable" if absent else "failed"] = reason
        for backend in [backend for backend in self.running if backend.spec is spec]:
            backend.close()
            self.running.remove(backend)

    def start(self) -> None:
        for spec in chosen_backends(self.known["family"], self.options.backend):
            self.records[spec.name] = {
                "backend": spec.name,
                "title": spec.title,
                "ours": spec.ours,
                "keeps": spec.keeps,
                "precision": spec.precision,
            }
            self.quality[spec.name] = Quality()
            try:
                self.load(spec)
            except BackendError as error:
                self.failed(spec, error)
        reference = BACKENDS[self.known["family"]][0]
        self.records[reference.name]["reference"] = True
        if not any(backend.spec is reference for backend in self.running):
            raise CompareError(f"{self.name}: without the backend {reference.name} there is nothing to compare with")

    def load(self, spec: BackendSpec) -> None:
        backend = Backend(spec, self.options.bin / "llmcache-peer", self.options.threads, self.options.timeout)
        self.running.append(backend)
        settings: dict[str, Any] = {**spec.settings, "threads": self.options.threads, "capacity_mib": CAPACITY_MIB}
        settings |= {name: self.known[name] for name in ("family", "vocab", "max_tokens")}
        settings["model"] = str(self.options.models / f"{self.name}.pt") if spec.program == "peer" else self.name
        if spec.kind:
            settings["model"] = str(converted(self.name, spec.kind, self.options.onnx, self.sidecar))
        answer = backend.ask(op="load", **settings)
        weights = answer.get("weights", self.known["weights"])
        if weights != self.known["weights"]:
            raise BackendError(
                f"{spec.name}: its weights are {weights}, those of {self.name}.pt are {self.known['weights']}"
            )
        self.versions |= backend.versions
        record = self.records[spec.name]
        record["load_ms"], record["note"] = answer["load_ms"], answer["note"]
        print(f"  {spec.name}: loaded in {answer['load_ms'] / 1000:.1f} s", flush=True)

    def in_turn(self, backends: list[Backend]) -> list[Backend]:
        self.turn += 1
        at = self.turn % max(1, len(backends))
        return backends[at:] + backends[:at]

    def ids(self, count: int) -> list[int]:
        return self.generator.integers(FIRST_ID, self.known["vocab"], count).tolist()

    def measure(
        self,
        backends: list[Backend],
        times: dict[str, Times] | None,
        number: int,
        compare: bool,
        shares: Shares | None = None,
        mask: np.ndarray | None = None,
        **request: Any,
    ) -> np.ndarray | None:
        """Asks all backends the same, one after the other, and adds their times to those of this number. Without
        `times` it only warms up. `mask`: which tokens of the outputs are compared. Returns the reference's output."""
        outputs: dict[str, np.ndarray] = {}
        for backend in self.in_turn(backends):
            file = self.scratch / "output"
            saving = {"save": str(file)} if compare else {}
            try:
                before = backend.processor_ms() if self.options.processor_time else 0
                answer = backend.ask(**request, **saving)
                if times is not None and answer["ms"] > 0:
                    ms = backend.processor_ms() - before if self.options.processor_time else answer["ms"]
                    known = times.setdefault(backend.spec.name, {})
                    known[number] = known.get(number, 0) + ms
                    if shares is not None:
                        share = shares.setdefault(backend.spec.name, {"tokens": 0, "reused": 0})
                        share["tokens"] += answer["tokens"]
                        share["reused"] += answer["reused"]
                if compare:
                    outputs[backend.spec.name] = np.fromfile(file, np.float32)
                    file.unlink()
            except (BackendError, OSError) as error:
                self.failed(backend.spec, error)
            if self.options.threads > 1:
                time.sleep(0.02)  # threads that wait by spinning have gone to sleep before the next backend's turn
        if not compare:
            return None
        reference = outputs.pop(BACKENDS[self.known["family"]][0].name, None)
        if reference is None:
            raise CompareError(f"{self.name}: the reference backend failed")
        for backend in [backend for backend in self.running if backend.spec.name in outputs]:
            output = outputs[backend.spec.name]
            expected = log_softmax(reference) if backend.spec.log_probabilities else reference
            try:
                if mask is not None and output.size == expected.size:
                    output, expected = (one.reshape(mask.size, -1)[mask.ravel()] for one in (output, expected))
                self.quality[backend.spec.name].add(output, expected)
            except ValueError as error:
                self.failed(backend.spec, error)
        return reference

    def encode(self, tokens: int, rows: int) -> dict[str, Any]:
        times: dict[str, Times] = {}
        passes = min(self.options.passes, max(FEWEST, self.options.passes * LARGE // max(LARGE, rows * tokens)))
        for number in range(-SETTLE - 1, passes):
            measured = times if number >= 0 else None
            # Nothing comes twice: no backend of ours finds a whole output known.
            batch = [self.ids(tokens) for _ in range(rows)]
            self.measure(self.running, measured, number, number >= 0, op="pass", ids=batch)
        return self.case(tokens, times) | {"rows": rows}

    def decode(self, context: int) -> dict[str, Any]:
        times: dict[str, Times] = {}
        prefill: dict[str, Times] = {}
        for round_ in range(-1, self.options.rounds):  # the first only warms up
            warm_up = round_ < 0
            keeping = [one for one in self.running if one.spec.keeps]
            others = [one for one in self.running if not one.spec.keeps]
            sequence = self.ids(context)
            self.measure(keeping, None if warm_up else prefill, round_, False, op="start", ids=sequence, run=True)
            self.measure(others, None, round_, False, op="start", ids=sequence, run=False)
            steps = SETTLE if warm_up else SETTLE + self.options.steps
            for step, token in enumerate(self.ids(steps)):
                number = round_ * self.options.steps + step - SETTLE
                counts = not warm_up and step >= SETTLE
                # One that computes the whole sequence each time is asked twice in a round; the token is known to all.
                all_take_part = warm_up or step in (SETTLE, SETTLE + self.options.steps // 2)
                backends = [one for one in self.running if one.spec.keeps or all_take_part]
                if not all_take_part:
                    others = [one for one in self.running if not one.spec.keeps]
                    self.measure(others, None, number, False, op="step", id=token, run=False)
                measured = times if counts else None
                self.measure(backends, measured, number, counts, self.steps, op="step", id=token, run=True)
        return self.case(context, times) | {"prefill": {name: summary(values) for name, values in prefill.items()}}

    def generate(self, source: int) -> dict[str, Any]:
        """The same tokens in all backends, one after the other, then another target of the same source begins."""
        first: dict[str, Times] = {}
        steps: dict[str, Times] = {}
        second: dict[str, Times] = {}
        for round_ in range(-1, self.options.rounds):  # the first only warms up
            counts = round_ >= 0
            ids, tokens = self.ids(source), self.ids(self.options.target if counts else SETTLE)
            start = {"op": "start", "source": ids, "run": True}
            self.measure(self.running, first if counts else None, round_, counts, ids=[START], **start)
            for token in tokens[1:]:
                measured = steps if counts else None
                self.measure(self.running, measured, round_, counts, self.steps, op="step", id=token, run=True)
            self.measure(self.running, second if counts else None, round_, counts, ids=[START, tokens[0]], **start)
        whole = {
            name: {number: ms + steps.get(name, {}).get(number, 0) for number, ms in times.items()}
            for name, times in first.items()
        }
        found = {"first": first, "second": second}
        medians = {which: {name: summary(one) for name, one in times.items()} for which, times in found.items()}
        return self.case(source, whole) | {"target": self.options.target} | medians

    def workload(self, name: str) -> dict[str, Any] | None:
        """The first requests of a workload, or of the sample of its kind. What fills goes to our backends only, as the
        others keep nothing of it: the last of it, as many as are measured."""
        encoder = self.known["family"] == "encoder"
        if not (self.decoder or (encoder and not WORKLOADS[name].decoders_only)):
            return None
        instead = stand_in_for(WORKLOADS[name])
        for known in (name, *([instead.name] if instead else [])):
            found = rows_of(self.options.data / f"{known}.{self.known['tokenizer']}.safetensors")
            if found:
                break
        else:
            print(f"  {name}: left out, not in {self.options.data}", flush=True)
            return None
        requests, fill, metadata = found
        conversations = metadata["task"] == "generation"
        times: dict[str, Times] = {}
        shares: Shares = {}
        sent = 0
        for number, rows in enumerate(
            requests[max(0, fill - self.options.requests) :], -min(fill, self.options.requests)
        ):
            if sent >= self.options.requests:
                break
            backends = [one for one in self.running if number >= 0 or one.spec.ours]
            measured = times if number >= 0 else None
            if conversations:
                keeping = [one for one in backends if one.spec.keeps]
                sent += self.converse(keeping, rows, times, shares, sent)
                continue
            if not self.decoder:
                mask = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
                self.measure(backends, measured, number, number >= 0, shares, mask, op="pass", ids=rows)
            for row in rows if self.decoder else []:
                self.measure(backends, measured, number, number >= 0, shares, op="start", ids=row, run=True)
            sent += number >= 0
        print(f"  {metadata['workload']}: done", flush=True)
        means = {name: sum(values.values()) / len(values) for name, values in times.items()}
        return {"workload": metadata["workload"], "requests": sent, "means": means, "shares": shares}

    def converse(
        self, backends: list[Backend], turns: list[list[int]], times: dict[str, Times], shares: Shares, first: int
    ) -> int:
        """A request is a turn and the first tokens of its answer, those that the reference finds the most probable."""
        sequence: list[int] = []
        for number, turn in enumerate(turns, first):
            sequence = sequence + turn
            if number >= self.options.requests or len(sequence) + self.options.steps > self.known["max_tokens"]:
                return number - first
            output = self.measure(backends, times, number, True, shares, op="start", ids=sequence, run=True)
            for _ in range(self.options.steps):
                token = int(output.argmax())
                sequence.append(token)
                output = self.measure(backends, times, number, True, shares, op="step", id=token, run=True)
        return len(turns)

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
            lengths, measure = {
                "encoder": (self.options.tokens, self.encode),
                "decoder": (self.options.context, self.decode),
                "encoder-decoder": (self.options.source, self.generate),
            }[self.known["family"]]
            sizes = itertools.product([1] if measure != self.encode else self.options.batch, lengths)
            for rows, tokens in sizes:
                if tokens > limit:
                    print(f"  {tokens} tokens: left out, the model takes {self.known['max_tokens']}", flush=True)
                    continue
                cases.append(measure(tokens, rows) if measure == self.encode else measure(tokens))
                print(f"  {rows} x {tokens} tokens: done", flush=True)
            workloads = [done for name in self.options.workload if (done := self.workload(name))]
            for backend in self.running:
                before = {"before": backend.memory_before["resident"]}
                self.records[backend.spec.name]["memory"] = backend.memory() | before
        finally:
            for backend in self.running:
                backend.close()
        reference = BACKENDS[self.known["family"]][0].name
        for name, record in self.records.items():
            record["quality"] = self.quality[name].record(argmax=self.known["family"] != "encoder")
            if name in self.steps:
                record["steps"] = self.steps[name]
            if name == reference:
                record["quality"]["argmax_agreement"] = None if self.known["family"] == "encoder" else 1.0
            elif state(record) == "ran" and self.quality[name].wrong(TOLERANCES[record["precision"]]):
                record["failed"] = f"its results are not those of {reference}: {record['quality']}"
                print(f"  {name}: {record['failed']}", file=sys.stderr, flush=True)
        return {
            "model": self.name,
            "family": self.known["family"],
            "weights": self.known["weights"],
            "sha256": self.known["sha256"],
            "cases": cases,
            "workloads": workloads,
            "backends": list(self.records.values()),
        }


def machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in cpu.splitlines())}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": known.get("model name", "unknown"),
        "isa": instruction_sets(known.get("flags", "")),
        "cores": os.cpu_count(),
        "memory_gib": pages / 2**30,
    }


def instruction_sets(flags: str) -> list[str]:
    """Those that decide how fast a matrix product is in the types of the lanes."""
    sets = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx512_vnni": "AVX-512 VNNI",
        "avx512_bf16": "AVX-512 BF16",
        "amx_bf16": "AMX BF16",
        "amx_int8": "AMX INT8",
    }
    return [title for flag, title in sets.items() if flag in flags.split()]


def command(arguments: list[str]) -> str:
    """To be shown: without the options that name files and folders."""
    shown, folders = [], ("--models", "--bin", "--data", "--onnx", "--json", "--markdown")
    skip = False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in folders:
            shown.append(argument)
        skip = argument in folders
    return shlex.join(["tools/run.sh", "peers", *shown])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for family, specs in BACKENDS.items():
            for spec in specs:
                print(f"{family:8} {spec.name:22} {spec.title}")
        return 0
    if options.needs:
        print(f"models {' '.join(options.model)}\nworkloads {' '.join(options.workload)}")
        return 0
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
    return 1 if any("failed" in backend for model in models for backend in model["backends"]) else 0


if __name__ == "__main__":
    sys.exit(main())
