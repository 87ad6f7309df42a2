"""Tests of benchmarks/peers: its statistics and tables, its backends' processes, and one whole run on tiny models.

The whole run needs LLMCACHE_BIN_DIR (with llmcache-peer) and LLMCACHE_MODELS_DIR (with the tiny models)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import stat
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
from support import ROOT, ToolTest  # lets the tools be imported

sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))

# isort: split
import compare
import convert
import table
import worker
from backends import BACKENDS, OURS, TOLERANCES, Backend, BackendError, BackendSpec, Unavailable

from tools.data.token_file import save


def backend_record(name: str, **changes: Any) -> dict[str, Any]:
    record = {
        "backend": name,
        "title": name.upper(),
        "ours": name.startswith("ours"),
        "note": "",
        "memory": {"resident": 204800, "before": 102400, "peak": 2048000},
        "quality": {"outputs": 3, "max_difference": 0.00123, "scale": 4.0, "argmax_agreement": 0.5},
    }
    return record | changes


def document(*backends: dict[str, Any], family: str = "decoder") -> dict[str, Any]:
    times = {
        "transformers": table.summary({0: 50.0, 1: 52.0, 2: 54.0}),
        "ours": table.summary({0: 25.0, 1: 26.0, 2: 27.0}),
    }
    case = {"tokens": 512, "times": times, "ratios": {"transformers": {"ours": 2.0}}}
    if family == "decoder":
        case["prefill"] = {"ours": table.summary({0: 1234.5})}
    model = {"model": "gpt2", "family": family, "weights": "random (seed 0)", "cases": [case]}
    model["backends"] = list(backends)
    return {
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 23.6},
        "threads": 1,
        "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
        "command": "tools/run.sh peers --model gpt2",
        "models": [model],
    }


class StatisticsTest(unittest.TestCase):
    def test_quantiles_lie_between_their_neighbours(self) -> None:
        summary = table.summary({0: 4.0, 1: 1.0, 2: 3.0, 5: 2.0})
        self.assertEqual(summary, {"median": 2.5, "p25": 1.75, "p75": 3.25, "count": 4})
        self.assertEqual(table.summary({3: 7.0}), {"median": 7, "p25": 7, "p75": 7, "count": 1})

    def test_ratios_are_of_what_ran_together(self) -> None:
        # The machine is ten times slower at 2; the backend is twice as slow at all times.
        base = {0: 1.0, 1: 1.0, 2: 10.0, 3: 1.0}
        self.assertEqual(table.paired_ratio({2: 20.0, 3: 2.0}, base), 2.0)
        self.assertIsNone(table.paired_ratio({9: 1.0}, base))

    def test_quality(self) -> None:
        quality = table.Quality()
        self.assertTrue(quality.wrong(1.0), "nothing was compared")
        quality.add(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]))
        quality.add(np.array([5.0, 0.0]), np.array([0.0, 5.0]))
        self.assertEqual(
            quality.record(argmax=True), {"outputs": 2, "max_difference": 5.0, "scale": 5.0, "argmax_agreement": 0.5}
        )
        self.assertNotIn("argmax_agreement", quality.record(argmax=False))
        self.assertTrue(quality.wrong(0.99))
        self.assertFalse(quality.wrong(1.0))
        with self.assertRaisesRegex(ValueError, "3 numbers"):
            quality.add(np.zeros(3), np.zeros(2))

    def test_the_error_of_a_quantised_lane_is_shown_not_judged(self) -> None:
        quality = table.Quality()
        quality.add(np.array([4.0, -2.0]), np.array([4.5, -2.0]))  # off by 11 % of the scale
        self.assertTrue(quality.wrong(TOLERANCES["float32"]))
        self.assertTrue(quality.wrong(TOLERANCES["half"]))
        self.assertFalse(quality.wrong(TOLERANCES["quantised"]))
        self.assertEqual(quality.record(argmax=False)["max_difference"], 0.5)

    def test_log_probabilities(self) -> None:
        found = table.log_softmax(np.array([1000.0, 1000.0, 0.0], np.float32))
        np.testing.assert_allclose(found[:2], np.log(0.5), rtol=1e-6)
        self.assertLess(found[2], -900)

    def test_nan_is_wrong(self) -> None:
        quality = table.Quality()
        quality.add(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
        self.assertTrue(quality.wrong(1.0))


class TableTest(unittest.TestCase):
    def test_a_row_a_backend(self) -> None:
        rows = table.model_rows(
            document(backend_record("transformers", reference=True), backend_record("ours"))["models"][0], spread=True
        )
        self.assertEqual(
            rows,
            [
                ["backend", "ms a token at context 512", "MiB", "before loading", "peak", "max diff", "argmax"],
                ["TRANSFORMERS", "52.0 (51.0-53.0)", "200", "100", "2,000", "0", "50 %"],
                ["OURS", "26.0 (25.5-26.5)", "200", "100", "2,000", "1.2e-03", "50 %"],
            ],
        )

    def test_a_backend_that_failed_shows_no_figures(self) -> None:
        failed = backend_record("ours", failed="out of memory")
        del failed["memory"]
        text = table.text_report(document(backend_record("transformers"), failed))
        row = next(line for line in text.splitlines() if line.startswith("OURS "))
        self.assertEqual(row.split(), ["OURS", "failed", "-", "-", "-", "-", "-"])
        self.assertIn("OURS: out of memory", text)
        self.assertNotIn("time / ours", text)

    def test_ratios_and_prefill(self) -> None:
        text = table.text_report(document(backend_record("transformers"), backend_record("ours")))
        self.assertRegex(text, r"time / ours +512: ours\nTRANSFORMERS +2\.00\n")
        self.assertRegex(text, r"prefill +ms, 512 tokens\nOURS +1,23[45]\n")

    def test_sources_have_a_first_and_a_second_request(self) -> None:
        known = document(backend_record("transformers", reference=True), backend_record("ours"), family="encoder-decoder")
        model = known["models"][0]
        self.assertEqual(table.source_rows(model), [])
        first, second = ({"ours": table.summary({0: ms})} for ms in (20.0, 2.0))
        model["cases"][0] |= {"target": 64, "first": first, "second": second}
        self.assertEqual(table.model_rows(model, spread=False)[0][1], "ms, 64 tokens of a source of 512")
        self.assertEqual(
            table.source_rows(model),
            [
                ["first token, ms", "first request of 512", "second request of 512"],
                ["TRANSFORMERS", "-", "-"],
                ["OURS", "20.0", "2.00"],
            ],
        )
        self.assertEqual(table.best_rows(model)[1][0], "target of 512")

    def test_a_backend_that_is_not_there_is_named_with_its_reason(self) -> None:
        absent = backend_record("openvino", unavailable="not installed (No module named 'openvino')")
        del absent["memory"]
        text = table.text_report(document(backend_record("transformers"), absent, backend_record("ours")))
        self.assertIn("OPENVINO: not available: not installed (No module named 'openvino')", text)
        self.assertEqual(text.count("OPENVINO"), 1)

    def test_batches_are_columns_of_their_own(self) -> None:
        known = document(backend_record("transformers"), family="encoder")
        known["models"][0]["cases"].append({**known["models"][0]["cases"][0], "rows": 8})
        head = table.model_rows(known["models"][0], spread=False)[0]
        self.assertEqual(head[1:3], ["ms, 512 tokens", "ms, 8 x 512 tokens"])

    def test_the_scale_of_the_errors_is_told(self) -> None:
        known = document(backend_record("transformers", reference=True), backend_record("onnx-int8"))
        self.assertEqual(table.model_rows(known["models"][0], spread=False)[2][-2], "1.2e-03")
        self.assertIn("outputs that differences are of: 4\n", table.text_report(known))

    def test_those_that_keep_nothing_compute_the_sequence_in_each_step(self) -> None:
        whole = backend_record("transformers", keeps=False)
        text = table.text_report(document(whole, backend_record("ours")))
        self.assertRegex(text, r"prefill +ms, 512 tokens\nTRANSFORMERS +52\.0\nOURS +1,23[45]\n")

    PEERS: ClassVar = (
        backend_record("transformers"),
        backend_record("int8", precision="quantised"),
        backend_record("gone", failed="out of memory"),
        backend_record("ours"),
        backend_record("ours-fp16", precision="half"),
    )
    MEANS: ClassVar = {"transformers": 60.0, "int8": 15.0, "gone": 1.0, "ours": 20.0, "ours-fp16": 10.0}

    def test_the_fastest_of_both_sides_stand_side_by_side(self) -> None:
        known = document(*self.PEERS)
        case = known["models"][0]["cases"][0]
        case["times"] = {name: table.summary({0: ms}) for name, ms in self.MEANS.items()}
        expected = ["TRANSFORMERS: 60.0", "OURS: 20.0", "3.00", "INT8: 15.0", "OURS-FP16: 10.0", "1.50"]
        head, prefill, step = table.best_rows(known["models"][0])
        self.assertEqual(head[1:], table.BEST)
        self.assertEqual(prefill, ["prefill of 512", "-", "OURS: 1,234", "-", "-", "OURS: 1,234", "-"])
        self.assertEqual(step, ["step at 512", *expected])

    def test_workloads(self) -> None:
        known = document(*self.PEERS)
        shares = {"ours-fp16": {"tokens": 200, "reused": 150}}
        workload = {"workload": "squad", "requests": 24, "means": self.MEANS, "shares": shares}
        known["models"][0]["workloads"] = [workload]
        expected = ["TRANSFORMERS: 60.0", "OURS: 20.0", "3.00", "INT8: 15.0", "OURS-FP16: 10.0", "1.50", "75 %"]
        self.assertEqual(table.workload_rows(known)[1], ["squad, gpt2 (24)", *expected])
        rows = table.workload_lane_rows(known["models"][0])
        self.assertEqual(rows[0], ["ms a request", "squad"])
        self.assertEqual([row[0] for row in rows[1:]], ["TRANSFORMERS", "INT8", "OURS", "OURS-FP16"])
        self.assertIn("| squad, gpt2 (24) |", table.markdown_report(known))
        self.assertEqual(table.workload_rows(document(*self.PEERS)), [])

    def test_instruction_sets(self) -> None:
        self.assertEqual(compare.instruction_sets("fpu avx2 avx512f amx_int8"), ["AVX2", "AVX-512", "AMX INT8"])
        known = document(backend_record("transformers"))
        known["machine"]["isa"] = ["AVX2", "AMX INT8"]
        self.assertIn("A CPU (AVX2, AMX INT8), 2 cores", table.text_report(known))

    def test_encoders_have_no_tokens_to_agree_on(self) -> None:
        text = table.markdown_report(document(backend_record("transformers"), family="encoder"))
        self.assertIn(
            "| backend | ms, 512 tokens | MiB | before loading | peak | max diff |\n|---|---|---|---|---|---|\n", text
        )

    def test_markdown_says_where_and_how(self) -> None:
        ours = backend_record("ours", steps={"tokens": 1000, "reused": 995})
        text = table.markdown_report(document(backend_record("transformers"), ours))
        self.assertIn("A CPU, 2 cores, 24 GiB; 1 thread a backend; torch 2.13.0, onnxruntime 1.32.0", text)
        self.assertIn("weights: random (seed 0)", text)
        self.assertIn("OURS: 99.5 % of the tokens of its steps were known", text)
        self.assertTrue(text.endswith("Command: `tools/run.sh peers --model gpt2`\n"))

    def test_command_leaves_folders_out(self) -> None:
        shown = compare.command(["--models", "/a b", "--quick", "--json=/c", "--model", "gpt2"])
        self.assertEqual(shown, "tools/run.sh peers --quick --model gpt2")


class BackendsTest(ToolTest):
    def backend(self, script: str, timeout: float = 5) -> Backend:
        program = self.folder / "llmcache-peer"
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        spec = BackendSpec("scripted", "Scripted", "encoder", "peer", {"backend": "plain"})
        return Backend(spec, program, 1, timeout)

    READY = 'echo \'{"ready": true, "versions": {}}\'\n'

    def test_names_are_unique_and_the_first_is_the_reference(self) -> None:
        for specs in BACKENDS.values():
            self.assertEqual(len({spec.name for spec in specs}), len(specs))
            self.assertEqual(specs[0].name, "transformers")
            self.assertTrue(specs[0].keeps)

    def test_lanes_are_described(self) -> None:
        for specs in BACKENDS.values():
            for spec in specs:
                with self.subTest(spec.family, name=spec.name):
                    self.assertIn(spec.precision, TOLERANCES)
                    self.assertIn(spec.kind, {"", *convert.KINDS})
                    if spec.program == "worker":
                        self.assertIn(spec.settings["backend"], worker.BACKENDS)
            own = [spec.settings["weights"] for spec in specs if spec.ours]
            self.assertEqual(own, [weights for _, weights, _, _ in OURS])

    def test_what_is_not_available_is_told_from_a_failure(self) -> None:
        with self.assertRaisesRegex(Unavailable, "scripted: not installed"):
            self.backend('echo \'{"unavailable": "not installed"}\'\n')
        backend = self.backend(self.READY + 'read -r line; echo \'{"unavailable": "no such weights"}\'')
        self.addCleanup(backend.close)
        with self.assertRaisesRegex(Unavailable, "no such weights"):
            backend.ask(op="load")

    def test_answers_come_back(self) -> None:
        backend = self.backend(self.READY + 'while read -r line; do echo "{\\"got\\": $line}"; done\n')
        self.addCleanup(backend.close)
        self.assertEqual(backend.ask(op="step", id=3), {"got": {"op": "step", "id": 3}})
        self.assertGreater(backend.memory()["resident"], 0)

    def test_processor_time_is_that_of_the_work(self) -> None:
        backend = self.backend(
            self.READY + "read -r line; sleep 0.3; echo '{}'\n"
            "read -r line; i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done; echo '{}'; read -r line\n",
            timeout=60,
        )
        self.addCleanup(backend.close)
        taken = []
        for _ in range(2):
            before = backend.processor_ms()
            backend.ask(op="step")
            taken.append(backend.processor_ms() - before)
        self.assertLess(taken[0], 100)
        self.assertGreater(taken[1], max(5, taken[0]))

    def test_errors_are_named(self) -> None:
        for script, message in {
            "exit 3": r"scripted: .*ended \(status 3\)",
            "echo hello; cat": "no JSON",
            "sleep 60": "no answer",
        }.items():
            with self.subTest(script), self.assertRaisesRegex(BackendError, message):
                self.backend(script, timeout=0.5)
        backend = self.backend(self.READY + 'read -r line; echo \'{"error": "out of luck"}\'; read -r line; kill -9 $$')
        self.addCleanup(backend.close)
        with self.assertRaisesRegex(BackendError, "scripted: out of luck"):
            backend.ask(op="pass")
        for _ in range(2):
            with self.assertRaisesRegex(BackendError, "scripted: "):
                backend.ask(op="pass")

    def test_a_missing_program_is_named(self) -> None:
        spec = BackendSpec("scripted", "Scripted", "encoder", "peer", {"backend": "plain"})
        with self.assertRaisesRegex(BackendError, "cannot be started"):
            Backend(spec, self.folder / "none", 1, 1)


class Echo(worker.Backend):
    """Returns the number of tokens that it was told are new."""

    weights = "none"

    def prepare(self, rows: worker.Rows, new: int | None) -> int | None:
        return new

    def call(self, arguments: int | None) -> int | None:
        return arguments

    def finish(self, output: int | None, last: bool) -> np.ndarray:
        return np.array([-1.0 if output is None else output])


class WorkerTest(ToolTest):
    def new_tokens(self, one: worker.Worker, **request: Any) -> float:
        one.answer({"save": self.folder / "output", "run": True, **request})
        return float(np.fromfile(self.folder / "output", np.float32)[0])

    def test_a_sequence_that_goes_on_costs_its_new_tokens(self) -> None:
        for cache, costs in {True: [3, 1, 2, 4], False: [3, 1, 6, 4]}.items():
            one = worker.Worker(Echo)
            self.assertEqual(one.answer({"op": "load", "cache": cache})["weights"], "none")
            found = [
                self.new_tokens(one, op="start", ids=[1, 2, 3]),
                self.new_tokens(one, op="step", id=4),
                self.new_tokens(one, op="start", ids=[1, 2, 3, 4, 5, 6]),
                self.new_tokens(one, op="start", ids=[1, 2, 3, 9]),
            ]
            self.assertEqual(found, costs)
        self.assertEqual(self.new_tokens(one, op="pass", ids=[[1]]), -1)

    def test_what_does_not_load_is_not_available(self) -> None:
        self.assertEqual(worker.Worker(Echo).answer({"op": "load"}), {"unavailable": "KeyError: 'cache'"})

    def test_rows_are_padded_on_the_right(self) -> None:
        ids, mask = worker.padded([[5, 6, 7], [8]])
        self.assertEqual(ids.tolist(), [[5, 6, 7], [8, 0, 0]])
        self.assertEqual(mask.tolist(), [[1, 1, 1], [1, 0, 0]])


class ConvertTest(ToolTest):
    def test_a_file_is_made_again_for_another_model(self) -> None:
        model = self.folder / "model.json"
        model.write_text('{"sha256": "1"}')
        path = convert.path_of("gpt2", "ctranslate2", self.folder)
        path.mkdir()
        (path / "model.bin").write_text("weights")
        self.assertFalse(convert.present(path, model))
        known = {"weights": "w", "bytes": 7, "recipe": convert.recipe(model)}
        convert.sidecar_of(path).write_text(json.dumps(known))
        self.assertTrue(convert.present(path, model))
        self.assertEqual(worker.weights_of(str(path)), "w")
        (path / "model.bin").write_text("wei")
        self.assertFalse(convert.present(path, model))
        (path / "model.bin").write_text("weights")
        model.write_text('{"sha256": "2"}')
        self.assertFalse(convert.present(path, model))


class CompareTest(ToolTest):
    """One comparison of all that the tests look at, as each backend of transformers takes seconds to begin."""

    LANES = ("transformers", "openvino", "transformers-nocache", "torchscript", "torchscript-frozen", "ours", "unknown")
    folders: ClassVar[list[str]]
    status: int
    out: str
    err: str
    encoder: dict[str, Any]
    decoder: dict[str, Any]

    @classmethod
    def setUpClass(cls) -> None:
        for variable in ("LLMCACHE_BIN_DIR", "LLMCACHE_MODELS_DIR"):
            if variable not in os.environ:
                raise RuntimeError(f"{variable} is not set: run the tests with tools/run.sh test")
        cls.folders = ["--bin", os.environ["LLMCACHE_BIN_DIR"], "--models", os.environ["LLMCACHE_MODELS_DIR"]]
        created = tempfile.TemporaryDirectory()
        cls.addClassCleanup(created.cleanup)
        cls.common = Path(created.name)
        cls.write_workloads()
        ours = BACKENDS["encoder"][-1]
        unknown = dataclasses.replace(ours, name="unknown", settings=dict(ours.settings, weights="packed-unheard-of"))
        with mock.patch.dict(BACKENDS, encoder=[*BACKENDS["encoder"], unknown]):
            cls.status, cls.out, cls.err = cls.run_tool(
                compare,
                *(*cls.folders, "--onnx", cls.common, "--data", cls.common, "--quick", "--backend", *cls.LANES),
                *("--model", "tiny-bert-sdpa", "tiny-llama-sdpa", "--workload", "squad", "chat", "banking77"),
                *("--json", cls.common / "results.json", "--markdown", cls.common / "tables.md"),
            )
        results = cls.common / "results.json"
        cls.known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"models": [{}, {}]}
        cls.encoder, cls.decoder = cls.known["models"]

    @classmethod
    def write_workloads(cls) -> None:
        tokens = np.arange(10, 46, dtype=np.int32)
        arrays = {"tokens": tokens, "sequence_offsets": np.arange(0, 37, 4), "request_offsets": np.arange(0, 10, 3)}
        for name, task, fill, first in (("squad", "", "1", 0), ("chat", "generation", "0", 100)):
            known = {"workload": name, "task": task, "fill_requests": fill}
            save(cls.common / f"{name}.tiny.safetensors", {**arrays, "tokens": tokens + np.int32(first)}, known)

    def compare(self, *arguments: object) -> tuple[int, str, str]:
        return self.run_tool(compare, *self.folders, "--onnx", self.folder, "--quick", *arguments)

    def test_backends_agree_on_tiny_models(self) -> None:
        self.assertEqual(self.status, 0, self.err)
        self.assertIn("transformers", self.known["versions"])
        self.assertIn("LLMCache", self.known["versions"])
        for model, left_out in ((self.encoder, "transformers-nocache"), (self.decoder, "unknown")):
            lanes = [backend["backend"] for backend in model["backends"]]
            self.assertEqual(lanes, [name for name in self.LANES if name != left_out])
            for backend in model["backends"]:
                if "unavailable" in backend:
                    continue
                with self.subTest(model=model["model"], backend=backend["backend"]):
                    self.assertNotIn("failed", backend)
                    self.assertGreater(backend["memory"]["resident"], backend["memory"]["before"])
                    self.assertGreaterEqual(backend["memory"]["peak"], backend["memory"]["resident"])
                    if backend["backend"] != "transformers":
                        self.assertGreater(backend["quality"]["outputs"], 0)
                        self.assertLess(backend["quality"]["max_difference"], 1e-4 * backend["quality"]["scale"])
        times = self.decoder["cases"][0]["times"]
        self.assertEqual(times["ours"]["count"], 3)  # --quick: 3 steps
        self.assertEqual(times["torchscript"]["count"], 2)  # computes the whole sequence
        self.assertEqual(set(self.decoder["cases"][0]["prefill"]) - {"openvino"}, {"transformers", "ours"})
        # 2 steps settle; the others are asked about 32 + 3, + 4 and + 5 tokens.
        self.assertEqual(self.decoder["backends"][0]["steps"], {"tokens": 35 + 36 + 37, "reused": 34 + 35 + 36})
        tables = (self.common / "tables.md").read_text(encoding="utf-8")
        self.assertIn("**tiny-llama-sdpa (decode steps; weights: random (seed 0))**", tables)
        self.assertIn("LLMCache, weights as loaded", self.out)

    def test_backends_agree_on_targets_of_sources(self) -> None:
        results = self.folder / "results.json"
        names = ("transformers", "torchscript", "ours")
        status, out, err = self.compare(
            "--model", "seq2seq-t5", "seq2seq-bart", "--backend", *names, "--workload", "squad", "--json", results
        )
        self.assertEqual(status, 0, err)
        for model in json.loads(results.read_text())["models"]:
            case = model["cases"][0]
            for backend in model["backends"]:
                with self.subTest(model=model["model"], backend=backend["backend"]):
                    self.assertNotIn("failed", backend)
                    for times in ("times", "first", "second"):
                        self.assertEqual(case[times][backend["backend"]]["count"], 1)
                    self.assertGreater(
                        case["times"][backend["backend"]]["median"], case["first"][backend["backend"]]["median"]
                    )
                    if backend["backend"] != "transformers":
                        self.assertEqual(backend["quality"]["outputs"], 5)  # a target of 4 tokens, and another's first
                        self.assertLess(backend["quality"]["max_difference"], 1e-4 * backend["quality"]["scale"])
            # Of targets of 2, 3 and 4 tokens all but the last one are known.
            self.assertEqual(model["backends"][0]["steps"], {"tokens": 2 + 3 + 4, "reused": 1 + 2 + 3})
            self.assertEqual(model["backends"][2]["steps"], {"tokens": 2 + 3 + 4, "reused": 1 + 2 + 3})
            self.assertEqual(model["workloads"], [])
        self.assertIn("seq2seq-bart (generation; weights: random (seed 0))", out)

    def test_workloads_go_to_all_that_keep(self) -> None:
        self.assertEqual(self.status, 0, self.err)
        self.assertIn("banking77: left out", self.out)
        squad, chat = self.decoder["workloads"]
        self.assertEqual((squad["requests"], chat["requests"]), (2, 3))  # one fills; --quick: 3 requests
        keeping, whole = {"transformers", "ours"}, {"torchscript", "torchscript-frozen"}
        for workload, lanes in (
            (self.encoder["workloads"][0], keeping | whole),
            (squad, keeping | whole | {"transformers-nocache"}),
            (chat, keeping),
        ):
            self.assertEqual(set(workload["means"]) - {"openvino"}, lanes)
        self.assertEqual(squad["shares"]["ours"]["tokens"], 2 * 3 * 4)
        # A turn of 4 tokens and 3 steps, each with what came before.
        expected = sum(at + step for at in (4, 11, 18) for step in range(4))
        for name in ("transformers", "ours"):
            self.assertEqual(chat["shares"][name]["tokens"], expected)
            self.assertEqual(chat["shares"][name]["tokens"] - chat["shares"][name]["reused"], 3 * (4 + 3))
        self.assertIn("squad, tiny-llama-sdpa (2)", self.out)

    def test_a_lane_that_is_not_there_is_named_and_the_others_go_on(self) -> None:
        self.assertEqual(self.status, 0, self.err)
        self.assertRegex(self.err, "unknown: not available: .*packed-unheard-of")
        self.assertRegex(self.out, r"LLMCache, weights as loaded +\d")
        if importlib.util.find_spec("openvino"):
            self.skipTest("openvino is installed")
        self.assertIn("openvino: not available: not installed", self.err)

    def test_a_backend_with_other_weights_fails_and_the_others_go_on(self) -> None:
        # The backend runs another model than the reference, which is the plain module here: it begins sooner.
        ask = Backend.ask

        def other_model(backend: Backend, /, **request: Any) -> dict[str, Any]:
            if backend.spec.name == "torchscript" and request["op"] == "load":
                request["model"] = request["model"].replace("tiny-bert-sdpa", "tiny-scripted")
            return ask(backend, **request)

        first, *others = BACKENDS["encoder"]
        plain = dataclasses.replace(first, program="peer", settings={"backend": "plain"})
        with mock.patch.dict(BACKENDS, encoder=[plain, *others]), mock.patch.object(Backend, "ask", other_model):
            status, out, err = self.compare("--model", "tiny-bert-sdpa", "--backend", "torchscript", "ours")
        self.assertEqual(status, 1)
        self.assertIn("torchscript: its results are not those of transformers", err)
        self.assertRegex(out, r"TorchScript, plain +failed")
        self.assertRegex(out, r"LLMCache, weights as loaded +\d")

    def test_without_the_reference_there_is_nothing_to_compare(self) -> None:
        first, *others = BACKENDS["encoder"]
        broken = [dataclasses.replace(first, settings={"backend": "no-such-library"}), *others]
        with mock.patch.dict(BACKENDS, encoder=broken):
            status, _, err = self.compare("--model", "tiny-bert-sdpa", "--backend", "torchscript")
        self.assertEqual(status, 2)
        self.assertIn("nothing to compare with", err)

    def test_bad_arguments_are_refused(self) -> None:
        for arguments, message in {
            ("--model", "no-such-model"): "no-such-model",
            ("--backend", "no-such-backend"): "no-such-backend",
            ("--workload", "no-such-workload"): "no-such-workload",
            ("--threads", "0"): "above 0",
        }.items():
            with self.subTest(arguments):
                status, _, err = self.compare(*arguments)
                self.assertEqual(status, 2)
                self.assertIn(message, err)
        status, _, err = self.run_tool(compare, "--models", self.folder, "--model", "tiny-bert-sdpa")
        self.assertEqual(status, 2)
        self.assertIn("export_models.py --only tiny-bert-sdpa", err)

    def test_list_names_the_backends(self) -> None:
        status, out, _ = self.run_tool(compare, "--list")
        self.assertEqual(status, 0)
        self.assertEqual(len(out.splitlines()), sum(map(len, BACKENDS.values())))

    def test_needs_are_models_and_workloads(self) -> None:
        status, out, _ = self.run_tool(compare, "--needs", "--model", "minilm", "gpt2", "--workload", "squad")
        self.assertEqual((status, out), (0, "models minilm gpt2\nworkloads squad\n"))


if __name__ == "__main__":
    unittest.main()
