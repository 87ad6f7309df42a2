"""llmcache-bench from outside: its JSON fits benchmarks/results.schema.json, and mistakes end with one clear line.

Needs LLMCACHE_BIN_DIR, LLMCACHE_MODELS_DIR (with minilm) and LLMCACHE_DATA_DIR (with the workload `sample`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = Path(__file__).resolve().parents[2] / "benchmarks" / "results.schema.json"
MODEL, WORKLOAD = "minilm", "sample"


def folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise unittest.SkipTest(f"{variable} is not set")
    return Path(value)


class BenchTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.program = folder("LLMCACHE_BIN_DIR") / "llmcache-bench"
        cls.models, cls.data = folder("LLMCACHE_MODELS_DIR"), folder("LLMCACHE_DATA_DIR")
        cls.token_file = cls.data / f"{WORKLOAD}.bert-base-uncased.safetensors"
        for needed in (cls.program, cls.models / f"{MODEL}.pt", cls.models / f"{MODEL}.json", cls.token_file):
            if not needed.exists():
                raise unittest.SkipTest(f"{needed} is not there")

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.temporary = Path(temporary.name)

    def bench(self, *arguments: str | Path, models: Path | None = None, data: Path | None = None) -> Any:
        command = [self.program, "--models", models or self.models, "--data", data or self.data, *arguments]
        return subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=300, check=False
        )

    def results(self, *arguments: str) -> tuple[dict[str, Any], str]:
        target = self.temporary / "results.json"
        run = self.bench("--model", MODEL, "--workload", WORKLOAD, "--limit", "4", "--json", target, *arguments)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertEqual([path.name for path in self.temporary.iterdir()], ["results.json"], "leftover files")
        text = target.read_text(encoding="utf-8")

        def refuse(constant: str) -> None:
            self.fail(f"{constant} is not JSON")

        document = json.loads(text, parse_constant=refuse)
        jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(document)
        return document, run.stdout

    def assert_fails(self, run: Any, *parts: str) -> None:
        self.assertEqual(run.returncode, 2, run.stdout + run.stderr)
        errors = [line for line in run.stderr.splitlines() if line.startswith("llmcache-bench: error: ")]
        self.assertEqual(len(errors), 1, run.stderr)
        for part in parts:
            self.assertIn(part, errors[0])

    def test_schema_is_a_schema(self) -> None:
        jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))

    def test_results_of_both_modes(self) -> None:
        document, table = self.results()
        plain, cached = document["records"]
        self.assertEqual((plain["mode"], cached["mode"]), ("nocache", "llmcache"))
        self.assertEqual((plain["fidelity"], cached["fidelity"]), (None, "lossless"))
        for record in (plain, cached):
            self.assertEqual((record["requests"], record["requests_available"]), (4, 4))
            self.assertEqual((record["zipf"], record["threads"]), (None, 1))
            self.assertIn(record["weights"], table)
        self.assertGreaterEqual(plain["tokens_computed_fraction"], 1)
        self.assertGreater(cached["speedup_vs_nocache"], 0)
        self.assertLess(cached["divergence"]["max"], 1e-4)
        self.assertGreater(cached["cache_bytes"], 0)

    def test_repeats_are_hits(self) -> None:
        # With this exponent nearly every draw is the first request.
        document, _ = self.results("--zipf", "8", "--fidelity", "identical", "--shuffle", "3")
        cached = document["records"][1]
        self.assertEqual((cached["zipf"], cached["shuffle"], cached["fidelity"]), (8, 3, "identical"))
        self.assertGreaterEqual(cached["hit_rate"], 0.5)
        self.assertLess(cached["tokens_computed_fraction"], 1)
        self.assertEqual(cached["divergence"]["max"], 0)

    def test_similarity(self) -> None:
        # At -1 everything is similar: all but the first sequences are hits.
        document, table = self.results("--mode", "nocache,llmcache,doccache", "--fidelity", "threshold", "--threshold",
                                       "-1,1", "--fingerprint", "raw", "--centre", "off", "--cache-layers", "0,5")
        plain, loose, strict, loose_rival, strict_rival = document["records"]
        self.assertIsNone(plain["threshold"])
        for record in (loose, strict, loose_rival, strict_rival):
            self.assertEqual((record["fingerprint"], record["fingerprint_layer"]), ("raw", 0))
            self.assertEqual((record["centring"], record["eviction"]), ("off", "lru"))
            self.assertIsNone(record["task"])
        self.assertEqual((loose["mode"], loose["fidelity"], loose["threshold"]), ("llmcache", "threshold", -1))
        self.assertEqual((loose_rival["mode"], loose_rival["fidelity"]), ("doccache", None))
        self.assertEqual(loose["cache_layers"], "0,5")
        self.assertIsNone(loose_rival["cache_layers"])
        for record in (loose, loose_rival):
            self.assertGreater(record["hit_rate"], 0)
            self.assertGreater(record["divergence"]["max"], 0.1)
            self.assertLess(record["tokens_computed_fraction"], plain["tokens_computed_fraction"])
        self.assertEqual(loose["hit_rate"], loose_rival["hit_rate"])
        self.assertAlmostEqual(sum(loose["hit_rate_by_layer"]), loose["hit_rate"])
        self.assertLess(strict["divergence"]["max"], 1e-4)
        self.assertIn("llmcache/threshold -1.00", table)

    def test_layer_that_is_not_there(self) -> None:
        run = self.bench("--model", MODEL, "--workload", WORKLOAD, "--limit", "1", "--threshold", "0.9",
                         "--cache-layers", "6")
        self.assert_fails(run, "no layer 6", "0 to 5")

    def test_one_mode_alone(self) -> None:
        document, _ = self.results("--mode", "llmcache")
        (cached,) = document["records"]
        self.assertIsNone(cached["speedup_vs_nocache"])
        self.assertIsNone(cached["divergence"]["max"])
        document, _ = self.results("--mode", "nocache")
        self.assertEqual([record["mode"] for record in document["records"]], ["nocache"])

    def test_list_and_help(self) -> None:
        listed = self.bench("--list")
        self.assertEqual(listed.returncode, 0, listed.stderr)
        self.assertIn(MODEL, listed.stdout)
        self.assertIn(WORKLOAD, listed.stdout)
        helped = self.bench("--help")
        self.assertEqual(helped.returncode, 0)
        for option in ("--model", "--workload", "--mode", "--fidelity", "--threads", "--limit", "--seconds", "--shuffle",
                       "--zipf", "--capacity-mib", "--data", "--models", "--json", "--list", "--tokenizer", "--threshold",
                       "--fingerprint", "--fingerprint-layer", "--centre", "--pca", "--cache-layers", "--eviction",
                       "--ttl", "--shadow-rate"):
            self.assertIn(option, helped.stdout)

    def test_bad_arguments(self) -> None:
        for arguments, part in (
            (("--threads", "0"), "1 to 1024"),
            (("--limit", "none"), "--limit"),
            (("--seconds", "nan"), "--seconds"),
            (("--shuffle", "-1"), "--shuffle"),
            (("--mode", "turbo"), "turbo"),
            (("--fidelity", "budget"), "budget"),
            (("--threshold", "1.5"), "-1 to 1"),
            (("--fingerprint", "md5"), "md5"),
            (("--cache-layers", "first"), "first"),
            (("--nonsense",), "--nonsense"),
        ):
            with self.subTest(arguments=arguments):
                self.assert_fails(self.bench(*arguments), part)

    def test_what_is_not_there(self) -> None:
        limit = ("--limit", "1")
        self.assert_fails(self.bench("--model", "no-such", *limit), "no-such", MODEL)
        self.assert_fails(self.bench("--model", "no/such.pt", *limit), "no/such.pt")
        self.assert_fails(self.bench("--workload", "no-such", *limit), "no-such", WORKLOAD)
        self.assert_fails(self.bench("--model", MODEL, *limit, models=self.temporary / "x"), "models folder")
        self.assert_fails(self.bench("--model", MODEL, *limit, data=self.temporary / "x"), "data folder")
        self.assert_fails(self.bench("--model", MODEL, *limit, data=self.temporary), "prepare the data")
        self.assert_fails(self.bench("--json", self.temporary / "x" / "y.json", *limit), "--json")

    def test_damaged_token_file(self) -> None:
        damaged = self.temporary / self.token_file.name
        damaged.write_bytes(self.token_file.read_bytes()[:-5])
        self.assert_fails(self.bench("--model", MODEL, "--limit", "1", data=self.temporary), damaged.name, "truncated")

    def test_damaged_model(self) -> None:
        run = ("--model", MODEL, "--workload", WORKLOAD, "--limit", "1")
        model, sidecar = self.temporary / f"{MODEL}.pt", self.temporary / f"{MODEL}.json"
        shutil.copy(self.models / sidecar.name, sidecar)
        model.write_bytes(b"not a model")
        self.assert_fails(self.bench(*run, models=self.temporary), model.name, "export the model again")
        sidecar.write_text("{", encoding="utf-8")
        self.assert_fails(self.bench(*run, models=self.temporary), sidecar.name)
        sidecar.unlink()
        self.assert_fails(self.bench(*run, models=self.temporary), "--tokenizer")
        tokenizer = ("--tokenizer", "bert-base-uncased")
        self.assert_fails(self.bench(*run, *tokenizer, models=self.temporary), "cannot be loaded as TorchScript")

    def test_model_by_path_without_sidecar(self) -> None:
        model = self.temporary / "mine.pt"
        model.symlink_to((self.models / f"{MODEL}.pt").resolve())
        run = self.bench("--model", model, "--tokenizer", "bert-base-uncased", "--workload", WORKLOAD, "--limit", "2",
                         "--mode", "nocache")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("unknown", run.stdout)


if __name__ == "__main__":
    unittest.main()
