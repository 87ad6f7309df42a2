"""A model that finds answers in passages, from the hub to the scores: exported from a stand-in for the hub, run by the
benchmark, its F1 and exact match compared with SQuAD's own evaluation, written down again here.

The model is small and is trained here, on the questions that it is asked, so that it answers many of them rightly.
Needs LLMCACHE_BIN_DIR."""

from __future__ import annotations

import collections
import json
import os
import re
import string
import subprocess
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from hub_support import HUB, Repo, use_hub
from support import ROOT, ToolTest

# isort: split
from tools.data import prepare_data
from tools.data.token_file import load
from tools.models import export_models, model_sources
from tools.models.model_sources import minilm_folder

MODEL_ID = "deepset/bert-base-uncased-squad2"
MOST_TOKENS = 30
UNUSUAL = "The café's owner, Zoë O'Neil-Smith (a U.S. citizen), paid $1,250.50 in 1998\u201399; the Tower-of-Kö fell."


def questions() -> list[dict[str, Any]]:
    """SQuAD's records: some that cannot be answered, some with several answers, some of unusual characters."""
    path = ROOT / "data" / "sample" / "documents" / "documents.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:120:5]
    for number, row in enumerate(rows):
        if number % 4 == 3:
            row |= {"question": rows[number - 2]["question"] + " And why?", "answers": [], "is_impossible": True}
        elif row["answers"]:
            row["answers"] = [*row["answers"], {**row["answers"][0], "text": "the " + row["answers"][0]["text"] + "."}]

    def unusual(question: str, *answers: str) -> dict[str, Any]:
        found = [{"text": text, "answer_start": UNUSUAL.index(text)} for text in answers]
        return {"id": question, "title": "t", "context": UNUSUAL, "question": question, "answers": found}

    return [
        *rows,
        unusual("Who paid?", "Zoë O'Neil-Smith", "O'Neil-Smith"),
        unusual("How much was it?", "$1,250.50"),
        unusual("When was it?", "1998\u201399"),
        unusual("What fell?", "the Tower-of-Kö"),
        unusual("Of where is the owner a citizen?", "U.S."),
    ]


def tokenizer() -> Any:
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def encoded(rows: list[dict[str, Any]]) -> list[Any]:
    return tokenizer().encode_batch([(row["question"], row["context"]) for row in rows])


def trained(rows: list[dict[str, Any]], encodings: list[Any]) -> Any:
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        attn_implementation="sdpa",
    )
    model = BertForQuestionAnswering(config)
    width = max(len(one.ids) for one in encodings)
    ids, mask, types = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    starts, ends = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long)
    for i, (row, one) in enumerate(zip(rows, encodings, strict=True)):
        length = len(one.ids)
        ids[i, :length], mask[i, :length] = torch.tensor(one.ids), 1
        types[i, :length] = torch.tensor(one.type_ids)
        if row["answers"]:
            begin = row["answers"][0]["answer_start"]
            end = begin + len(row["answers"][0]["text"])
            place = [t for t in range(length) if one.sequence_ids[t] == 1]
            starts[i] = next(t for t in place if one.offsets[t][1] > begin)
            ends[i] = next(t for t in reversed(place) if one.offsets[t][0] < end)
    steps = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(120):
        loss = model(
            input_ids=ids, attention_mask=mask, token_type_ids=types, start_positions=starts, end_positions=ends
        ).loss
        steps.zero_grad()
        loss.backward()
        steps.step()
    return model.eval()


def normal(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(said: str, gold: str) -> float:
    ours, theirs = normal(said).split(), normal(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def evaluated(model: Any, rows: list[dict[str, Any]], encodings: list[Any]) -> tuple[float, float, int]:
    """Mean F1, mean exact match, and how often the model says that there is no answer."""
    import torch

    totals, silent = [0.0, 0.0], 0
    for row, one in zip(rows, encodings, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([one.ids]), token_type_ids=torch.tensor([one.type_ids]))
        start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
        place = [t for t in range(len(one.ids)) if one.sequence_ids[t] == 1]
        spans = [(start[i] + end[j], i, j) for i in place for j in place if i <= j < i + MOST_TOKENS]
        most, i, j = max(spans)
        said = row["context"][one.offsets[i][0] : one.offsets[j][1]] if most > start[0] + end[0] else ""
        silent += not said
        golds = [answer["text"] for answer in row["answers"] if normal(answer["text"])] or [""]
        totals[0] += max(f1(said, gold) for gold in golds)
        totals[1] += max(normal(said) == normal(gold) for gold in golds)
    return totals[0] / len(rows), totals[1] / len(rows), silent


def setUpModule() -> None:
    use_hub()


class AnswersTest(ToolTest):
    def export(self, *names: str) -> tuple[int, str, str]:
        with mock.patch.object(model_sources, "_hub_answered", None):
            return self.run_tool(export_models, "--out", self.folder / "models", "--only", *names)

    def test_without_the_hub_they_are_left_out(self) -> None:
        with HUB.away():
            status, out, err = self.export("distilbert-squad", "tiny-bert-cls")
        self.assertEqual(status, 0, err)
        self.assertIn("distilbert-squad: left out: no answer from the model hub", out)
        self.assertIn("1 of 2 models", out)
        self.assertFalse((self.folder / "models" / "distilbert-squad.pt").exists())

    def test_scores_are_those_of_squads_evaluation(self) -> None:
        rows = questions()
        encodings = encoded(rows)
        model = trained(rows, encodings)
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            files = {path.name: path.read_bytes() for path in Path(saved).iterdir()}
        HUB.reset({MODEL_ID: Repo(files, lfs=False)})
        status, out, err = self.export("bert-base-squad")
        self.assertEqual(status, 0, out + err)
        sidecar = json.loads((self.folder / "models" / "bert-base-squad.json").read_text())
        self.assertEqual(sidecar["weights"], f"hub:{MODEL_ID}")

        raw = self.folder / "raw" / "squad_v2"
        raw.mkdir(parents=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (raw / "squad_v2_dev.jsonl").write_text("".join(lines), encoding="utf-8")
        chosen = ("--only", "squad", "--tokenizer", "bert-base-uncased")
        status, _, err = self.run_tool(
            prepare_data, "--raw", self.folder / "raw", "--out", self.folder / "data", *chosen
        )
        self.assertEqual(status, 0, err)
        arrays, _ = load(self.folder / "data" / "squad.bert-base-uncased.safetensors") or ({}, {})
        self.assertEqual(arrays["tokens"].tolist(), [token for one in encodings for token in one.ids])

        expected_f1, expected_exact, silent = evaluated(model, rows, encodings)
        self.assertGreater(expected_exact, 0.5, "the model has learnt nothing: train it longer")
        self.assertGreater(silent, 2)
        command = [
            Path(os.environ["LLMCACHE_BIN_DIR"]) / "llmcache-bench",
            *("--models", self.folder / "models", "--data", self.folder / "data", "--json", self.folder / "out.json"),
            *("--model", "bert-base-squad", "--workload", "squad", "--mode", "nocache,llmcache"),
            *("--limit", str(len(rows))),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        records = json.loads((self.folder / "out.json").read_text())["records"]
        self.assertGreaterEqual(len(records), 2)
        for record in records:
            with self.subTest(mode=record["mode"], fidelity=record["fidelity"]):
                self.assertEqual(record["task"]["metric"], "f1")
                self.assertEqual(record["second_task"]["metric"], "exact_match")
                if record["fidelity"] == "threshold":
                    continue
                self.assertAlmostEqual(record["task"]["value"], expected_f1, places=9)
                self.assertAlmostEqual(record["second_task"]["value"], expected_exact, places=9)


if __name__ == "__main__":
    unittest.main()
