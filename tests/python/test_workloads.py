"""Tests of tools/data/prepare_data.py and the workloads it makes."""

from __future__ import annotations

import json
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from support import ROOT, ToolTest  # lets the tools be imported

# isort: split
import itertools

from tools.data import prepare_data
from tools.data.readers import read_openbookqa
from tools.data.tokenization import Encoded, join
from tools.data.traffic import ASSISTANT, MAX_TOKENS, NEXT_USER, SYSTEM, USER, Request, Sequence, Traffic
from tools.data.workloads import WORKLOADS, named, with_shots
from tools.models import tokenizer_files


class PrepareDataTest(ToolTest):
    def prepare(self, *arguments: object) -> tuple[int, str, str]:
        return self.run_tool(prepare_data, "--out", self.folder / "out", *arguments)

    def raw(self, file: str, content: bytes) -> Path:
        path = self.folder / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return self.folder / "raw"

    def test_sample(self) -> None:
        tokenizer = ("--tokenizer", "bert-base-uncased")
        status, _, err = self.prepare("--only", "sample", *tokenizer)
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
        self.assertEqual((metadata["version"], metadata["workload"], metadata["max_tokens"]), ("2", "sample", "512"))
        self.assertEqual((metadata["task"], metadata["fill_requests"]), ("", "0"))
        self.assertEqual(metadata["order"], "shuffled, seed 0")

        self.assertIn("skipped", self.prepare("--only", "sample", *tokenizer)[1])
        whole = path.read_bytes()
        for damaged in (whole[:-8], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            self.assertIsNone(prepare_data.load(path))
            self.assertNotIn("skipped", self.prepare("--only", "sample", *tokenizer)[1])
            again = prepare_data.load(path)
            assert again is not None
            self.assertEqual(again[1], metadata)

    def test_damaged_raw_files_are_named_with_their_line(self) -> None:
        good = json.dumps({"context": "A passage.", "question": "What?", "answers": []}).encode()
        unanswered = json.dumps({"context": "A passage.", "question": "What?"}).encode()
        odd = json.dumps({"context": "A passage.", "question": "What?", "answers": [{"text": 3}]}).encode()
        choices = {"question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}] * 3}}
        four = [{"text": "a", "label": label} for label in "ABCD"]
        keyless = {"question": {"stem": "Why?", "choices": four}, "answerKey": "E"}
        intents = b"label\ttext\nlost_card\tWhere is it?\n"
        conversations = b'{"turns": ["Hi"], "u0": "Hi", "u1": "And you?"}\n'
        pairs, scores = b"label\ttext_a\ttext_b\n", b"score\ttext_a\ttext_b\tgenre\tsubset\n"
        cases = [
            ("squad", "squad_v2/squad_v2_dev.jsonl", good + b"\n" + good[:20], ":2:"),
            ("squad", "squad_v2/squad_v2_dev.jsonl", good + b'\n{"context": "x"}\n', ":2:"),
            ("squad", "squad_v2/squad_v2_dev.jsonl", b"", "no record"),
            ("openbookqa", "openbookqa/test.jsonl", json.dumps(choices).encode(), ":1:"),
            ("openbookqa", "openbookqa/test.jsonl", b"[1]\n", ":1:"),
            ("openbookqa", "openbookqa/test.jsonl", json.dumps(keyless).encode(), "answerKey"),
            ("squad", "squad_v2/squad_v2_dev.jsonl", unanswered, "'answers'"),
            ("squad", "squad_v2/squad_v2_dev.jsonl", good + b"\n" + odd, ":2:"),
            ("banking77", "banking77/train.tsv", b"label\ttext\nlost_card\n", ":2:"),
            ("banking77", "banking77/train.tsv", b"label\ttext\na\t\xff\xfe\n", ":2:"),
            ("banking77", "banking77/train.tsv", b"label\ttext\n", "no record"),
            ("banking77", "banking77/test.tsv", intents + b"no_such_label\tHm?\n", ":3:"),
            ("clinc150", "clinc150/train_small.tsv", b"text\tlabel\n", "header"),
            ("clinc150", "clinc150/test.tsv", b"label\ttext\n\tHm?\n", "an empty field"),
            ("qqp", "pairs/qqp_gptcache.tsv", pairs + b"2\ta\tb\n", ":2:"),
            ("qqp", "pairs/qqp_gptcache.tsv", pairs, "no record"),
            ("stsb", "pairs/stsb_dev.tsv", scores + b"nan\ta\tb\tc\td\n", "a number from 0 to 5"),
            ("stsb", "pairs/stsb_dev.tsv", scores + b"5.5\ta\tb\tc\td\n", ":2:"),
            ("chat", "prompts/mt_vicuna_bench.jsonl", b'{"turns": []}\n', ":1:"),
            ("chat", "prompts/mt_vicuna_bench.jsonl", b'{"turns": ["a"]}\n{"turns": ["a", " "]}\n', ":2:"),
            ("chat", "prompts/meancache_multiturn.jsonl", b'{"u0": "a"}\n', "'u1'"),
            ("generate", "wikitext/wiki.test.raw", b"\x89PNG\r\n", ":1:"),
            ("wikitext", "wikitext/wiki.test.raw", b" \n \x00\x01 garbage \n", ":2:"),
            ("wikitext", "wikitext/wiki.test.raw", b"\x89PNG\r\n", ":1:"),
        ]
        for workload, file, content, where in cases:
            with self.subTest(f"{workload} {content[:30]!r}"):
                for other in named(workload)[0].files:  # its other files are good
                    raw = self.raw(other, conversations if workload == "chat" else intents)
                self.raw(file, content)
                # Reading comes before any tokenizer is loaded.
                status, _, err = self.prepare("--only", workload, "--raw", raw)
                self.assertEqual(status, 1)
                self.assertIn(str(raw / file), err)
                self.assertIn(where, err)
                self.assertEqual(list((self.folder / "out").glob("*.safetensors")), [])

    def test_missing_raw_data_falls_back_to_the_sample(self) -> None:
        raw = self.folder / "raw"
        raw.mkdir()
        tokenizer = ("--tokenizer", "bert-base-uncased")
        status, out, err = self.prepare("--only", "squad", "--raw", raw, *tokenizer)
        self.assertEqual(status, 0, err)
        self.assertIn("squad: squad_v2/squad_v2_dev.jsonl is not in the raw data", out)
        self.assertIn("'sample-documents' stands in", out)
        names = [path.name for path in (self.folder / "out").glob("*.safetensors")]
        self.assertEqual(names, ["sample-documents.bert-base-uncased.safetensors"])
        status, out, err = self.prepare("--only", "stsb", "--raw", raw, *tokenizer)
        self.assertEqual(status, 1)
        self.assertIn("no sample is of its kind", out)
        self.assertIn("run.sh data", err)

    def test_a_stand_in_keeps_the_name_of_the_tokenizer(self) -> None:
        """The benchmark finds token files by the tokenizer's name; without a hub and raw data GPT-2's is not there."""
        tokenizer = ("--tokenizer", "gpt2")
        raw = self.folder / "raw"
        raw.mkdir()
        with mock.patch.object(tokenizer_files, "hub_answers", return_value=False):
            for _ in range(2):  # made again, in case the real one has come
                status, out, err = self.prepare("--only", "sample", "--raw", raw, *tokenizer)
                self.assertEqual(status, 0, err)
                self.assertIn("token ids of smollm2", out)
        loaded = prepare_data.load(self.folder / "out" / "sample.gpt2.safetensors")
        assert loaded is not None
        self.assertEqual(loaded[1]["tokenizer"], "gpt2")
        self.assertIn("token ids of smollm2, which stand in for gpt2's", loaded[1]["source"])

    def test_conversations_are_marked_as_the_model_was_trained(self) -> None:
        tokenizer = ("--tokenizer", "smollm2")
        self.raw("prompts/mt_vicuna_bench.jsonl", b'{"turns": ["Hello there.", "And now?"]}\n')
        raw = self.raw("prompts/meancache_multiturn.jsonl", b'{"u0": "One", "u1": "Two"}\n')
        status, _out, err = self.prepare("--only", "chat", "--raw", raw, *tokenizer)
        self.assertEqual(status, 0, err)
        loaded = prepare_data.load(self.folder / "out" / "chat.smollm2.safetensors")
        assert loaded is not None
        arrays, metadata = loaded
        self.assertEqual((metadata["task"], metadata["new_tokens"], metadata["stop_token"]), ("generation", "32", "2"))
        self.assertEqual(arrays["request_offsets"].tolist(), [0, 2, 4])
        tokens, offsets = arrays["tokens"].tolist(), arrays["sequence_offsets"].tolist()
        parts = [tokens[begin:end] for begin, end in itertools.pairwise(offsets)]
        # <|im_start|> is 1, <|im_end|> is 2. A first part: system, user, assistant; a further one ends the answer.
        for first, further in ((parts[0], parts[1]), (parts[2], parts[3])):
            self.assertEqual((first[0], first.count(1), first.count(2)), (1, 3, 2))
            self.assertEqual((further[0], further.count(1), further.count(2)), (2, 2, 2))
        self.assertEqual(parts[0][:20], parts[2][:20])

    def test_shots(self) -> None:
        def line(stem: str) -> bytes:
            choices = [{"text": f"{stem} {label}", "label": label} for label in "ABCD"]
            return json.dumps({"question": {"stem": stem, "choices": choices}, "answerKey": "B"}).encode() + b"\n"

        tokenizer = ("--tokenizer", "smollm2")
        self.raw("openbookqa/test.jsonl", line("Why") + line("How"))
        raw = self.raw("openbookqa/train_sample.jsonl", line("One") + line("Two") + line("Three"))
        common = ("--raw", raw, *tokenizer)
        status, _out, err = self.prepare("--only", "openbookqa-2shot", *common)
        self.assertEqual(status, 0, err)
        names = sorted(path.name for path in (self.folder / "out").glob("*.safetensors"))
        self.assertEqual(names, ["openbookqa-2shot.smollm2.safetensors"])
        loaded = prepare_data.load(self.folder / "out" / names[0])
        assert loaded is not None
        arrays, metadata = loaded
        self.assertEqual(metadata["workload"], "openbookqa-2shot")
        tokens, offsets = arrays["tokens"].tolist(), arrays["sequence_offsets"].tolist()
        rows = [tokens[begin:end] for begin, end in itertools.pairwise(offsets)]
        shared = next(i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1)
        scored = arrays["scored"].tolist()
        self.assertEqual(shared, 8)  # "One One B\nTwo Two B\n"
        self.assertGreater(scored[0][0], shared)
        status, _, err = self.prepare("--only", "openbookqa-4shot", *common)
        self.assertEqual(status, 1)
        self.assertIn("train_sample.jsonl: 3 questions in it, too few for 4 examples", err)
        for bad in ("openbookqa-0shot", "openbookqa-xshot", "openbookqa-100shot", "squad-2shot"):
            self.assertEqual(self.prepare("--only", bad, *common)[0], 2)

    def test_texts_that_are_too_short_to_go_on_from(self) -> None:
        tokenizer = ("--tokenizer", "smollm2")
        long = b" = Two = \n" + b" word" * 130 + b" \n"
        raw = self.raw("wikitext/wiki.test.raw", b" = One = \n Short . \n" + long)
        status, _, err = self.prepare("--only", "generate-128", "--raw", raw, *tokenizer)
        self.assertEqual(status, 0, err)
        loaded = prepare_data.load(self.folder / "out" / "generate-128.smollm2.safetensors")
        assert loaded is not None
        self.assertEqual(loaded[0]["sequence_offsets"].tolist(), [0, 128])
        self.assertEqual(loaded[1]["new_tokens"], "32")
        self.assertNotIn("stop_token", loaded[1])
        status, _, err = self.prepare("--only", "generate", "--raw", raw, *tokenizer)
        self.assertEqual(status, 1)
        self.assertIn("no text in it is long enough for generate-512", err)

    def test_raw_folder_that_is_not_there(self) -> None:
        status, _, err = self.prepare("--raw", self.folder / "nowhere")
        self.assertEqual(status, 1)
        self.assertIn("nowhere", err)

    def test_articles_grow_from_heading_to_heading(self) -> None:
        raw = self.raw(
            "wikitext/w", b" \n = One = \n \n First . \n \n = = Part = = \n \n Second . \n = Two = \n Third . \n"
        )
        requests = WORKLOADS["wikitext"].read(raw / "wikitext" / "w").requests
        pieces = [request.sequences[0].pieces for request in requests]
        first, second = " = One = \n First . \n", " = = Part = = \n Second . \n"
        self.assertEqual(pieces, [(first,), (first, second), (" = Two = \n Third . \n",)])
        self.assertEqual([request.sequences[0].scored for request in requests], [0, 1, 0])


class JoinTest(unittest.TestCase):
    """Where the scored piece lies once pieces are put together and cut."""

    def test_everything_fits(self) -> None:
        self.assertEqual(join([[1, 2], [3], [4, 5]], 0, 2), Encoded([1, 2, 3, 4, 5], (3, 5)))

    def test_the_first_token_is_never_scored(self) -> None:
        self.assertEqual(join([[1, 2, 3]], -1, 0).scored, (1, 3))
        self.assertEqual(join([[7]], -1, 0).scored, (1, 1))

    def test_nothing_is_scored(self) -> None:
        self.assertEqual(join([[1, 2], [3]], 0, None).scored, (3, 3))

    def test_the_piece_that_gives_way_moves_the_range(self) -> None:
        joined = join([list(range(600)), [7], [8, 9]], 0, 2)
        self.assertEqual((len(joined.ids), joined.ids[-3:], joined.scored), (MAX_TOKENS, [7, 8, 9], (510, 512)))

    def test_a_scored_piece_that_was_cut(self) -> None:
        self.assertEqual(join([[0] * 500, [1] * 100], -1, 1).scored, (500, 512))
        self.assertEqual(join([[0] * 600, [1] * 10], -1, 1).scored, (512, 512))


class TrafficTest(ToolTest):
    """What the tasks need, read from small files."""

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def test_intents_train_fills_and_test_asks(self) -> None:
        train = self.write("train.tsv", "label\ttext\n" + "".join(f"c{i % 3}\tquery {i}\n" for i in range(20)))
        test = self.write("test.tsv", "label\ttext\n" + "".join(f"c{i % 3}\task {i}\n" for i in range(9)))
        traffic = WORKLOADS["banking77"].read(train, test)
        self.assertEqual((traffic.fill, traffic.label_names), (3, ["c0", "c1", "c2"]))
        self.assertEqual([len(request.sequences) for request in traffic.requests], [8, 8, 4, 8, 1])
        rows = [(s.pair[0], s.label) for request in traffic.requests for s in request.sequences]
        fill, ask = rows[:20], rows[20:]
        self.assertEqual(sorted(fill), sorted((f"query {i}", i % 3) for i in range(20)))
        self.assertEqual(sorted(ask), sorted((f"ask {i}", i % 3) for i in range(9)))
        self.assertNotEqual([text for text, _ in fill], [f"query {i}" for i in range(20)], "not shuffled")
        self.assertEqual(traffic, WORKLOADS["banking77"].read(train, test))

    def test_duplicates_name_their_fill_request(self) -> None:
        rows = [("1", "a", "x"), ("0", "b", "y"), ("0", "a", "z"), ("1", "c", "x")]
        path = self.write("qqp.tsv", "label\ttext_a\ttext_b\n" + "".join("\t".join(row) + "\n" for row in rows))
        traffic = WORKLOADS["qqp"].read(path)
        texts = [request.sequences[0].pair[0] for request in traffic.requests]
        self.assertEqual((traffic.fill, sorted(texts[:3])), (3, ["a", "b", "c"]))
        self.assertEqual({(r.partner, r.pair_label) for r in traffic.requests[:3]}, {(-1, -1)})
        asked = [
            (str(request.pair_label), texts[request.partner], text)
            for request, text in zip(traffic.requests[3:], texts[3:], strict=True)
            if request.partner is not None
        ]
        self.assertEqual(sorted(asked), sorted(rows))

    def test_equal_answers_have_equal_numbers(self) -> None:
        answers = ["The  Answer.", None, "answer", "an other", "..."]
        lines = [
            json.dumps({"context": "C", "question": "Q", "answers": [] if a is None else [{"text": a}, {"text": "x"}]})
            for a in answers
        ]
        traffic = WORKLOADS["squad"].read(self.write("squad.jsonl", "\n".join(lines)))
        self.assertEqual([request.group for request in traffic.requests], [0, -1, 0, 1, 2])
        self.assertEqual(traffic.requests[2].sequences[0].pieces[1:], ("\nQuestion: Q\nAnswer:", " answer"))
        self.assertEqual([request.sequences[0].scored for request in traffic.requests], [2, None, 2, 2, 2])

    def test_pairs_with_scores(self) -> None:
        lines = "".join(f"{i / 2}\tfirst {i}\tsecond {i}\tg\ts\n" for i in range(11))
        path = self.write("stsb.tsv", "score\ttext_a\ttext_b\tgenre\tsubset\n" + lines)
        requests = WORKLOADS["stsb"].read(path).requests
        seen = {tuple(s.pair[0] for s in request.sequences): request.pair_score for request in requests}
        self.assertEqual(seen, {(f"first {i}", f"second {i}"): i / 2 for i in range(11)})

    def test_beginnings_are_long_enough_and_one_an_article(self) -> None:
        paragraph = " ".join(["word"] * 300)
        text = f" = One = \n {paragraph} \n {paragraph} \n {paragraph} \n = Two = \n Short . \n"
        requests = WORKLOADS["generate-512"].read(self.write("w", text)).requests
        pieces = [request.sequences[0].pieces for request in requests]
        self.assertEqual([len(piece[0].split()) for piece in pieces], [3 + 600, 3 + 2])
        self.assertEqual([len(piece) for piece in pieces], [1, 1])

    def test_conversations(self) -> None:
        bench = self.write("bench.jsonl", '{"turns": ["a", "b"]}\n{"turns": ["c"]}\n')
        two = self.write("two.jsonl", '{"u0": "d", "u1": "e", "response0": "no"}\n')
        requests = WORKLOADS["chat"].read(bench, two).requests
        pieces = sorted([sequence.pieces for sequence in request.sequences] for request in requests)
        first = [(SYSTEM, USER, text, ASSISTANT) for text in "acd"]
        then = {text: (NEXT_USER, text, ASSISTANT) for text in "be"}
        self.assertEqual(pieces, [[first[0], then["b"]], [first[1]], [first[2], then["e"]]])
        self.assertEqual(requests, WORKLOADS["chat"].read(bench, two).requests)

    def test_solved_examples_stand_in_front(self) -> None:
        def row(stem: str, key: str) -> str:
            choices = [{"text": f"choice {label}", "label": label} for label in "ABCD"]
            return json.dumps({"question": {"stem": stem, "choices": choices}, "answerKey": key}) + "\n"

        test = self.write("test.jsonl", row("Why", "C"))
        train = self.write("train.jsonl", row("First", "A") + row("Second", "D") + row("Third", "B"))
        (request,) = read_openbookqa(test, train, 2).requests
        front = ("First choice A\n", "Second choice D\n", "Why")
        self.assertEqual([s.pieces for s in request.sequences], [(*front, f" choice {label}") for label in "ABCD"])
        self.assertEqual(
            [(s.scored, s.shorten, s.label) for s in request.sequences], [(3, 2, int(c == "C")) for c in "ABCD"]
        )
        self.assertEqual(with_shots(WORKLOADS["openbookqa"], 2).read(test, train), read_openbookqa(test, train, 2))
        shots = with_shots(WORKLOADS["openbookqa"], 2)
        self.assertEqual((shots.name, shots.decoders_only), ("openbookqa-2shot", True))
        self.assertEqual(read_openbookqa(test).requests[0].sequences[0].pieces, ("Why", " choice A"))

    def test_a_name_means_its_variants_too(self) -> None:
        self.assertEqual([one.name for one in named("generate")], ["generate-128", "generate-512"])
        self.assertEqual(named("generate-128"), [WORKLOADS["generate-128"]])
        self.assertEqual(named("squad"), [WORKLOADS["squad"]])
        self.assertEqual(named("gen"), [])
        self.assertEqual([one.name for one in named("openbookqa-5shot")], ["openbookqa-5shot"])

    def test_one_right_choice(self) -> None:
        choices = [{"text": f"choice {label}", "label": label} for label in "ABCD"]
        row = json.dumps({"question": {"stem": "Why", "choices": choices}, "answerKey": "C"})
        (request,) = WORKLOADS["openbookqa"].read(self.write("obqa.jsonl", row)).requests
        self.assertEqual([s.label for s in request.sequences], [0, 0, 1, 0])
        self.assertEqual([s.scored for s in request.sequences], [1] * 4)


class FakeTokenizer:
    """A token for each letter; what build() needs of a Tokenizer."""

    def __init__(self, encoder: bool) -> None:
        self.encoder = encoder

    def encode(self, sequences: list[Sequence]) -> list[Encoded]:
        if self.encoder:
            return [Encoded([ord(letter) for letter in s.pair[0]]) for s in sequences]
        return [join([[ord(letter) for letter in piece] for piece in s.pieces], s.shorten, s.scored) for s in sequences]


class BuildTest(unittest.TestCase):
    """Which tensors a token file has."""

    def build(self, name: str, requests: list[Request], encoder: bool) -> tuple[dict[str, Any], str]:
        return prepare_data.build(WORKLOADS[name], FakeTokenizer(encoder), Traffic(requests))[:2]  # type: ignore[arg-type]

    def test_choice(self) -> None:
        sequences = [Sequence(("ab", t), ("ab", t), scored=1, label=label) for t, label in (("c", 0), ("de", 1))]
        arrays, task = self.build("openbookqa", [Request(sequences)], encoder=False)
        self.assertEqual(task, "choice")
        self.assertEqual(arrays["scored"].tolist(), [[2, 3], [2, 4]])
        self.assertEqual(arrays["labels"].tolist(), [0, 1])
        self.assertEqual({str(arrays[n].dtype) for n in arrays if n != "tokens"}, {"int64"})
        arrays, task = self.build("openbookqa", [Request(sequences)], encoder=True)
        self.assertEqual((task, sorted(arrays)), ("", ["request_offsets", "sequence_offsets", "tokens"]))

    def test_answer(self) -> None:
        requests = [Request([Sequence(("q", "p"), ("p", "q", "a"), scored=2)], group=0)]
        arrays, task = self.build("squad", requests, encoder=False)
        self.assertEqual((task, arrays["group"].tolist(), arrays["scored"].tolist()), ("answer", [0], [[2, 3]]))
        arrays, task = self.build("squad", requests, encoder=True)
        self.assertEqual((task, arrays["group"].tolist(), "scored" in arrays), ("answer", [0], False))

    def test_pairs(self) -> None:
        requests = [
            Request([Sequence(("a", None), ("a",))], partner=-1, pair_label=-1),
            Request([Sequence(("b", None), ("b",))], partner=0, pair_label=1),
        ]
        arrays, task = self.build("qqp", requests, encoder=True)
        self.assertEqual(
            (task, arrays["partner"].tolist(), arrays["pair_label"].tolist()), ("duplicates", [-1, 0], [-1, 1])
        )
        pair = Request([Sequence(("a", None), ("a",)), Sequence(("b", None), ("b",))], pair_score=2.5)
        arrays, task = self.build("stsb", [pair], encoder=True)
        self.assertEqual((task, arrays["pair_score"].tolist()), ("similarity", [2.5]))
        self.assertEqual(str(arrays["pair_score"].dtype), "float32")

    def test_prompts_are_cut_to_one_length(self) -> None:
        requests = [Request([Sequence(("a", None), ("a" * n,))]) for n in (127, 128, 200)]
        arrays, task = self.build("generate-128", requests, encoder=False)
        self.assertEqual((task, arrays["sequence_offsets"].tolist()), ("generation", [0, 128, 256]))
        self.assertNotIn("scored", arrays)

    def test_conversations_that_would_be_too_long_are_left_out(self) -> None:
        requests = [
            Request([Sequence(("a", None), ("a" * first,)), Sequence(("b", None), ("b" * second,))])
            for first, second in ((400, 49), (400, 48), (1, 1))  # and two answers of 32
        ]
        arrays, _ = self.build("chat", requests, encoder=False)
        self.assertEqual(arrays["sequence_offsets"].tolist(), [0, 400, 448, 449, 450])
        self.assertEqual(arrays["request_offsets"].tolist(), [0, 2, 4])

    def test_growing_document_stops_when_full(self) -> None:
        pieces = ["a" * 500, "b" * 20, "c" * 30]
        requests = [
            Request([Sequence(("".join(pieces[:n]), None), tuple(pieces[:n]), scored=n - 1)]) for n in (1, 2, 3)
        ]
        arrays, task = self.build("wikitext", requests, encoder=False)
        self.assertEqual((task, arrays["scored"].tolist()), ("perplexity", [[1, 500], [500, 512]]))


if __name__ == "__main__":
    unittest.main()
