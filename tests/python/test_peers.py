"""Tests of benchmarks/peers: its statistics and tables, its lanes' processes, and one whole run on tiny models.

The whole run needs LLMCACHE_BIN_DIR (with llmcache-peer) and LLMCACHE_MODELS_DIR (with the tiny models)."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
import unittest
from typing import Any
from unittest import mock

import numpy as np
from support import ROOT, ToolTest  # lets the tools be imported

sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))

# isort: split
import compare
import table
from lanes import LANES, Lane, LaneError, LaneSpec


def lane_record(name: str, **changes: Any) -> dict[str, Any]:
    record = {
        "lane": name,
        "title": name.upper(),
        "ours": name.startswith("ours"),
        "note": "",
        "memory": {"resident": 204800, "before": 102400, "peak": 2048000, "proportional": 1},
        "quality": {"outputs": 3, "max_difference": 0.00123, "scale": 4.0, "argmax_agreement": 0.5},
    }
    return record | changes


def document(*lanes: dict[str, Any], family: str = "decoder") -> dict[str, Any]:
    times = {
        "transformers": table.summary({0: 50.0, 1: 52.0, 2: 54.0}),
        "ours": table.summary({0: 25.0, 1: 26.0, 2: 27.0}),
    }
    case = {"tokens": 512, "times": times, "ratios": {"transformers": {"ours": 2.0}}}
    if family == "decoder":
        case["prefill"] = {"ours": table.summary({0: 1234.5})}
    model = {"model": "gpt2", "family": family, "weights": "random (seed 0)", "cases": [case], "lanes": list(lanes)}
    return {
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 23.6},
        "threads": 1,
        "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
        "command": "tools/run.sh peers --model gpt2",
        "models": [model],
    }


class StatisticsTest(unittest.TestCase):
    def test_quantiles_lie_between_their_neighbours(self) -> None:
        self.assertEqual(table.quantile([4, 1, 3, 2], 0), 1)
        self.assertEqual(table.quantile([4, 1, 3, 2], 0.5), 2.5)
        self.assertEqual(table.quantile([4, 1, 3, 2], 1), 4)
        self.assertEqual(table.quantile([7], 0.25), 7)

    def test_ratios_are_of_what_ran_together(self) -> None:
        # The machine is ten times slower at 2; the lane is twice as slow at all times.
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

    def test_nan_is_wrong(self) -> None:
        quality = table.Quality()
        quality.add(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
        self.assertTrue(quality.wrong(1.0))


class TableTest(unittest.TestCase):
    def test_a_row_a_lane(self) -> None:
        rows = table.model_rows(
            document(lane_record("transformers", reference=True), lane_record("ours"))["models"][0], spread=True
        )
        self.assertEqual(
            rows,
            [
                ["lane", "ms a token at context 512", "MiB", "before loading", "peak", "max diff", "argmax"],
                ["TRANSFORMERS", "52.0 (51.0-53.0)", "200", "100", "2,000", "0", "50 %"],
                ["OURS", "26.0 (25.5-26.5)", "200", "100", "2,000", "1.2e-03", "50 %"],
            ],
        )

    def test_a_lane_that_failed_shows_no_figures(self) -> None:
        failed = lane_record("ours", failed="out of memory")
        del failed["memory"]
        text = table.text_report(document(lane_record("transformers"), failed))
        row = next(line for line in text.splitlines() if line.startswith("OURS "))
        self.assertEqual(row.split(), ["OURS", "failed", "-", "-", "-", "-", "-"])
        self.assertIn("OURS: out of memory", text)
        self.assertNotIn("time / ours", text)

    def test_ratios_and_prefill(self) -> None:
        text = table.text_report(document(lane_record("transformers"), lane_record("ours")))
        self.assertRegex(text, r"time / ours +512: ours\nTRANSFORMERS +2\.00\n")
        self.assertRegex(text, r"prefill +ms, 512 tokens\nOURS +1,23[45]\n")

    def test_encoders_have_no_tokens_to_agree_on(self) -> None:
        text = table.markdown_report(document(lane_record("transformers"), family="encoder"))
        self.assertIn(
            "| lane | ms, 512 tokens | MiB | before loading | peak | max diff |\n|---|---|---|---|---|---|\n", text
        )

    def test_markdown_says_where_and_how(self) -> None:
        ours = lane_record("ours", steps={"tokens": 1000, "reused": 995})
        text = table.markdown_report(document(lane_record("transformers"), ours))
        self.assertIn("A CPU, 2 cores, 24 GiB; 1 thread a lane; torch 2.13.0, onnxruntime 1.32.0", text)
        self.assertIn("weights: random (seed 0)", text)
        self.assertIn("OURS: 99.5 % of the tokens of its steps were known", text)
        self.assertTrue(text.endswith("Command: `tools/run.sh peers --model gpt2`\n"))

    def test_command_leaves_folders_out(self) -> None:
        shown = compare.command(["--models", "/a b", "--quick", "--json=/c", "--model", "gpt2"])
        self.assertEqual(shown, "tools/run.sh peers --quick --model gpt2")


class LanesTest(ToolTest):
    def lane(self, script: str, timeout: float = 5) -> Lane:
        program = self.folder / "llmcache-peer"
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        spec = LaneSpec("scripted", "Scripted", "encoder", "peer", {"lane": "plain"})
        return Lane(spec, program, 1, timeout)

    READY = 'echo \'{"ready": true, "versions": {}}\'\n'

    def test_names_are_unique_and_the_first_is_the_reference(self) -> None:
        for specs in LANES.values():
            self.assertEqual(len({spec.name for spec in specs}), len(specs))
            self.assertEqual(specs[0].name, "transformers")
            self.assertTrue(specs[0].keeps)

    def test_answers_come_back(self) -> None:
        lane = self.lane(self.READY + 'while read -r line; do echo "{\\"got\\": $line}"; done\n')
        self.addCleanup(lane.close)
        self.assertEqual(lane.ask(op="step", id=3), {"got": {"op": "step", "id": 3}})
        self.assertGreater(lane.memory()["resident"], 0)

    def test_errors_are_named(self) -> None:
        for script, message in {
            "exit 3": r"scripted: .*ended \(status 3\)",
            "echo hello; cat": "no JSON",
            "sleep 60": "no answer",
        }.items():
            with self.subTest(script), self.assertRaisesRegex(LaneError, message):
                self.lane(script, timeout=0.5)
        lane = self.lane(self.READY + 'read -r line; echo \'{"error": "out of luck"}\'; read -r line; kill -9 $$')
        self.addCleanup(lane.close)
        with self.assertRaisesRegex(LaneError, "scripted: out of luck"):
            lane.ask(op="pass")
        for _ in range(2):
            with self.assertRaisesRegex(LaneError, "scripted: "):
                lane.ask(op="pass")

    def test_a_missing_program_is_named(self) -> None:
        spec = LaneSpec("scripted", "Scripted", "encoder", "peer", {"lane": "plain"})
        with self.assertRaisesRegex(LaneError, "cannot be started"):
            Lane(spec, self.folder / "none", 1, 1)


class CompareTest(ToolTest):
    @classmethod
    def setUpClass(cls) -> None:
        for variable in ("LLMCACHE_BIN_DIR", "LLMCACHE_MODELS_DIR"):
            if variable not in os.environ:
                raise RuntimeError(f"{variable} is not set: run the tests with tools/run.sh test")
        cls.folders = ["--bin", os.environ["LLMCACHE_BIN_DIR"], "--models", os.environ["LLMCACHE_MODELS_DIR"]]

    def compare(self, *arguments: object) -> tuple[int, str, str]:
        return self.run_tool(compare, *self.folders, "--onnx", self.folder, "--quick", *arguments)

    def test_lanes_agree_on_tiny_models(self) -> None:
        results, tables = self.folder / "results.json", self.folder / "tables.md"
        names = ("transformers", "transformers-nocache", "torchscript", "torchscript-frozen", "ours")
        status, out, err = self.compare(
            "--model", "tiny-bert-sdpa", "tiny-llama-sdpa", "--lane", *names, "--json", results, "--markdown", tables
        )
        self.assertEqual(status, 0, err)
        known = json.loads(results.read_text())
        self.assertIn("transformers", known["versions"])
        self.assertIn("LLMCache", known["versions"])
        encoder, decoder = known["models"]
        self.assertEqual([lane["lane"] for lane in decoder["lanes"]], list(names))
        self.assertEqual([lane["lane"] for lane in encoder["lanes"]], [n for n in names if n != "transformers-nocache"])
        for model in (encoder, decoder):
            for lane in model["lanes"]:
                with self.subTest(model=model["model"], lane=lane["lane"]):
                    self.assertNotIn("failed", lane)
                    self.assertGreater(lane["memory"]["resident"], lane["memory"]["before"])
                    self.assertGreaterEqual(lane["memory"]["peak"], lane["memory"]["resident"])
                    if lane["lane"] != "transformers":
                        self.assertGreater(lane["quality"]["outputs"], 0)
                        self.assertLess(lane["quality"]["max_difference"], 1e-4 * lane["quality"]["scale"])
        times = decoder["cases"][0]["times"]
        self.assertEqual(times["ours"]["count"], 3)  # --quick: 3 steps
        self.assertEqual(times["torchscript"]["count"], 2)  # computes the whole sequence
        self.assertEqual(set(decoder["cases"][0]["prefill"]), {"transformers", "ours"})
        # 2 steps settle; the others are asked about 32 + 3, + 4 and + 5 tokens.
        self.assertEqual(decoder["lanes"][0]["steps"], {"tokens": 35 + 36 + 37, "reused": 34 + 35 + 36})
        self.assertIn("**tiny-llama-sdpa (decode steps; weights: random (seed 0))**", tables.read_text())
        self.assertIn("LLMCache, weights as loaded", out)

    def test_a_lane_with_other_weights_fails_and_the_others_go_on(self) -> None:
        # The lane runs another model than the reference.
        ask = Lane.ask

        def other_model(lane: Lane, /, **request: Any) -> dict[str, Any]:
            if lane.spec.name == "torchscript" and request["op"] == "load":
                request["model"] = request["model"].replace("tiny-bert-sdpa", "tiny-scripted")
            return ask(lane, **request)

        with mock.patch.object(Lane, "ask", other_model):
            status, out, err = self.compare("--model", "tiny-bert-sdpa", "--lane", "torchscript", "ours")
        self.assertEqual(status, 1)
        self.assertIn("torchscript: its results are not those of transformers", err)
        self.assertRegex(out, r"TorchScript, plain +failed")
        self.assertRegex(out, r"LLMCache, weights as loaded +\d")

    def test_without_the_reference_there_is_nothing_to_compare(self) -> None:
        broken = [dataclasses.replace(LANES["encoder"][0], settings={"lane": "no-such-library"}), *LANES["encoder"][1:]]
        with mock.patch.dict(LANES, encoder=broken):
            status, _, err = self.compare("--model", "tiny-bert-sdpa", "--lane", "torchscript")
        self.assertEqual(status, 2)
        self.assertIn("nothing to compare with", err)

    def test_bad_arguments_are_refused(self) -> None:
        for arguments, message in {
            ("--model", "no-such-model"): "no-such-model",
            ("--lane", "no-such-lane"): "no-such-lane",
            ("--threads", "0"): "above 0",
        }.items():
            with self.subTest(arguments):
                status, _, err = self.compare(*arguments)
                self.assertEqual(status, 2)
                self.assertIn(message, err)
        status, _, err = self.run_tool(compare, "--models", self.folder, "--model", "tiny-bert-sdpa")
        self.assertEqual(status, 2)
        self.assertIn("export_models.py --only tiny-bert-sdpa", err)

    def test_list_names_the_lanes(self) -> None:
        status, out, _ = self.run_tool(compare, "--list")
        self.assertEqual(status, 0)
        self.assertEqual(len(out.splitlines()), sum(map(len, LANES.values())))


if __name__ == "__main__":
    unittest.main()
