"""Tests of the exporter, which writes models and their tokenizers, and of writing files."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from support import ToolTest  # lets the tools be imported

# isort: split
import tokenizers

from tools.atomic_files import folder_lock, write_atomically
from tools.models import export_models, tokenizer_files
from tools.models.model_list import MODELS, VOCAB
from tools.models.model_sources import RANDOM

TEXT = "Any bytes: h\u00e9llo \u20ac \U0001f642\n\ttabs"


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
        encoders = {"bert-base", "distilbert", "minilm", "minilm-pooled", "minilm-pooled-mask"}
        self.assertEqual(names, encoders | {"bert-base-squad", "distilbert-squad", "gpt2", "smollm2"})

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

    def test_sentence_embedding_ignores_padding_and_has_unit_length(self) -> None:
        import torch

        from tools.models.wrappers import wrap

        spec = dataclasses.replace(MODELS["tiny-bert-pooled"], output="sentence_embedding")
        model, weights = spec.build()
        self.assertEqual(weights, RANDOM)
        module = wrap(model, spec)
        with torch.no_grad():
            exported = export_models.convert(spec, module, 300)
            export_models.verify(exported, module, spec, 300)
            ids, mask = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
            rows = exported(ids, mask)
            states = model(input_ids=ids[:1, :3], attention_mask=mask[:1, :3]).last_hidden_state
        self.assertEqual(tuple(rows.shape), (2, 64))
        self.assertTrue(torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5))
        mean = states.mean(1)
        self.assertTrue(torch.allclose(rows[:1], mean / mean.norm(), atol=1e-5))
        pooled = MODELS["minilm-pooled"]
        self.assertEqual((pooled.group, pooled.output, pooled.dtype), ("bench", "sentence_embedding", "float32"))

    def test_programs_that_are_others_for_one_row_or_token_are_refused(self) -> None:
        import torch

        class Mlp(torch.nn.Module):
            def __init__(self, dimension: int | None) -> None:
                super().__init__()
                self.embedding = torch.nn.Embedding(300, 8)
                self.dimension = dimension

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                states = self.embedding(ids) * mask.unsqueeze(-1)
                return states * 2 if self.dimension is not None and ids.shape[self.dimension] == 1 else states

        spec = dataclasses.replace(MODELS["tiny-mlp"], name="tiny-one")
        for dimension, refused in ((None, None), (0, "for lengths \\[1\\]"), (1, "for lengths \\[1\\]")):
            module = Mlp(dimension)
            program = export_models.convert_to_program(spec, module, 300)
            with torch.no_grad():
                if refused is None:
                    export_models.verify_program(program, module, spec, 300)
                    continue
                with self.assertRaisesRegex(export_models.ModelError, refused):
                    export_models.verify_program(program, module, spec, 300)

    def test_output_is_read_where_it_is_said(self) -> None:
        """Padded and alone, in other shapes than those that were traced."""
        import torch

        def load(name: str) -> Any:
            self.export(name)
            return torch.jit.load(str(self.folder / f"{name}.pt"))

        states, pooled, first = (load(f"tiny-bert-{kind}") for kind in ("sdpa", "pooling-mask", "cls"))
        ids, mask = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
        pooling = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])
        with torch.no_grad():
            hidden = states(ids, mask)
            wanted = torch.stack([hidden[0, 1:3].mean(0), hidden[1, 3]])
            self.assertTrue(torch.allclose(pooled(ids, mask, pooling), wanted, atol=1e-5))
            self.assertTrue(torch.allclose(pooled(ids[:1, :3], mask[:1, :3], pooling[:1, :3]), wanted[:1], atol=1e-5))
            self.assertFalse(torch.allclose(pooled(ids, mask, mask), wanted, atol=1e-2))
            self.assertTrue(torch.allclose(first(ids, mask), hidden[:, 0], atol=1e-5))
        names = ("tiny-bert-pooling-mask", "tiny-bert-cls")
        known = [json.loads((self.folder / f"{name}.json").read_text()) for name in names]
        self.assertEqual(
            [(sidecar["output"], sidecar["inputs"][2:], sidecar["attention"]) for sidecar in known],
            [("mean_pooled", ["pooling_mask"], "sdpa"), ("cls", [], "sdpa")],
        )


class TokenizerFilesTest(ToolTest):
    def load(self, name: str) -> tuple[tokenizers.Tokenizer, dict]:
        folder = self.folder / "tokenizers" / name
        config = json.loads((folder / "tokenizer_config.json").read_text())
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config

    def test_every_model_has_a_tokenizer(self) -> None:
        self.assertEqual({spec.tokenizer for spec in MODELS.values()}, set(tokenizer_files.TOKENIZERS))

    def test_tiny_has_a_token_a_byte_and_fits_the_tiny_models(self) -> None:
        tokenizer_files.write(self.folder, "tiny")
        loaded, config = self.load("tiny")
        ids = loaded.encode(TEXT).ids
        self.assertEqual(len(ids), len(TEXT.encode()))
        self.assertEqual(loaded.decode(ids), TEXT)
        self.assertLess(loaded.get_vocab_size(), VOCAB)
        self.assertEqual(loaded.token_to_id(config["eos_token"]), 2)  # eos_token_id of the tiny models

    def test_bert_neither_pads_nor_cuts(self) -> None:
        tokenizer_files.write(self.folder, "bert-base-uncased")
        loaded, _ = self.load("bert-base-uncased")
        self.assertEqual(loaded.encode("hello").tokens, ["[CLS]", "hello", "[SEP]"])
        self.assertEqual(len(loaded.encode("hello " * 300).ids), 302)

    def test_smollm2_has_its_end_token_and_chat_template(self) -> None:
        tokenizer_files.write(self.folder, "smollm2")
        loaded, config = self.load("smollm2")
        self.assertEqual(loaded.token_to_id(config["eos_token"]), 2)
        self.assertIn("<|im_start|>", config["chat_template"])
        self.assertEqual(loaded.decode(loaded.encode(TEXT).ids), TEXT)

    def test_gpt2_is_read_from_raw_data(self) -> None:
        raw = self.folder / "raw" / "tokenizers" / "gpt2"
        raw.mkdir(parents=True)
        (raw / "encoder.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
        (raw / "vocab.bpe").write_text("#version: 0.2\na b\n")
        with mock.patch.dict("os.environ", LLMCACHE_RAW_DATA=str(self.folder / "raw")):
            self.assertEqual(tokenizer_files.write(self.folder, "gpt2"), "raw data: tokenizers/gpt2")
            loaded, config = self.load("gpt2")
            self.assertEqual(loaded.encode("aba<|endoftext|>").ids, [2, 0, 3])
            self.assertEqual(loaded.decode([2, 0, 3]), "aba")
            self.assertEqual(config["eos_token"], "<|endoftext|>")

    def test_a_stand_in_for_gpt2_is_made_again_once_the_real_one_is_there(self) -> None:
        folder = self.folder / "tokenizers" / "gpt2"
        with (
            tempfile.TemporaryDirectory() as empty,
            mock.patch.dict("os.environ", LLMCACHE_RAW_DATA=empty),
            mock.patch.object(tokenizer_files, "hub_answers", return_value=False),
        ):
            self.assertIn("stands in for gpt2", tokenizer_files.write(self.folder, "gpt2"))
            self.assertTrue(tokenizer_files.present(folder))
            raw = Path(empty) / "tokenizers" / "gpt2"
            raw.mkdir(parents=True)
            (raw / "encoder.json").write_text("{}")
            (raw / "vocab.bpe").write_text("")
            self.assertFalse(tokenizer_files.present(folder))

    def test_only_whole_tokenizers_are_present(self) -> None:
        folder = self.folder / "tokenizers" / "tiny"
        self.assertFalse(tokenizer_files.present(folder))
        file, sidecar = folder / "tokenizer.json", folder / "tokenizer_config.json"
        for what, damage in {
            "cut off": lambda: file.write_bytes(file.read_bytes()[:100]),
            "no tokenizer": file.unlink,
            "no sidecar": sidecar.unlink,
            "half a sidecar": lambda: sidecar.write_text(sidecar.read_text()[:30]),
            "another one's sidecar": lambda: sidecar.write_text('{"eos_token": "<end>"}'),
        }.items():
            with self.subTest(what):
                tokenizer_files.write(self.folder, "tiny")
                self.assertTrue(tokenizer_files.present(folder))
                damage()
                self.assertFalse(tokenizer_files.present(folder))

    def test_exporter_writes_what_is_missing_and_tells_what_failed(self) -> None:
        status, out, err = self.run_tool(export_models, "--out", self.folder, "--only", "tiny-mlp")
        self.assertEqual(status, 0, err)
        self.assertIn("tokenizer tiny: made here", out)
        _, out, _ = self.run_tool(export_models, "--out", self.folder, "--only", "tiny-mlp")
        self.assertNotIn("tokenizer tiny", out)
        (self.folder / "tokenizers" / "tiny" / "tokenizer.json").unlink()
        with mock.patch.dict(tokenizer_files.TOKENIZERS, tiny=mock.Mock(side_effect=OSError("disk full"))):
            status, _, err = self.run_tool(export_models, "--out", self.folder, "--only", "tiny-mlp")
        self.assertEqual(status, 1)
        self.assertIn("tokenizer tiny: FAILED: OSError: disk full", err)


if __name__ == "__main__":
    unittest.main()
