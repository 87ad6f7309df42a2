"""Tests of the Python tools: run `python -m unittest` in this folder, with the packages of tools/requirements*.txt."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import export_models
import prepare_data
import report
from atomic_files import folder_lock, write_atomically
from model_list import MODELS

RECORD: dict[str, Any] = {
    "model": "tiny <model>",
    "weights": "random (seed 0)",
    "workload": "sample",
    "mode": "llmcache",
    "fidelity": "lossless",
    "threads": 1,
    "requests": 10,
    "tokens": 1000,
    "tokens_computed_fraction": 0.5,
    "latency_ms": {"mean": 1.5, "p50": 1.0, "p95": 2.0, "p99": 2.5},
    "speedup_vs_nocache": 1.75,
    "hit_rate": None,
    "divergence": {"mean": 0.0, "p95": None, "max": 1e-6},
    "cache_bytes": 1 << 20,
    "versions": {"torch": "2.13.0"},
}


class ToolTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def run_tool(self, tool: Any, *arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = tool.main([str(argument) for argument in arguments])
            except SystemExit as stop:  # argparse
                status = stop.code if isinstance(stop.code, int) else 1
        return status, out.getvalue(), err.getvalue()


class AtomicFilesTest(ToolTest):
    def test_failed_write_leaves_the_old_file(self) -> None:
        path = self.folder / "file"
        path.write_text("old")

        def fail(temporary: Path) -> None:
            temporary.write_text("half")
            raise OSError("disk full")

        with self.assertRaises(OSError):
            write_atomically(path, fail)
        self.assertEqual(path.read_text(), "old")
        self.assertEqual([entry.name for entry in self.folder.iterdir()], ["file"])

    def test_leftovers_of_killed_writers_are_removed(self) -> None:
        leftover = self.folder / ".model.pt.partial"
        leftover.write_text("half")
        with folder_lock(self.folder):
            self.assertFalse(leftover.exists())


class ExportTest(ToolTest):
    def test_list_names_every_model(self) -> None:
        status, out, _ = self.run_tool(export_models, "--list")
        self.assertEqual(status, 0)
        self.assertEqual([line.split()[0] for line in out.splitlines()], list(MODELS))

    def test_list_of_a_group(self) -> None:
        _, out, _ = self.run_tool(export_models, "--list", "--only", "bench")
        names = {line.split()[0] for line in out.splitlines()}
        self.assertEqual(names, {"bert-base", "distilbert", "gpt2", "minilm", "smollm2"})

    def test_unknown_name_is_refused(self) -> None:
        status, _, err = self.run_tool(export_models, "--out", self.folder, "--only", "no-such-model")
        self.assertNotEqual(status, 0)
        self.assertIn("no-such-model", err)
        self.assertIn("--list", err)

    def export(self, name: str) -> str:
        status, out, err = self.run_tool(export_models, "--out", self.folder, "--only", name)
        self.assertEqual(status, 0, err)
        return out

    def test_only_whole_models_are_skipped(self) -> None:
        name = "tiny-mlp"
        model, sidecar = self.folder / f"{name}.pt", self.folder / f"{name}.json"
        self.assertNotIn("skipped", self.export(name))
        self.assertIn("skipped", self.export(name))
        whole = model.read_bytes()
        altered = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        for what, damage in {
            "cut off": lambda: model.write_bytes(whole[:1000]),
            "altered": lambda: model.write_bytes(altered),
            "no model": model.unlink,
            "no sidecar": sidecar.unlink,
            "half a sidecar": lambda: sidecar.write_text(sidecar.read_text()[:50]),
        }.items():
            with self.subTest(what):
                damage()
                self.assertFalse(export_models.present(self.folder, name)[0])
                self.assertNotIn("skipped", self.export(name))
                self.assertTrue(export_models.present(self.folder, name)[0])

    def test_sidecar_describes_the_model(self) -> None:
        self.export("tiny-llama-sdpa")
        known = json.loads((self.folder / "tiny-llama-sdpa.json").read_text())
        expected = {
            "name": "tiny-llama-sdpa",
            "architecture": "LlamaForCausalLM",
            "family": "decoder",
            "weights": "random (seed 0)",
            "attention": "sdpa",
            "dtype": "float32",
            "hidden": 64,
            "layers": 4,
            "heads": 4,
            "vocab": 300,
            "max_tokens": 256,
            "output": "logits",
        }
        self.assertEqual({key: known[key] for key in expected}, expected)


class PrepareDataTest(ToolTest):
    def prepare(self, *arguments: object) -> tuple[int, str, str]:
        return self.run_tool(prepare_data, "--out", self.folder / "out", *arguments)

    def models_with(self, tokenizer: str) -> Path:
        folder = self.folder / "models"
        folder.mkdir(exist_ok=True)
        (folder / "model.json").write_text(json.dumps({"tokenizer": tokenizer, "vocab": 30522}))
        return folder

    def raw(self, file: str, content: bytes) -> Path:
        path = self.folder / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return self.folder / "raw"

    def test_sample(self) -> None:
        models = self.models_with("bert-base-uncased")
        status, _, err = self.prepare("--only", "sample", "--models", models)
        self.assertEqual(status, 0, err)
        path = self.folder / "out" / "sample.bert-base-uncased.safetensors"
        loaded = prepare_data.load(path)
        assert loaded is not None
        arrays, metadata = loaded
        sequences, requests = arrays["sequence_offsets"], arrays["request_offsets"]
        self.assertEqual([str(arrays[n].dtype) for n in sorted(arrays)], ["int64", "int64", "int32"])
        self.assertEqual((sequences[0], sequences[-1]), (0, len(arrays["tokens"])))
        self.assertEqual((requests[0], requests[-1]), (0, len(sequences) - 1))
        lengths = sequences[1:] - sequences[:-1]
        self.assertTrue((lengths >= 3).all() and (lengths <= 512).all())
        self.assertLessEqual(set((requests[1:] - requests[:-1]).tolist()), {1, 2, 3, 4})
        self.assertTrue((arrays["tokens"][sequences[:-1]] == 101).all(), "each sequence starts with [CLS]")
        self.assertTrue((arrays["tokens"][sequences[1:] - 1] == 102).all(), "each sequence ends with [SEP]")
        lines = (ROOT / "data" / "sample" / "sample.jsonl").read_text(encoding="utf-8").splitlines()
        self.assertEqual(len(lengths), len(lines))
        self.assertEqual((metadata["version"], metadata["workload"], metadata["max_tokens"]), ("1", "sample", "512"))
        self.assertEqual(metadata["order"], "shuffled, seed 0")

        self.assertIn("skipped", self.prepare("--only", "sample", "--models", models)[1])
        whole = path.read_bytes()
        for damaged in (whole[:-8], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            self.assertIsNone(prepare_data.load(path))
            self.assertNotIn("skipped", self.prepare("--only", "sample", "--models", models)[1])
            again = prepare_data.load(path)
            assert again is not None
            self.assertEqual(again[1], metadata)

    def test_damaged_raw_files_are_named_with_their_line(self) -> None:
        good = json.dumps({"context": "A passage.", "question": "What?"}).encode()
        choices = {"question": {"stem": "Why?", "choices": [{"text": "a"}] * 3}}
        cases = [
            ("squad", "squad_v2/squad_v2_dev.jsonl", good + b"\n" + good[:20], ":2:"),
            ("squad", "squad_v2/squad_v2_dev.jsonl", good + b'\n{"context": "x"}\n', ":2:"),
            ("squad", "squad_v2/squad_v2_dev.jsonl", b"", "no record"),
            ("openbookqa", "openbookqa/test.jsonl", json.dumps(choices).encode(), ":1:"),
            ("openbookqa", "openbookqa/test.jsonl", b"[1]\n", ":1:"),
            ("banking77", "banking77/test.tsv", b"label\ttext\nlost_card\n", ":2:"),
            ("banking77", "banking77/test.tsv", b"label\ttext\na\t\xff\xfe\n", ":2:"),
            ("wikitext", "wikitext/wiki.test.raw", b" \n \x00\x01 garbage \n", ":2:"),
            ("wikitext", "wikitext/wiki.test.raw", b"\x89PNG\r\n", ":1:"),
        ]
        for workload, file, content, where in cases:
            with self.subTest(f"{workload} {content[:30]!r}"):
                raw = self.raw(file, content)
                # Reading comes before any tokenizer is loaded.
                status, _, err = self.prepare("--only", workload, "--raw", raw)
                self.assertEqual(status, 1)
                self.assertIn(str(raw / file), err)
                self.assertIn(where, err)
                self.assertEqual(list((self.folder / "out").glob("*.safetensors")), [])

    def test_missing_raw_data_falls_back_to_the_sample(self) -> None:
        raw = self.folder / "raw"
        raw.mkdir()
        models = self.models_with("bert-base-uncased")
        status, out, err = self.prepare("--only", "squad", "--raw", raw, "--models", models)
        self.assertEqual(status, 0, err)
        self.assertIn("squad: squad_v2/squad_v2_dev.jsonl is not in the raw data", out)
        names = [path.name for path in (self.folder / "out").glob("*.safetensors")]
        self.assertEqual(names, ["sample.bert-base-uncased.safetensors"])

    def test_raw_folder_that_is_not_there(self) -> None:
        status, _, err = self.prepare("--raw", self.folder / "nowhere")
        self.assertEqual(status, 1)
        self.assertIn("nowhere", err)

    def test_articles_grow_from_heading_to_heading(self) -> None:
        raw = self.raw(
            "wikitext/w", b" \n = One = \n \n First . \n \n = = Part = = \n \n Second . \n = Two = \n Third . \n"
        )
        requests = prepare_data.WORKLOADS["wikitext"].read(raw / "wikitext" / "w")
        pieces = [request[0].pieces for request in requests]
        first, second = " = One = \n First . \n", " = = Part = = \n Second . \n"
        self.assertEqual(pieces, [(first,), (first, second), (" = Two = \n Third . \n",)])


class ReportTest(ToolTest):
    def report(self, document: object) -> tuple[int, str, str]:
        results, page = self.folder / "results.json", self.folder / "report.html"
        results.write_text(document if isinstance(document, str) else json.dumps(document))
        status, _, err = self.run_tool(report, results, "-o", page)
        return status, page.read_text(encoding="utf-8") if page.exists() else "", err

    def test_no_records(self) -> None:
        status, page, _ = self.report({"schema": 1, "machine": {}, "command": "", "records": []})
        self.assertEqual(status, 0)
        self.assertIn("No measurements", page)

    def test_one_record(self) -> None:
        document = {"schema": 1, "machine": {"cpu": "A CPU"}, "command": "bench <x>", "records": [RECORD]}
        status, page, err = self.report(document)
        self.assertEqual(status, 0, err)
        for text in ("tiny &lt;model&gt;", "random weights", "1.75", "A CPU", "bench &lt;x&gt;", "1.0e-6", "<svg"):
            self.assertIn(text, page)
        self.assertNotIn("tiny <model>", page)
        for outside in ('src="', "url(http", "@import", "<link", "<script"):
            self.assertNotIn(outside, page)

    def test_all_measurements_missing(self) -> None:
        nothing = dict.fromkeys(("mean", "p50", "p95", "p99"))
        record = {**RECORD, "latency_ms": nothing, "speedup_vs_nocache": None, "divergence": None, "versions": None}
        status, page, err = self.report({"schema": 1, "records": [record]})
        self.assertEqual(status, 0, err)
        self.assertIn("–", page)

    def test_bad_input_is_named(self) -> None:
        for document, wanted in (
            ('{"schema": 1, "records": [', "not valid JSON"),
            ({"schema": 2, "records": []}, "schema 2"),
            ({"schema": 1}, "'records'"),
            ({"schema": 1, "records": [RECORD, {"model": "x"}]}, "record 1"),
        ):
            with self.subTest(wanted):
                status, _, err = self.report(document)
                self.assertEqual(status, 1)
                self.assertIn(wanted, err)
                self.assertIn("results.json", err)


if __name__ == "__main__":
    unittest.main()
