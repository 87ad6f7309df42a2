"""Tests of tools/models/fit_probe.py, with a model of a few weights."""

from __future__ import annotations

import json
import unittest
from pathlib import Path

import numpy as np
from support import ToolTest  # lets the tools be imported

# isort: split
from tools.data import token_file
from tools.models import fit_probe

CLASSES, DIMS, TRAIN, TEST = ["a", "b", "c"], 4, 60, 20


class ProbeTest(ToolTest):
    def setUp(self) -> None:
        super().setUp()
        self.models, self.data = self.folder / "models", self.folder / "data"
        self.models.mkdir()
        self.data.mkdir()
        self.probe = self.data / "banking77.minilm-pooled.probe.safetensors"
        self.tokens = self.data / "banking77.bert-base-uncased.safetensors"

    def write_pooling_model(self) -> None:
        import torch

        class Pooling(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = torch.nn.Embedding(32, DIMS)

            def forward(self, ids: torch.Tensor, mask: torch.Tensor, pooling_mask: torch.Tensor) -> torch.Tensor:
                states = self.embedding(ids) * pooling_mask.unsqueeze(-1)
                return states.sum(1) / pooling_mask.sum(1, keepdim=True)

        torch.manual_seed(0)
        torch.jit.save(torch.jit.script(Pooling()), str(self.models / "minilm-pooled-mask.pt"))
        sidecar = {"tokenizer": "bert-base-uncased", "inputs": ["input_ids", "attention_mask", "pooling_mask"]}
        (self.models / "minilm-pooled-mask.json").write_text(json.dumps(sidecar))

    def write_model(self, per_token: bool = False, nan: bool = False) -> None:
        import torch

        class Tiny(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = torch.nn.Embedding(32, DIMS)
                self.per_token = per_token

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                states = self.embedding(ids) * mask.unsqueeze(-1)
                return states if self.per_token else states.sum(1) / mask.sum(1, keepdim=True)

        torch.manual_seed(0)
        model = Tiny()
        if nan:
            model.embedding.weight.data[3] = float("nan")
        torch.jit.save(torch.jit.script(model), str(self.models / "minilm-pooled.pt"))
        (self.models / "minilm-pooled.json").write_text(json.dumps({"tokenizer": "bert-base-uncased"}))

    def write_tokens(self, fill: int = TRAIN, **changes: np.ndarray) -> None:
        """Queries of 2 to 4 tokens; a token tells the class, but for one in ten."""
        draw = np.random.default_rng(0)
        labels = draw.integers(0, len(CLASSES), TRAIN + TEST)
        queries = [draw.integers(3, 9, draw.integers(2, 5)) for _ in labels]
        for query, label in zip(queries, labels, strict=True):
            query[0] = 20 + label if draw.random() > 0.1 else 25
        offsets = np.cumsum([0, *map(len, queries)])
        arrays = {
            "tokens": np.concatenate(queries).astype(np.int32),
            "sequence_offsets": offsets.astype(np.int64),
            "request_offsets": np.arange(TRAIN + TEST + 1, dtype=np.int64),
            "labels": labels.astype(np.int64),
            **changes,
        }
        token_file.save(
            self.tokens, arrays, {"version": "2", "fill_requests": str(fill), "label_names": json.dumps(CLASSES)}
        )

    def fit(self, *arguments: object) -> tuple[int, str, str]:
        return self.run_tool(fit_probe, "--models", self.models, "--data", self.data, "--only", "banking77", *arguments)

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        loaded = token_file.load(self.probe)
        assert loaded is not None
        return loaded

    def assert_fails(self, *parts: str) -> None:
        status, _, err = self.fit()
        self.assertEqual(status, 1)
        self.assertTrue(err.startswith("fit_probe: "), err)
        for part in parts:
            self.assertIn(part, err)
        self.assertFalse(self.probe.exists())

    def test_probe_is_written_once_and_the_same_each_time(self) -> None:
        from tools.atomic_files import sha256_of

        self.write_model()
        self.write_tokens()
        status, out, err = self.fit()
        self.assertEqual(status, 0, err)
        self.assertIn("60 training queries", out)
        arrays, metadata = self.load()
        self.assertEqual((arrays["weight"].shape, arrays["bias"].shape), ((3, DIMS), (3,)))
        self.assertEqual({str(array.dtype) for array in arrays.values()}, {"float32"})
        self.assertTrue(all(np.isfinite(array).all() for array in arrays.values()))
        self.assertEqual(
            (metadata["version"], metadata["workload"], metadata["model"]), ("2", "banking77", "minilm-pooled")
        )
        self.assertEqual(json.loads(metadata["classes"]), CLASSES)
        self.assertEqual(metadata["model_sha256"], sha256_of(self.models / "minilm-pooled.pt"))
        self.assertGreater(float(metadata["train_accuracy"]), 0.8)  # a guess would have a third
        self.assertGreater(float(metadata["test_accuracy"]), 0.6)

        first = self.probe.read_bytes()
        self.assertIn("skipped", self.fit()[1])
        for damaged in (first[:-4], first[:30], b"", first[:-1] + bytes([first[-1] ^ 1])):
            self.probe.write_bytes(damaged)
            self.assertIsNone(fit_probe.load_probe(self.probe))
            self.assertNotIn("skipped", self.fit()[1])
            again = self.load()
            self.assertEqual(again[1], metadata)
            self.assertTrue(all(np.array_equal(again[0][name], arrays[name]) for name in arrays))

    def test_another_model_or_other_tokens_make_it_again(self) -> None:
        self.write_model()
        self.write_tokens()
        self.fit()
        before = self.load()[1]
        self.write_tokens(labels=np.zeros(TRAIN + TEST, dtype=np.int64))
        self.assertNotIn("skipped", self.fit()[1])
        self.assertEqual(float(self.load()[1]["train_accuracy"]), 1.0)
        import torch

        torch.jit.save(
            torch.jit.script(torch.nn.EmbeddingBag(32, 5, mode="mean")), str(self.models / "minilm-pooled.pt")
        )
        status, _, err = self.fit()
        self.assertEqual(status, 1)
        self.assertIn("does not run on", err)  # it takes other arguments; the old probe was not taken for its own
        self.assertNotEqual(before, self.load()[1])

    def test_fit_finds_the_minimum(self) -> None:
        import torch

        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(200, 3, generator=draw, dtype=torch.float64) * 0.05 + 0.3
        labels = (rows[:, 0] + rows[:, 1] > 0.6).long()
        weight, bias = fit_probe.fit(rows, labels, 2, 1e-2)
        mean = rows.mean(0)
        scale = (rows - mean).square().mean().sqrt()
        moved = (weight * scale).requires_grad_()
        loss = torch.nn.functional.cross_entropy((rows - mean) / scale @ moved.T + bias + weight @ mean, labels)
        (gradient,) = torch.autograd.grad(loss + 5e-3 * moved.square().sum(), moved)
        self.assertLess(gradient.abs().max().item(), 1e-4)
        self.assertGreater(fit_probe.accuracy(rows, labels, weight, bias), 0.95)

    def test_embeddings_come_in_the_order_of_the_queries(self) -> None:
        import torch

        self.write_model()
        model = torch.jit.load(str(self.models / "minilm-pooled.pt"))
        queries = [np.array([n % 30] * (1 + n % 3), dtype=np.int32) for n in range(70)]
        rows = fit_probe.embed(model, queries)
        for query, row in zip(queries, rows, strict=True):
            ids = torch.tensor([query.tolist()])
            self.assertTrue(torch.allclose(row, model(ids, torch.ones_like(ids))[0], atol=1e-6))

    def test_embeddings_are_pooled_where_they_are_told(self) -> None:
        import torch

        self.write_pooling_model()
        model = torch.jit.load(str(self.models / "minilm-pooled-mask.pt"))
        queries = [np.array([n % 30, 5, 7 + n % 3][: 2 + n % 2], dtype=np.int32) for n in range(70)]
        pools = [np.eye(len(query), dtype=np.int64)[n % len(query)] for n, query in enumerate(queries)]
        rows = fit_probe.embed(model, queries, pools)
        for query, pool, row in zip(queries, pools, rows, strict=True):
            self.assertTrue(torch.allclose(row, model.embedding.weight[query[pool.argmax()]], atol=1e-6))

    def test_each_model_has_a_probe_of_its_own(self) -> None:
        """Pooled over the token that tells the class one model can tell them apart, over all tokens the other less."""
        self.write_model()
        self.write_pooling_model()
        self.write_tokens()
        status, out, err = self.fit()  # the file has no pool: all tokens are pooled
        self.assertEqual(status, 0, err)
        names = {path.name for path in self.data.glob("*.probe.safetensors")}
        kinds = ("minilm-pooled", "minilm-pooled-mask")
        self.assertEqual(names, {f"banking77.{kind}.probe.safetensors" for kind in kinds})

        loaded = token_file.load(self.tokens)
        assert loaded is not None
        pool = np.zeros(len(loaded[0]["tokens"]), dtype=np.int64)
        pool[loaded[0]["sequence_offsets"][:-1]] = 1
        self.write_tokens(pool=pool)
        status, out, err = self.fit("--model", "minilm-pooled-mask")
        self.assertEqual((status, "skipped" in out), (0, False), err)
        found = token_file.load(self.data / "banking77.minilm-pooled-mask.probe.safetensors")
        assert found is not None
        self.assertEqual(found[1]["model"], "minilm-pooled-mask")
        draw = np.random.default_rng(0)
        labels = draw.integers(0, len(CLASSES), TRAIN + TEST)
        told = loaded[0]["tokens"][loaded[0]["sequence_offsets"][:-1]] != 25
        most = (told[:TRAIN].sum() + np.bincount(labels[:TRAIN][~told[:TRAIN]]).max()) / TRAIN
        self.assertAlmostEqual(float(found[1]["train_accuracy"]), most, places=5)

    def test_a_pooling_model_is_for_workloads_with_a_pool(self) -> None:
        self.write_pooling_model()
        self.write_tokens()
        status, _, err = self.run_tool(fit_probe, "--models", self.models, "--data", self.data)
        self.assertEqual(status, 0, err)
        self.assertEqual(list(self.data.glob("*.probe.safetensors")), [])

    def test_a_part_of_the_fill_part_is_left_to_calibrate_on(self) -> None:
        """What labels the other requests have makes no difference."""
        self.write_model()
        self.write_tokens()
        self.assertEqual(self.fit()[0], 0)
        self.assertEqual(self.load()[1]["fit_sequences"], "60")
        loaded = token_file.load(self.tokens)
        assert loaded is not None
        labels = loaded[0]["labels"]
        self.assertEqual(self.fit("--fit-share", "0.5")[0], 0)
        half, metadata = self.load()
        self.assertEqual((metadata["fit_sequences"], float(metadata["l2"]) in fit_probe.L2_FOR_FEW), ("30", True))
        other = np.concatenate([labels[:30], 2 - labels[30:]])
        self.write_tokens(labels=other)
        status, out, err = self.fit("--fit-share", "0.5")
        self.assertEqual(status, 0, err)
        self.assertIn("30 training queries", out)
        self.assertTrue(np.array_equal(self.load()[0]["weight"], half["weight"]))
        self.assertNotEqual(self.load()[1]["test_accuracy"], metadata["test_accuracy"])
        for bad in ("0", "1.5", "x", "nan"):
            self.assertEqual(self.fit("--fit-share", bad)[0], 2)

    def test_the_penalty_is_chosen_on_what_is_held_out(self) -> None:
        import torch

        draw = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 2, (400,), generator=draw)
        noise = torch.randn(400, 60, generator=draw)
        clear = noise.clone()
        clear[:, 0] += 40.0 * (2 * labels - 1)
        self.assertEqual(fit_probe.chosen_l2(clear, labels, 2), 1e-3)  # all are right, the first stays
        noise[:, 0] += 2 * labels - 1
        noisy = labels.clone()
        noisy[:300:4] = 1 - noisy[:300:4]  # what cannot be learnt is in what is fitted only
        self.assertGreater(fit_probe.chosen_l2(noise, noisy, 2), 1e-3)

    def test_without_token_file_there_is_no_probe(self) -> None:
        self.write_model()
        status, out, err = self.fit()
        self.assertEqual(status, 0, err)
        self.assertIn("no banking77.bert-base-uncased.safetensors", out)
        self.assertFalse(self.probe.exists())

    def test_bad_token_files(self) -> None:
        self.write_model()
        self.write_tokens()
        whole = self.tokens.read_bytes()
        self.tokens.write_bytes(whole[:-3])
        self.assert_fails(str(self.tokens), "damaged", "prepare_data.py")
        self.write_tokens(fill=0)
        self.assert_fails("both splits")
        self.write_tokens(fill=1000)
        self.assert_fails(str(self.tokens))
        self.write_tokens(labels=np.full(TRAIN + TEST, 3))
        self.assert_fails("labels outside 0 to 2")
        self.write_tokens(labels=np.zeros(5, dtype=np.int64))
        self.assert_fails("5 labels")
        self.write_tokens(pool=np.ones(5, dtype=np.int64))
        self.assert_fails("5 entries of pool")

    def test_bad_models(self) -> None:
        self.write_tokens()
        self.assert_fails("minilm-pooled.json", "export_models.py")
        self.write_model(per_token=True)
        self.assert_fails("use a pooled model")
        self.write_model(nan=True)
        self.assert_fails("NaN")
        (self.models / "minilm-pooled.pt").write_bytes(b"not a model")
        self.assert_fails("minilm-pooled.pt", "cannot be loaded")
        Path(self.models / "minilm-pooled.json").write_text("{")
        self.assert_fails("does not describe a model")


if __name__ == "__main__":
    unittest.main()
