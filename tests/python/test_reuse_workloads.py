"""Tests of the workloads of near-identical requests: edits, instructions, passages in another order, corrections."""

from __future__ import annotations

import difflib
import json
import random
import unittest
from pathlib import Path
from typing import Any

import numpy as np
from support import ToolTest  # lets the tools be imported

# isort: split
import itertools

from tools.data import prepare_data, shared_texts
from tools.data.edits import PERCENTS, SMALL_PERCENTS, changed_words, edited, passages_of
from tools.data.instructions import INSTRUCTIONS
from tools.data.tokenization import CHAT_MARKS, PLAIN_MARKS, Encoded, written
from tools.data.traffic import ANSWER, AS_IT_IS, EDIT_KINDS, Request, Sequence, Traffic
from tools.data.workloads import WORKLOADS

WORDS = [f"word{number}" for number in range(100)]
OTHERS = [f"other{number}" for number in range(300)]
KINDS = [kind for kind in EDIT_KINDS if kind != AS_IT_IS]


def texts(requests: list[Request]) -> set[str]:
    return {sequence.pair[0] for request in requests for sequence in request.sequences}


class EditTest(unittest.TestCase):
    """A text of a hundred words, so that a percent is a word."""

    def edits(self, kind: str) -> list[tuple[int, list[str]]]:
        return [
            (percent, edited(WORDS, kind, percent, OTHERS, random.Random(seed)))
            for percent in PERCENTS
            for seed in range(20)
        ]

    def test_substituted(self) -> None:
        for percent, words in self.edits("substituted"):
            changed = [new for old, new in zip(WORDS, words, strict=True) if old != new]
            self.assertEqual(len(changed), percent)
            self.assertLessEqual(set(changed), set(OTHERS))

    def test_inserted_and_appended(self) -> None:
        for kind in ("inserted", "appended"):
            for percent, words in self.edits(kind):
                new = [place for place, word in enumerate(words) if word in OTHERS]
                self.assertEqual(new, list(range(new[0], new[0] + percent)), "one run")
                self.assertEqual([word for word in words if word not in OTHERS], WORDS)
                self.assertEqual(new[-1] == len(words) - 1, kind == "appended")
                self.assertGreater(new[0], 0)

    def test_deleted(self) -> None:
        for percent, words in self.edits("deleted"):
            start = next((place for place, word in enumerate(words) if word != WORDS[place]), len(words))
            self.assertEqual(words, WORDS[:start] + WORDS[start + percent :])

    def test_moved(self) -> None:
        for percent, words in self.edits("moved"):
            self.assertNotEqual(words, WORDS)
            self.assertEqual(sorted(words), sorted(WORDS))
            matcher = difflib.SequenceMatcher(None, WORDS, words, autojunk=False)
            still = sum(block.size for block in matcher.get_matching_blocks())
            self.assertGreaterEqual(still, len(WORDS) - percent)

    def test_at_least_one_word_changes(self) -> None:
        self.assertEqual([changed_words(words, 1) for words in (5, 100, 149, 151)], [1, 1, 1, 2])
        self.assertEqual(changed_words(95, 20), 19)

    def test_an_unknown_kind_is_refused(self) -> None:
        with self.assertRaises(ValueError):
            edited(WORDS, "shuffled", 1, OTHERS, random.Random(0))


class ReaderTest(ToolTest):
    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def tsv(self, name: str, header: str, rows: list[str]) -> Path:
        path = self.folder / name
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    def articles(self, count: int, words: int) -> Path:
        """One paragraph an article, all of different words."""
        rows = [
            {"title": f"t{number}", "context": " ".join(f"p{number}w{place}" for place in range(words))}
            for number in range(count)
        ]
        return self.write("squad.jsonl", rows)

    def test_passages_are_cut_or_joined(self) -> None:
        rows = [{"title": title, "context": " ".join([word] * 60)} for title, word in ("ax", "ay", "az", "bu", "bv")]
        path = self.write("squad.jsonl", [*rows, rows[-1]])  # several questions to one paragraph
        first, second = passages_of(path, 100)
        self.assertEqual((set(first), set(second)), ({"x", "y"}, {"u", "v"}))  # of one article each, and z is too short
        self.assertEqual(len(first), len(second))
        self.assertAlmostEqual(len(first), 98 / 1.07, delta=1)
        self.assertEqual(passages_of(path, 1000), [])

    def test_edits_follow_their_passage(self) -> None:
        for workload, percents in (("edits-128", PERCENTS), ("small-edits-128", SMALL_PERCENTS)):
            with self.subTest(workload):
                self.check_edits(WORKLOADS[workload].read(self.articles(5, 200)), percents)

    def check_edits(self, traffic: Traffic, percents: tuple[int, ...]) -> None:
        edits = len(KINDS) * len(percents)
        self.assertEqual((traffic.fill, len(traffic.requests)), (2 * (1 + edits), 4 * (1 + edits)))
        for start in range(0, len(traffic.requests), 1 + edits):
            original, *changed = (request.sequences[0] for request in traffic.requests[start : start + 1 + edits])
            self.assertEqual((original.edit_kind, original.edit_percent), (AS_IT_IS, 0))
            kinds = [(sequence.edit_kind, sequence.edit_percent) for sequence in changed]
            self.assertEqual(sorted(kinds), sorted((kind, percent) for kind in KINDS for percent in percents))
            self.assertNotEqual(kinds, [(kind, percent) for kind in KINDS for percent in percents], "not shuffled")
            words = original.pair[0].split()
            passage = words[0].split("w")[0]
            for sequence in changed:
                new = sequence.pair[0].split()
                matcher = difflib.SequenceMatcher(None, words, new, autojunk=False)
                still = sum(block.size for block in matcher.get_matching_blocks())
                count = changed_words(len(words), sequence.edit_percent or 0)
                self.assertGreaterEqual(still, len(words) - count)
                longer = {"inserted": count, "appended": count, "deleted": -count}
                self.assertEqual(len(new) - len(words), longer.get(str(sequence.edit_kind), 0))
                strange = {word.split("w")[0] for word in new} - {passage}
                self.assertEqual(bool(strange), sequence.edit_kind in ("substituted", "inserted", "appended"))

    def test_edits_of_both_parts_have_no_word_in_common(self) -> None:
        traffic = WORKLOADS["edits-256"].read(self.articles(6, 300))
        fill, ask = (
            {word for text in texts(part) for word in text.split()}
            for part in (traffic.requests[: traffic.fill], traffic.requests[traffic.fill :])
        )
        self.assertFalse(fill & ask)
        self.assertTrue(fill and ask)
        self.assertEqual(traffic, WORKLOADS["edits-256"].read(self.folder / "squad.jsonl"))

    def test_queries_and_edits_are_spread_evenly(self) -> None:
        train = self.tsv("train.tsv", "label\ttext", [f"c{i % 3}\tquery {i}" for i in range(400)])
        test = self.tsv("test.tsv", "label\ttext", [f"c{i % 3}\task {i}" for i in range(160)])
        traffic = WORKLOADS["queries-and-edits"].read(train, test, self.articles(5, 400))
        edits = 2 * (1 + len(KINDS) * len(SMALL_PERCENTS))
        self.assertEqual((traffic.fill, len(traffic.requests)), (50 + edits, 50 + edits + 20 + edits))
        for part, batches in ((traffic.requests[: traffic.fill], 50), (traffic.requests[traffic.fill :], 20)):
            places = [place for place, request in enumerate(part) if len(request.sequences) == 8]
            self.assertEqual(len(places), batches)
            gaps = [after - before for before, after in itertools.pairwise(places)]
            self.assertLessEqual(max(gaps) - min(gaps), 1)
            for request in part:
                self.assertIn(len(request.sequences), (1, 8))
                for sequence in request.sequences:
                    self.assertIsNone(sequence.label)
                    self.assertIsNone(sequence.edit_kind)
        asked = {text.split()[0] for text in texts(traffic.requests[traffic.fill :])}
        self.assertIn("ask", asked)
        self.assertNotIn("query", asked)

    def test_instructions(self) -> None:
        train = self.tsv("train.tsv", "label\ttext", [f"c{i % 3}\tquery {i}" for i in range(20)] + ["c0\task 1"])
        test = self.tsv("test.tsv", "label\ttext", [f"c{i % 3}\task {i}" for i in range(9)])
        for tokens, instruction in INSTRUCTIONS.items():
            traffic = WORKLOADS[f"instruct-{tokens}"].read(train, test)
            self.assertEqual((traffic.fill, traffic.label_names), (3, ["c0", "c1", "c2"]))
            fill, ask = traffic.requests[: traffic.fill], traffic.requests[traffic.fill :]
            self.assertEqual((len(texts(fill)), len(texts(ask))), (20, 9))
            self.assertFalse(texts(fill) & texts(ask), "a query of the asking part fills")
            for request in traffic.requests:
                for sequence in request.sequences:
                    text, start = sequence.pair[0], sequence.pool_from
                    assert start is not None
                    self.assertEqual(text[: start - 1], instruction)
                    self.assertRegex(text[start:], r"^(query|ask) \d+$")

    def test_news(self) -> None:
        rows = [f"l{i % 4}\ttitle {i}\ttext {i}" for i in range(2020)]
        path = self.tsv("news.tsv", "label\ttitle\tdescription", [*rows, rows[0]])
        traffic = WORKLOADS["agnews"].read(path)
        fill, ask = traffic.requests[: traffic.fill], traffic.requests[traffic.fill :]
        self.assertEqual((len(texts(fill)), len(texts(ask))), (2000, 20))
        self.assertFalse(texts(fill) & texts(ask))
        self.assertEqual(traffic.label_names, ["l0", "l1", "l2", "l3"])
        labels = {s.pair[0]: s.label for request in traffic.requests for s in request.sequences}
        self.assertEqual(labels["title 7. text 7"], 3)
        self.assertEqual(traffic, WORKLOADS["agnews"].read(path))
        short = self.tsv("short.tsv", "label\ttitle\tdescription", rows[:2000])
        with self.assertRaisesRegex(prepare_data.DataError, "2000 articles in it"):
            WORKLOADS["agnews"].read(short)

    def test_sentiment_parts_are_apart(self) -> None:
        train = self.tsv("train.tsv", "label\ttext", ["1\tgood", "0\tbad", "1\tfine", "1\tFine !"])
        test = self.tsv("test.tsv", "label\ttext", ["1\tfine", "1\tfine!"])
        traffic = WORKLOADS["sst2"].read(train, test)
        self.assertEqual(texts(traffic.requests[: traffic.fill]), {"good", "bad"})
        self.assertEqual(texts(traffic.requests[traffic.fill :]), {"fine", "fine!"})

    def questions(self) -> Path:
        """Thirty passages of 50 words in two sentences, with three questions each; and what is not taken."""
        rows = []
        for number in range(30):
            sentence = " ".join(f"p{number}w{place}" for place in range(25)) + "."
            context = f"{sentence} {sentence} {sentence}"
            for place in range(3):
                answers = [{"text": f"p{number}w{place}", "answer_start": 0}]
                rows.append({"context": context, "question": f"question {number} {place}?", "answers": answers})
            rows.append({"context": context, "question": f"unanswered {number}?", "answers": []})
        rows.append({"context": "Too short.", "question": "short?", "answers": [{"text": "short"}]})
        return self.write("squad.jsonl", rows)

    def test_passages_in_changing_order(self) -> None:
        path = self.questions()
        traffic = WORKLOADS["passages"].read(path)
        self.assertEqual((traffic.fill, len(traffic.requests)), (shared_texts.QUESTIONS, 2 * shared_texts.QUESTIONS))
        passages: set[str] = set()
        seen: list[tuple[set[tuple[str, ...]], set[str]]] = []
        for part in (traffic.requests[: traffic.fill], traffic.requests[traffic.fill :]):
            orders: list[tuple[str, ...]] = []
            asked: set[str] = set()
            for request in part:
                (sequence,) = request.sequences
                head, *order, question, answer = sequence.pieces
                self.assertEqual((head, len(order), sequence.scored), (shared_texts.HEAD, shared_texts.TOGETHER, 8))
                self.assertEqual(len(set(order)), shared_texts.TOGETHER)
                self.assertRegex(question, r"^Question: question \d+ \d\?\nAnswer:$")
                self.assertTrue(any(f"{answer} " in f" {passage}" for passage in order))
                orders.append(tuple(order))
                asked.add(question)
                passages.update(order)
            self.assertEqual(len(set(orders)), len(orders))
            seen.append((set(orders), asked))
        (fill_orders, fill_asked), (ask_orders, ask_asked) = seen
        self.assertFalse(fill_orders & ask_orders)
        self.assertFalse(fill_asked & ask_asked)
        self.assertEqual(len(passages), shared_texts.POOL)
        self.assertEqual({len(passage.split()) for passage in passages}, {50})
        self.assertEqual(traffic, WORKLOADS["passages"].read(path))
        few = self.write("few.jsonl", [json.loads(line) for line in path.read_text().splitlines()[:8]])
        with self.assertRaisesRegex(prepare_data.DataError, "2 passages with questions"):
            WORKLOADS["passages"].read(few)

    def dialogues(self) -> list[Path]:
        bench = [
            {"turns": ["Compare bench apples", "Which bench again?"], "reference": ["Apples.", "Pears."]},
            {"turns": ["No reference here"]},
            {"turns": ["Empty answer", "follows"], "reference": ["Something", ""]},
        ]
        names = ["alpha", "bravo", "charly", "delta", "foxtrot", "golfer", "hotels", "indigo", "juliet", "kilos"]
        two = [{"u0": f"What {n} means?", "response0": f"{n}.", "u1": f"And {n}?", "response1": n} for n in names]
        fields = ("main_query", "main_response", "followup_query", "followup_response")
        contextual = [{field: f"{field} context{number}" for field in fields} for number in range(5)]
        return [self.write(n, r) for n, r in (("b.jsonl", bench), ("t.jsonl", two), ("c.jsonl", contextual))]

    def test_corrections(self) -> None:
        paths = self.dialogues()
        traffic = WORKLOADS["chat-edit"].read(*paths)
        self.assertEqual(traffic, WORKLOADS["chat-edit"].read(*paths))
        original: tuple[str, ...] = ()
        group: int | None = None
        questions: list[set[str]] = [set(), set()]
        changes = 0
        for number, request in enumerate(traffic.requests):
            (sequence,) = request.sequences
            pieces = sequence.pieces
            self.assertEqual((len(pieces), sequence.scored), (1 + 4 * 4, len(pieces) - 1))
            if sequence.edit_kind == AS_IT_IS:
                original, group = pieces, request.group
                self.assertEqual(group, number)  # one answer, whatever is corrected
                questions[number >= traffic.fill].add(pieces[2])
                continue
            changes += 1
            self.assertEqual(request.group, group)
            self.assertEqual(sequence.edit_kind, "substituted")
            (place,) = (place for place, piece in enumerate(pieces) if piece != original[place])
            self.assertIn(place, (2, 6))  # the first two questions
            old, new = original[place].split(), pieces[place].split()
            ((before, after),) = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
            self.assertLessEqual(abs(len(before) - len(after)), 1)
            said = [piece.removeprefix(ANSWER) for piece in original]
            words = sum(len(text.split()) for text in said if not text.startswith("\0"))
            self.assertAlmostEqual(sequence.edit_percent or 0, 100 / words)
        self.assertGreater(changes, len(traffic.requests) // 2)
        self.assertTrue(questions[0] and questions[1])
        self.assertFalse(questions[0] & questions[1])
        self.assertNotIn("No reference here", str(traffic))
        self.assertNotIn("Empty answer", str(traffic))


class WholeTokenizer:
    """A token for each letter; what is longer than 30 is cut, as the real ones do at their limit."""

    encoder = True

    def encode(self, sequences: list[Sequence]) -> list[Encoded]:
        return [self.encoded([ord(letter) for letter in s.pair[0]], s.pool_from) for s in sequences]

    def encoded(self, ids: list[int], start: int | None) -> Encoded:
        pool = None if start is None else [int(place >= start) for place in range(len(ids))]
        return Encoded(ids[:30], cut=len(ids) > 30, pool=pool)


class BuildTest(unittest.TestCase):
    def build(self, name: str, traffic: Traffic) -> tuple[dict[str, Any], str, int]:
        return prepare_data.build(WORKLOADS[name], WholeTokenizer(), traffic)  # type: ignore[arg-type]

    def edit(self, length: int, kind: str) -> Request:
        percent = 0 if kind == AS_IT_IS else 2.5
        return Request([Sequence(("a" * length, None), ("a",), edit_kind=kind, edit_percent=percent)])

    def test_what_would_be_cut_is_left_out(self) -> None:
        requests = [
            self.edit(30, "none"),
            self.edit(31, "inserted"),
            self.edit(29, "deleted"),
            self.edit(31, "none"),  # and so are the edits of a passage that is too long
            self.edit(29, "deleted"),
            self.edit(10, "none"),
            self.edit(12, "moved"),
        ]
        arrays, task, fill = self.build("edits-128", Traffic(requests, fill=4))
        self.assertEqual((task, fill), ("", 2))
        self.assertEqual(np.diff(arrays["sequence_offsets"]).tolist(), [30, 29, 10, 12])
        self.assertEqual([EDIT_KINDS[kind] for kind in arrays["edit_kind"]], ["none", "deleted", "none", "moved"])
        self.assertEqual(arrays["edit_percent"].tolist(), [0, 2.5, 0, 2.5])
        self.assertEqual((str(arrays["edit_kind"].dtype), str(arrays["edit_percent"].dtype)), ("int64", "float32"))
        self.assertNotIn("pool", arrays)

    def test_pool_has_an_entry_for_each_token(self) -> None:
        sequences = [Sequence(("abcd", None), ("a",), label=0, pool_from=start) for start in (1, 3)]
        arrays, task, _ = self.build("instruct-40", Traffic([Request(sequences)]))
        self.assertEqual((task, arrays["pool"].tolist()), ("classification", [0, 1, 1, 1, 0, 0, 0, 1]))
        self.assertEqual(str(arrays["pool"].dtype), "int64")
        self.assertEqual(sorted(arrays), ["labels", "pool", "request_offsets", "sequence_offsets", "tokens"])

    def test_answers_are_written_as_the_model_reads_them(self) -> None:
        self.assertEqual(written(ANSWER + "Yes.", PLAIN_MARKS), " Yes.")
        self.assertEqual(written(ANSWER + "Yes.", CHAT_MARKS["smollm2"]), "Yes.")
        self.assertEqual(written("as it is", PLAIN_MARKS), "as it is")


class PreparedTest(ToolTest):
    """With the real tokenizer."""

    def prepare(self, workload: str, out: str) -> bytes:
        chosen = ("--only", workload, "--tokenizer", "bert-base-uncased")
        arguments = (*chosen, "--raw", self.folder / "raw", "--out", self.folder / out)
        status, _, err = self.run_tool(prepare_data, *arguments)
        self.assertEqual(status, 0, err)
        return (self.folder / out / f"{workload}.bert-base-uncased.safetensors").read_bytes()

    def load(self, workload: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        loaded = prepare_data.load(self.folder / "a" / f"{workload}.bert-base-uncased.safetensors")
        assert loaded is not None
        return loaded

    def test_pool_covers_just_the_query(self) -> None:
        from tokenizers import Tokenizer

        from tools.models.model_sources import minilm_folder

        folder = self.folder / "raw" / "banking77"
        folder.mkdir(parents=True)
        queries = ["Where's my card?", "Überweisung to 15€ account?!", "question", "é"]
        (folder / "train.tsv").write_text("label\ttext\n" + "".join(f"a\t{query} too\n" for query in queries))
        (folder / "test.tsv").write_text("label\ttext\n" + "".join(f"a\t{query}\n" for query in queries))
        for tokens in INSTRUCTIONS:
            workload = f"instruct-{tokens}"
            self.assertEqual(self.prepare(workload, "a"), self.prepare(workload, "b"), "not the same bytes")
            arrays, metadata = self.load(workload)
            self.assertEqual((metadata["fill_requests"], metadata["task"]), ("1", "classification"))
            offsets = arrays["sequence_offsets"]
            tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            wanted = sorted(
                tokenizer.encode(text + more, add_special_tokens=False).ids for text in queries for more in ("", " too")
            )
            got = []
            for begin, end in itertools.pairwise(offsets):
                ids, pool = arrays["tokens"][begin:end], arrays["pool"][begin:end]
                self.assertEqual((pool[0], pool[-1]), (0, 0))
                self.assertLessEqual(set(pool.tolist()), {0, 1})
                got.append(ids[pool == 1].tolist())
            self.assertEqual(sorted(got), wanted)
            instruction = len(tokenizer.encode(INSTRUCTIONS[tokens], add_special_tokens=False).ids)
            self.assertAlmostEqual(instruction, tokens, delta=0.1 * tokens)
            self.assertEqual(set((1 - arrays["pool"]).tolist()), {0, 1})

    def test_edits_are_the_same_each_time(self) -> None:
        folder = self.folder / "raw" / "squad_v2"
        folder.mkdir(parents=True)
        draw = random.Random(1)
        rows = [
            {"title": f"t{number}", "context": " ".join(draw.choices(["cat", "dog", "sun", "sea", "tree"], k=600))}
            for number in range(6)
        ]
        (folder / "squad_v2_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for tokens in (128, 512):
            workload = f"edits-{tokens}"
            self.assertEqual(self.prepare(workload, "a"), self.prepare(workload, "b"), "not the same bytes")
            arrays, metadata = self.load(workload)
            self.assertEqual(json.loads(metadata["edit_kinds"]), list(EDIT_KINDS))
            lengths = np.diff(arrays["sequence_offsets"])
            originals = lengths[arrays["edit_kind"] == 0]
            self.assertTrue((abs(originals - tokens) < 0.15 * tokens).all(), originals)
            self.assertLessEqual(lengths.max(), 512)
            self.assertEqual(np.diff(arrays["request_offsets"]).tolist(), [1] * len(lengths))
            self.assertEqual(int(metadata["fill_requests"]) * 2, len(lengths))


if __name__ == "__main__":
    unittest.main()
