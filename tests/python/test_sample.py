"""The traffic that is written for this repository: it is what its README says, and every reader takes it."""

from __future__ import annotations

import json
import re
import unittest
from collections import Counter

from support import ROOT  # lets the tools be imported

from tools.data.traffic import AS_IT_IS, EDIT_KINDS, INSTRUCTED
from tools.data.workloads import WORKLOADS, stand_in_for, with_shots

SAMPLE = ROOT / "data" / "sample"


def read(name: str):  # type: ignore[no-untyped-def]
    workload = WORKLOADS[name]
    return workload.read(*(SAMPLE / file for file in workload.files))


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


class SampleTest(unittest.TestCase):
    def test_questions(self) -> None:
        rows = {
            name: [line.split("\t") for line in (SAMPLE / "faq" / f"{name}.tsv").read_text().splitlines()[1:]]
            for name in ("train", "test")
        }
        counts = Counter(label for part in rows.values() for label, _ in part)
        self.assertEqual(len(counts), 30)
        self.assertGreaterEqual(min(counts.values()), 60)
        texts = [normal(text) for part in rows.values() for _, text in part]
        self.assertEqual(len(set(texts)), len(texts), "every text is there once, in one of the parts")

    def test_a_stated_share_of_the_questions_repeats(self) -> None:
        traffic = read("sample-faq")
        asked = [s.pair[0] for request in traffic.requests[traffic.fill :] for s in request.sequences]
        counts = Counter(asked)
        self.assertEqual(len(asked) - len(counts), round(0.3 / 0.7 * len(counts)))
        self.assertGreater(counts.most_common(1)[0][1], 20, "popular ones repeat most")
        filled = {s.pair[0] for request in traffic.requests[: traffic.fill] for s in request.sequences}
        self.assertEqual(filled & set(asked), set())

    def test_documents(self) -> None:
        traffic = read("sample-documents")
        asked = Counter(s.pair[1] for request in traffic.requests for s in request.sequences)
        self.assertGreaterEqual(len(asked), 40)
        self.assertLessEqual({*asked.values()}, {4, 5, 6})
        self.assertTrue(all(120 <= len(passage.split()) <= 250 for passage in asked if passage))

    def test_edits(self) -> None:
        traffic = read("sample-edits-200")
        edits = Counter(s.edit_kind for request in traffic.requests for s in request.sequences)
        self.assertEqual({*edits}, {*EDIT_KINDS})
        self.assertEqual({edits[kind] for kind in EDIT_KINDS if kind != AS_IT_IS}, {4 * edits[AS_IT_IS]})
        self.assertEqual(traffic.fill * 2, len(traffic.requests))

    def test_conversations(self) -> None:
        traffic = read("sample-chat")
        turns = [len(request.sequences) for request in traffic.requests]
        self.assertGreaterEqual(len(turns), 20)
        self.assertLessEqual({*turns}, {3, 4, 5})
        systems = Counter(request.sequences[0].pieces[0] for request in traffic.requests)
        self.assertEqual(len(systems), 3)
        self.assertTrue(all(system.startswith(INSTRUCTED) for system in systems))

    def test_corrected_conversations(self) -> None:
        traffic = read("sample-chat-edit")
        kinds = Counter(s.edit_kind for request in traffic.requests for s in request.sequences)
        self.assertGreaterEqual(kinds["substituted"], 8)
        for before, after in zip(traffic.requests, traffic.requests[1:], strict=False):
            if after.sequences[0].edit_kind == AS_IT_IS:
                continue
            self.assertEqual(before.group, after.group)
            pieces = zip(before.sequences[0].pieces, after.sequences[0].pieces, strict=True)
            self.assertEqual(sum(one != other for one, other in pieces), 1, "one turn is another")

    def test_choices(self) -> None:
        requests = read("sample-choices").requests
        self.assertGreaterEqual(len(requests), 60)
        right = Counter([s.label for s in request.sequences].index(1) for request in requests)
        self.assertLessEqual(max(right.values()) - min(right.values()), 2)
        shots = with_shots(WORKLOADS["sample-choices"], 5)
        (first, *_) = shots.read(*(SAMPLE / file for file in shots.files)).requests
        self.assertEqual(len(first.sequences[0].pieces), 5 + 2)
        lines = (SAMPLE / "choices" / "train.jsonl").read_text().splitlines()
        stems = {json.loads(line)["question"]["stem"] for line in lines}
        self.assertFalse(stems & {request.sequences[0].pair[0] for request in requests})

    def test_articles(self) -> None:
        articles = [r.sequences[0].pieces[0] for r in read("sample-generate-128").requests]
        self.assertGreaterEqual(len(articles), 12)
        text = (SAMPLE / "articles" / "articles.raw").read_text()
        for article in re.split(r"(?m)^ = [^=]+ = $", text)[1:]:
            self.assertTrue(400 <= len(article.split()) <= 700, article[:60])

    def test_every_kind_of_real_data_has_its_sample(self) -> None:
        for name, sample in (
            ("wikitext", "sample-articles"),
            ("squad", "sample-documents"),
            ("openbookqa", "sample-choices"),
            ("banking77", "sample-faq"),
            ("chat", "sample-chat"),
            ("small-edits-256", "sample-edits-200"),
            ("queries-and-edits", "sample-queries-and-edits"),
            ("generate-128", "sample-generate-128"),
        ):
            found = stand_in_for(WORKLOADS[name])
            assert found is not None
            self.assertEqual(
                (found.name, found.task, found.growing), (sample, WORKLOADS[name].task, WORKLOADS[name].growing)
            )
        shots = stand_in_for(with_shots(WORKLOADS["openbookqa"], 3))
        assert shots is not None
        self.assertEqual(shots.name, "sample-choices-3shot")
        self.assertIsNone(stand_in_for(WORKLOADS["stsb"]))


if __name__ == "__main__":
    unittest.main()
