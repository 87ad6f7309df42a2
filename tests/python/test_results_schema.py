"""llmcache-bench from outside: its JSON fits the schema that it prints, and mistakes end with one clear line.

Needs LLMCACHE_BIN_DIR, and LLMCACHE_MODELS_DIR with ENCODER and DECODER.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from support import folder, results_schema  # lets the tools be imported

# isort: split
from tools.data import token_file

ENCODER, DECODER = "tiny-bert-sdpa", "tiny-llama-sdpa"  # of three layers and of four, with the tokenizer "tiny"
WORKLOAD = "sample"
Rows = list[list[int]]


def write_tokens(data: Path, workload: str, rows: Rows, task: str = "", **more: Any) -> Path:
    """A token file for the tiny models, of one sequence a request unless `request_offsets` says otherwise."""
    data.mkdir(exist_ok=True)
    arrays = {
        "tokens": np.array([token for row in rows for token in row], dtype=np.int32),
        "sequence_offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
        "request_offsets": np.arange(len(rows) + 1, dtype=np.int64),
        **{name: np.array(values, dtype=np.int64) for name, values in more.items() if isinstance(values, list)},
    }
    metadata = {
        **dict.fromkeys(("source", "description", "order"), "made up"),
        "version": "2",
        "workload": workload,
        "tokenizer": "tiny",
        "max_tokens": "512",
        "task": task,
        **{name: value for name, value in more.items() if isinstance(value, str)},
    }
    path = data / f"{workload}.tiny.safetensors"
    token_file.save(path, arrays, metadata)
    return path


class BenchTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.program, cls.models = folder("LLMCACHE_BIN_DIR") / "llmcache-bench", folder("LLMCACHE_MODELS_DIR")
        for needed in (cls.program, *(cls.models / f"{model}.json" for model in (ENCODER, DECODER))):
            if not needed.exists():
                raise unittest.SkipTest(f"{needed} is not there")
        data = tempfile.TemporaryDirectory()
        cls.addClassCleanup(data.cleanup)
        cls.data = Path(data.name)
        short = [[1, *range(10 * row, 10 * row + 5 + row % 2), 2] for row in range(3, 9)]  # two batches of three
        long = [[1, *range(100, 140), 2], [1, *range(200, 240), 2]]
        cls.token_file = write_tokens(cls.data, WORKLOAD, [*short, *long], request_offsets=[0, 3, 6, 7, 8])

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.temporary = Path(temporary.name)

    def bench(self, *arguments: str | Path, models: Path | None = None, data: Path | None = None) -> Any:
        command = [self.program, "--models", models or self.models, "--data", data or self.data, *arguments]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)

    def results(self, *arguments: str) -> tuple[dict[str, Any], str]:
        return self.run_to_json("--model", ENCODER, "--workload", WORKLOAD, "--limit", "4", *arguments)

    def run_to_json(self, *arguments: str, data: Path | None = None) -> tuple[dict[str, Any], str]:
        target = self.temporary / "results.json"
        run = self.bench("--json", target, *arguments, data=data)
        self.assertEqual(run.returncode, 0, run.stderr)
        files = [path.name for path in self.temporary.iterdir() if path.is_file()]
        self.assertEqual(files, ["results.json"], "leftover files")
        text = target.read_text(encoding="utf-8")

        def refuse(constant: str) -> None:
            self.fail(f"{constant} is not JSON")

        document = json.loads(text, parse_constant=refuse)
        jsonschema.Draft202012Validator(results_schema()).validate(document)
        return document, run.stdout

    def folder_of(self, workload: str, rows: Rows, task: str = "", **more: Any) -> Path:
        """A folder with that workload alone."""
        return write_tokens(self.temporary / "data", workload, rows, task, **more).parent

    def assert_fails(self, run: Any, *parts: str) -> None:
        self.assertEqual(run.returncode, 2, run.stdout + run.stderr)
        errors = [line for line in run.stderr.splitlines() if line.startswith("llmcache-bench: error: ")]
        self.assertEqual(len(errors), 1, run.stderr)
        for part in parts:
            self.assertIn(part, errors[0])

    def test_schema_is_a_schema(self) -> None:
        schema = results_schema()
        jsonschema.Draft202012Validator.check_schema(schema)
        record = schema["$defs"]["record"]
        self.assertFalse(record["additionalProperties"])
        self.assertLessEqual({"model", "workload", "mode", "latency_ms", "versions"}, set(record["required"]))
        self.assertEqual(record["properties"]["mode"]["enum"], ["nocache", "kvcache", "llmcache", "semantic-cache"])

    def test_wrapping_is_kept_beside_the_model(self) -> None:
        models = self.temporary / "models"
        models.mkdir()
        for end in ("pt", "json"):
            (models / f"{ENCODER}.{end}").symlink_to(self.models / f"{ENCODER}.{end}")
        for expected in ("was written", "was read"):
            run = self.bench("--model", ENCODER, "--workload", WORKLOAD, "--limit", "1", models=models)
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertIn(f" {expected}", run.stdout)
            self.assertTrue((models / f"{ENCODER}.pt.as-loaded.profile").is_file())

    def test_results_of_both_modes(self) -> None:
        document, table = self.results()
        plain, cached = document["records"]
        self.assertEqual((plain["mode"], cached["mode"]), ("nocache", "llmcache"))
        self.assertEqual((plain["fidelity"], cached["fidelity"]), (None, "lossless"))
        for record in (plain, cached):
            self.assertEqual((record["requests"], record["requests_available"]), (4, 4))
            self.assertEqual((record["shuffle"], record["threads"]), (None, 1))
            self.assertEqual(record["weights"], "random (seed 0)")
            self.assertIn("random weights", table)
        self.assertGreaterEqual(plain["tokens_computed_fraction"], 1)
        self.assertGreater(cached["speedup_vs_nocache"], 0)
        self.assertLess(cached["divergence"]["max"], 1e-4)
        self.assertGreater(cached["cache_bytes"], 0)

    def test_repeats_are_hits(self) -> None:
        data = self.folder_of("popular", [[5, 6, 7, 8], [9, 10, 11], [5, 6, 7, 8], [5, 6, 7, 8]])
        chosen = ("--model", DECODER, "--workload", "popular", "--mode", "nocache,llmcache")
        document, _ = self.run_to_json(*chosen, "--fidelity", "identical", "--shuffle", "3", data=data)
        cached = document["records"][1]
        self.assertEqual((cached["shuffle"], cached["fidelity"], cached["hit_rate"]), (3, "identical", 0.5))
        self.assertLess(cached["tokens_computed_fraction"], 1)
        self.assertEqual(cached["divergence"]["max"], 0)

    def test_similarity(self) -> None:
        # At -1 everything is similar: all but the first sequences are hits.
        document, table = self.results(
            "--mode",
            "nocache,llmcache,semantic-cache",
            "--fidelity",
            "threshold",
            "--threshold",
            "-1,1",
            "--fingerprint",
            "raw",
            "--centre",
            "off",
            "--cache-layers",
            "0,2",
        )
        plain, loose, strict, loose_rival, strict_rival = document["records"]
        self.assertIsNone(plain["threshold"])
        for record in (loose, strict, loose_rival, strict_rival):
            self.assertEqual((record["fingerprint"], record["fingerprint_layer"]), ("raw", 0))
            self.assertEqual((record["centring"], record["eviction"]), ("off", "lru"))
            self.assertIsNone(record["task"])
        self.assertEqual((loose["mode"], loose["fidelity"], loose["threshold"]), ("llmcache", "threshold", -1))
        self.assertEqual((loose_rival["mode"], loose_rival["fidelity"]), ("semantic-cache", None))
        self.assertEqual(loose["cache_layers"], "0,2")
        self.assertIsNone(loose_rival["cache_layers"])
        for record in (loose, loose_rival):
            self.assertGreater(record["hit_rate"], 0)
            self.assertGreater(record["divergence"]["max"], 0.1)
            self.assertLess(record["tokens_computed_fraction"], plain["tokens_computed_fraction"])
        self.assertEqual(loose["hit_rate"], loose_rival["hit_rate"])
        self.assertAlmostEqual(sum(loose["hit_rate_by_layer"]), loose["hit_rate"])
        self.assertLess(strict["divergence"]["max"], 1e-4)
        self.assertIn("llmcache/threshold -1.00", table)

    def test_decoder(self) -> None:
        passage = list(range(1, 41))
        rows = [[*passage, 100 + i, 110 + i, 120 + i] for i in range(4)]
        data = self.folder_of("squad", rows, "answer", scored=[[42, 43]] * 4, group=[0, 1, 2, 3])
        chosen = ("--model", DECODER, "--workload", "squad", "--weights", "as-loaded,packed-fp32")
        document, table = self.run_to_json(*chosen, "--limit", "4", data=data)
        names = [(r["mode"], r["fidelity"], r["weights_held"], r["output"]) for r in document["records"]]
        both = [("lossless", held, "last+new") for held in ("as-loaded", "packed-fp32")]
        self.assertEqual(
            names,
            [
                ("nocache", None, "as-loaded", "all"),
                *(("kvcache", *one) for one in both),
                *(("llmcache", *one) for one in both),
            ],
        )
        for record in document["records"][1:]:
            self.assertEqual(record["greedy"]["different"], record["greedy"]["tied"], record["mode"])
            self.assertEqual(record["greedy"]["compared"], 4 * 2)
            self.assertGreater(record["prefill_speedup_vs_kvcache"], 0)
            self.assertEqual(record["tokens_reused_fraction"] > 0, record["mode"] == "llmcache")
            self.assertIsNone(record["decode_ms"])
        self.assertIn("llmcache/lossless packed-fp32", table)
        self.assertIn("prefill ms", table)

    def test_generation(self) -> None:
        rows = [[*range(1, 11), i] for i in range(20, 24)] + [[7, 8], [9]]
        data = self.folder_of(
            "chat", rows, "generation", request_offsets=[0, 1, 2, 3, 6], new_tokens="5", stop_token="299"
        )
        document, table = self.run_to_json("--model", DECODER, "--workload", "chat", data=data)
        plain, kvcache, cached = document["records"]
        self.assertEqual([record["mode"] for record in document["records"]], ["nocache", "kvcache", "llmcache"])
        self.assertIsNone(plain["greedy"])
        for record in (plain, kvcache, cached):
            self.assertEqual((record["requests"], record["sequences"]), (4, 6))
            self.assertGreater(record["decode_ms"]["mean"], 0)
            self.assertEqual(record["later_turns"]["turns"], 2)
            self.assertIsNone(record["task"])
        for record in (kvcache, cached):
            self.assertEqual(record["greedy"]["different"], record["greedy"]["tied"])
        self.assertEqual(kvcache["later_turns"]["tokens_reused_fraction"], 0)
        self.assertGreater(cached["later_turns"]["tokens_reused_fraction"], 0.5)
        self.assertIn("tokens/s", table)

    def test_what_decoders_alone_can_do(self) -> None:
        run = self.bench("--model", ENCODER, "--workload", WORKLOAD, "--limit", "1", "--mode", "kvcache")
        self.assert_fails(run, "mode kvcache is for causal models", ENCODER)
        run = self.bench("--model", ENCODER, "--workload", "generate", "--limit", "1")
        self.assert_fails(run, "no workload 'generate'")
        run = self.bench("--model", ENCODER, "--workload", "openbookqa-3shot", "--limit", "1")
        self.assert_fails(run, "no workload 'openbookqa-3shot'")

    def test_packed_weights_of_an_encoder(self) -> None:
        document, table = self.results("--weights", "packed-fp16")
        plain, cached = document["records"]
        self.assertEqual((plain["weights_held"], cached["weights_held"]), ("as-loaded", "packed-fp16"))
        self.assertGreater(cached["divergence"]["mean"], 1e-6)
        self.assertLess(cached["divergence"]["max"], 0.05)
        self.assertIn("packed MiB", table)

    def test_layer_that_is_not_there(self) -> None:
        run = self.bench(
            "--model", ENCODER, "--workload", WORKLOAD, "--limit", "1", "--threshold", "0.9", "--cache-layers", "3"
        )
        self.assert_fails(run, "no layer 3", "0 to 2")

    def test_one_mode_alone(self) -> None:
        document, _ = self.results("--mode", "llmcache")
        (cached,) = document["records"]
        self.assertIsNone(cached["speedup_vs_nocache"])
        self.assertIsNone(cached["divergence"]["max"])
        document, _ = self.results("--mode", "nocache")
        self.assertEqual([record["mode"] for record in document["records"]], ["nocache"])

    def test_configuration(self) -> None:
        file = self.temporary / "mine.json"
        settings = {"model": ENCODER, "workload": WORKLOAD, "limit": 9, "mode": ["nocache", "llmcache"]}
        file.write_text(json.dumps({"settings": settings}), encoding="utf-8")
        needs = self.bench("--config", file, "--needs")
        self.assertEqual(needs.stdout, f"models {ENCODER}\nworkloads {WORKLOAD}\nsample \nbudgets \n")
        run = self.bench("--config", file, "--limit", "2", "--mode", "nocache")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("2/2", run.stdout)
        self.assertNotIn("llmcache/", run.stdout)
        file.write_text(json.dumps({"settings": {"modle": ENCODER}}), encoding="utf-8")
        self.assert_fails(self.bench("--config", file), str(file), "no setting 'modle'")
        self.assert_fails(self.bench("--config", "no-such"), "configuration no-such")

    def test_list_and_help(self) -> None:
        listed = self.bench("--list")
        self.assertEqual(listed.returncode, 0, listed.stderr)
        self.assertIn(ENCODER, listed.stdout)
        self.assertIn(WORKLOAD, listed.stdout)
        helped = self.bench("--help")
        self.assertEqual(helped.returncode, 0)
        for option in (
            "--config",
            "--model",
            "--workload",
            "--mode",
            "--fidelity",
            "--threads",
            "--limit",
            "--seconds",
            "--shuffle",
            "--capacity-mib",
            "--data",
            "--models",
            "--json",
            "--list",
            "--tokenizer",
            "--threshold",
            "--fingerprint",
            "--fingerprint-layer",
            "--centre",
            "--cache-layers",
            "--eviction",
            "--ttl",
            "--audit-rate",
            "--weights",
            "--output",
            "--metric",
            "--epsilon",
            "--delta",
            "--calibration",
            "--early-exit",
        ):
            self.assertIn(option, helped.stdout)

    def test_bad_arguments(self) -> None:
        for arguments, part in (
            (("--threads", "0"), "1 to 1024"),
            (("--limit", "none"), "--limit"),
            (("--seconds", "nan"), "--seconds"),
            (("--shuffle", "-1"), "--shuffle"),
            (("--mode", "turbo"), "turbo"),
            (("--fidelity", "sloppy"), "sloppy"),
            (("--metric", "speed"), "speed"),
            (("--epsilon", "0"), "0"),
            (("--early-exit", "late"), "late"),
            (("--calibration", "profile.json"), "profile.json"),
            (("--weights", "int8"), "int8"),
            (("--output", "some"), "some"),
            (("--threshold", "1.5"), "-1 to 1"),
            (("--fingerprint", "md5"), "md5"),
            (("--cache-layers", "first"), "first"),
            (("--nonsense",), "--nonsense"),
        ):
            with self.subTest(arguments=arguments):
                self.assert_fails(self.bench(*arguments), part)

    def test_what_is_not_there(self) -> None:
        limit = ("--limit", "1")
        self.assert_fails(self.bench("--model", "no-such", *limit), "no-such", ENCODER)
        self.assert_fails(self.bench("--model", "no/such.pt", *limit), "no/such.pt")
        self.assert_fails(self.bench("--model", ENCODER, "--workload", "no-such", *limit), "no-such", WORKLOAD)
        self.assert_fails(self.bench("--model", ENCODER, *limit, models=self.temporary / "x"), "models folder")
        self.assert_fails(self.bench("--model", ENCODER, *limit, data=self.temporary / "x"), "data folder")
        self.assert_fails(self.bench("--model", ENCODER, *limit, data=self.temporary), "prepare the data")
        target = self.temporary / "x" / "y.json"
        self.assert_fails(self.bench("--model", ENCODER, "--json", target, *limit), "--json")

    def test_damaged_token_file(self) -> None:
        damaged = self.temporary / self.token_file.name
        damaged.write_bytes(self.token_file.read_bytes()[:-5])
        self.assert_fails(self.bench("--model", ENCODER, "--limit", "1", data=self.temporary), damaged.name, "truncated")

    def test_damaged_model(self) -> None:
        run = ("--model", ENCODER, "--workload", WORKLOAD, "--limit", "1")
        model, sidecar = self.temporary / f"{ENCODER}.pt", self.temporary / f"{ENCODER}.json"
        shutil.copy(self.models / sidecar.name, sidecar)
        model.write_bytes(b"not a model")
        self.assert_fails(self.bench(*run, models=self.temporary), model.name, "export the model again")
        sidecar.write_text("{", encoding="utf-8")
        self.assert_fails(self.bench(*run, models=self.temporary), sidecar.name)
        sidecar.unlink()
        self.assert_fails(self.bench(*run, models=self.temporary), "--tokenizer")
        tokenizer = ("--tokenizer", "tiny")
        self.assert_fails(self.bench(*run, *tokenizer, models=self.temporary), "cannot be loaded as TorchScript")

    def test_model_by_path_without_sidecar(self) -> None:
        model = self.temporary / "mine.pt"
        model.symlink_to((self.models / f"{ENCODER}.pt").resolve())
        run = self.bench(
            "--model",
            model,
            "--tokenizer",
            "tiny",
            "--workload",
            WORKLOAD,
            "--limit",
            "2",
            "--mode",
            "nocache",
        )
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("unknown", run.stdout)


class BudgetFieldsTest(unittest.TestCase):
    """The fields of runs under an error budget, which other records may leave out."""

    def fits(self, field: str, value: Any) -> bool:
        schema = results_schema()
        record = schema["$defs"]["record"]
        self.assertNotIn(field, record["required"])
        part = {"$defs": schema["$defs"], "$ref": f"#/$defs/record/properties/{field}"}
        return jsonschema.Draft202012Validator(part).is_valid(value)

    def test_what_they_hold(self) -> None:
        error = {"value": 0.01, "low": 0.0, "high": 0.02, "n": 1540}
        shares = {"early_exit": 0.5, "cache_free_exit": None, "token_reuse": 0.0, "segment_reuse": 0.0}
        for field, good, bad in (
            ("budget_metric", ["decision", "relative", "token"], ["accuracy", 1]),
            ("budget_epsilon", [0.005, 1], [0, -0.1, 1.5, "1 %"]),
            ("budget_delta", [0.05], [0, 1]),
            ("promised_error", [0, 0.01, 1], [-0.1, 1.1]),
            ("observed_error", [error, {**error, "low": None}], [0.01, {"value": 0.01}, {**error, "n": -1}]),
            ("calibration_requests", [0, 1251], [-1, 0.5]),
            ("share_reused", [shares], [{"early_exit": 0.5}, {**shares, "prefix": 0.5}, {**shares, "early_exit": 2}]),
            ("exits_by_layer", [[0.6, 0, None]], [[], [1.5], 0.5]),
            ("audits", [0, 77], [-1]),
            ("gate_closings", [0, 1], [True, -1]),
            ("gate_reopenings", [0, 1], ["1"]),
            ("cache_free", [True, False], ["yes", 1]),
        ):
            for value in (*good, None):
                self.assertTrue(self.fits(field, value), f"{field}: {value}")
            for value in bad:
                self.assertFalse(self.fits(field, value), f"{field}: {value}")


if __name__ == "__main__":
    unittest.main()
