"""Tests of tools/models/tokenizer_files.py: the tokenizers that the exporter writes beside the models."""

from __future__ import annotations

import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from support import ToolTest  # lets the tools be imported

# isort: split
import tokenizers

from tools.models import export_models, tokenizer_files
from tools.models.model_list import MODELS, VOCAB

TEXT = "Any bytes: h\u00e9llo \u20ac \U0001f642\n\ttabs"


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
