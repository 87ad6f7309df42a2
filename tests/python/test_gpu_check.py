"""Tests of tools/gpu_check.sh, which is for a machine with a GPU: all but the GPU, on a CPU with small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import unittest

from support import ROOT, ToolTest, folder

# isort: split
from tools.gpu import figures, hollow_models

SCRIPT = ROOT / "tools/gpu_check.sh"
SMALL = ("bert-small-bf16", "gpt2-small-bf16")
ONE_TEST = "Tiny/Differential.RightPaddedBatches/tiny_bert_sdpa"


class GpuCheckTest(ToolTest):
    def check(self, *arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
        chosen = {name: str(value) for name, value in environment.items()}
        return subprocess.run(
            [SCRIPT, *map(str, arguments)],
            env={**os.environ, "PYTHON": sys.executable, "LLMCACHE_GPU_CHECK_DEVICE": "cpu", **chosen},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_prepared_it_runs_on_a_cpu(self) -> None:
        programs = folder("LLMCACHE_BIN_DIR")
        folder("LLMCACHE_MODELS_DIR")
        prepared = self.check("prepare", self.folder, LLMCACHE_GPU_CHECK_MODELS=" ".join(SMALL))
        self.assertEqual(prepared.returncode, 0, prepared.stderr)
        with tarfile.open(self.folder / "packages.tar.gz") as packed:
            names = set(packed.getnames())
        for header in ("eigen3/Eigen/Core", "fmt/format.h", "gmock/gmock.h", "CLI/CLI.hpp", "xxhash.h", "sodium.h"):
            self.assertIn(f"usr/include/{header}", names)
        ran = self.check(
            "run", self.folder, LLMCACHE_GPU_CHECK_BIN=programs, LLMCACHE_GPU_CHECK_TESTS=ONE_TEST
        )
        self.assertEqual(ran.returncode, 0, ran.stdout + ran.stderr)
        found = json.loads((self.folder / "out/figures.json").read_text())
        self.assertEqual({step["became"] for step in found["steps"]}, {"done"})
        self.assertEqual(found["differential"], {"run": 1, "failed": []})
        self.assertEqual([model["model"] for model in found["models"]], list(SMALL))
        for model in found["models"]:
            for name, measure in model["measures"].items():
                self.assertLess(measure["difference"], 0.1, name)
        self.assertIn("decode_at_16", found["models"][1]["measures"])
        self.assertIn("ms", found["transformers"]["decode_at_16"]["static_cache"])

    def test_a_step_that_fails_is_told_and_the_others_go_on(self) -> None:
        for name in ("packages", "models"):
            with tarfile.open(self.folder / f"{name}.tar.gz", "w:gz"):
                pass
        ran = self.check("run", self.folder, LLMCACHE_GPU_CHECK_BIN=self.folder)
        self.assertEqual(ran.returncode, 1)
        self.assertIn("differential: FAILED", ran.stdout)
        self.assertIn("bench-gpt2-small-bf16: FAILED", ran.stdout)
        found = json.loads((self.folder / "out/figures.json").read_text())
        became = {step["step"]: step["became"] for step in found["steps"]}
        self.assertEqual(became["versions"], "done")
        self.assertNotEqual(became["transformers"], "done")

    def test_nothing_prepared_is_said(self) -> None:
        ran = self.check("run", self.folder)
        self.assertEqual(ran.returncode, 1)
        self.assertIn("nothing was prepared", ran.stderr)

    def test_no_time_left_is_told(self) -> None:
        for name in ("packages", "models"):
            with tarfile.open(self.folder / f"{name}.tar.gz", "w:gz"):
                pass
        self.check("run", self.folder, LLMCACHE_GPU_CHECK_BIN=self.folder, LLMCACHE_GPU_CHECK_SECONDS=0)
        found = json.loads((self.folder / "out/figures.json").read_text())
        self.assertEqual({step["became"] for step in found["steps"]}, {"out of time"})


class FiguresTest(ToolTest):
    def test_failed_tests_and_measures_are_named(self) -> None:
        (self.folder / "steps").write_text("differential 1 7\nbench-x 1 2\ntransformers 124 9\n")
        suites = [{"name": "S", "testsuite": [{"name": "good"}, {"name": "bad", "failures": [{"failure": "no"}]}]}]
        (self.folder / "tests.json").write_text(json.dumps({"tests": 2, "testsuites": suites}))
        measure = {"plain_ms": 4, "cache_ms": 2, "plain_by_cache": 2, "difference": 0.01}
        measures = {"miss": measure, "packed": {"error": "no memory"}}
        (self.folder / "bench-x.log").write_text(json.dumps({"model": "x", "measures": measures}))
        status, out, _ = self.run_tool(figures, self.folder)
        self.assertEqual(status, 1)
        found = json.loads((self.folder / "figures.json").read_text())
        self.assertEqual(found["differential"], {"run": 2, "failed": ["S.bad"]})
        self.assertIsNone(found["transformers"])
        self.assertIn("x miss: 2.000 ms, plain 4.000 ms, 2.00 times as fast", out)
        self.assertIn("x packed: no memory", out)
        self.assertIn("transformers: out of time", out)


class HollowModelsTest(ToolTest):
    def test_unknown_names_are_refused(self) -> None:
        status, _, err = self.run_tool(hollow_models, "fill", self.folder, "gpt9")
        self.assertNotEqual(status, 0)
        self.assertIn("gpt9", err)


if __name__ == "__main__":
    unittest.main()
