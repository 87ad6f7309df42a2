"""Tests of the download of real data, against a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

from support import ROOT, ToolTest  # lets the tools be imported

# isort: split
from hub_support import HUB, PATIENCE, SQUAD, Answer, jsonl, parquet, small_repos, use_hub
from small_data_sets import small_sets

from tools.data import download_data, raw_files
from tools.data.data_conversions import title_and_text
from tools.data.data_sources import DATA_SETS
from tools.data.raw_files import LOCK_FILE, DataError
from tools.data.readers import read_news
from tools.data.workloads import WORKLOADS

# The tool in a process of its own, which a signal can end; it takes the small data sets.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path[:0] = sys.argv[1:3]
from small_data_sets import DATA_SETS, small_sets
from tools.data import download_data
DATA_SETS |= small_sets()
sys.exit(download_data.main(sys.argv[3:]))
"""
BANKING = ("banking77/test.tsv", "banking77/train.tsv")


def setUpModule() -> None:
    use_hub()


class DownloadTest(ToolTest):
    def setUp(self) -> None:
        super().setUp()
        self.hub = HUB
        self.hub.reset(small_repos())
        self.out = self.folder / "raw"

    def download(self, *names: str, small: bool = True) -> tuple[int, str, str]:
        """With the small data sets, or as it is."""
        self.hub.requests.clear()
        chosen = ("--only", *names) if names else ()
        sleepless = mock.patch("time.sleep")  # between attempts
        with mock.patch.dict(DATA_SETS, small_sets() if small else {}), mock.patch.dict("os.environ"), sleepless:
            return self.run_tool(download_data, "--out", self.out, *chosen)

    def written(self) -> list[str]:
        """All files but downloads and those that lock."""
        found = (path.relative_to(self.out) for path in self.out.rglob("*") if path.is_file())
        return sorted(str(path) for path in found if path.parts[0] not in (".cache", ".lock"))

    def text(self, name: str) -> str:
        return (self.out / name).read_text(encoding="utf-8")

    def lock(self) -> dict[str, dict]:
        return json.loads(self.text(LOCK_FILE))["data_sets"]

    def refused(self, *parts: str, names: tuple[str, ...] = ("banking77",)) -> None:
        """The download fails, with one line that has these parts in it, and leaves nothing."""
        status, _, err = self.download(*names)
        self.assertEqual(status, 1, err)
        lines = [line for line in err.splitlines() if line.startswith("download_data")]
        self.assertEqual(len(lines), 1, err)
        for part in parts:
            self.assertIn(part, lines[0])
        self.assertNotIn("Traceback", err)
        self.assertEqual(self.written(), [])


class SuccessTest(DownloadTest):
    def test_every_data_set_is_what_the_readers_take(self) -> None:
        status, out, err = self.download()
        self.assertEqual((status, err), (0, ""))
        for name, source in DATA_SETS.items():
            self.assertIn(f"{name}: from {source.repo}@main; licence: {source.licence}", out)
        self.assertEqual(
            self.text("wikitext/wiki.test.raw"),
            " \n = One = \n \n First @-@ paragraph . \n Second paragraph . \n \n = = Part = = \n Third . \n",
        )
        answer = {"text": "Normandy", "answer_start": 23}
        questions = [json.loads(line) for line in self.text("squad_v2/squad_v2_dev.jsonl").splitlines()]
        self.assertEqual([q["question"] for q in questions], [q["question"] for q in SQUAD])
        self.assertEqual([q["answers"] for q in questions], [[], [answer], [], [answer]])
        self.assertEqual([q["is_impossible"] for q in questions], [True, False, True, False])
        choices = [{"text": t, "label": label} for t, label in zip(("one", "two", "three", "four"), "ABCD")]
        self.assertEqual(
            json.loads(self.text("openbookqa/test.jsonl").splitlines()[1]),
            {
                "id": "7-1",
                "question": {"stem": "Frilled sharks, 1", "choices": choices},
                "answerKey": "B",
                "fact1": "deep sea animals live deep in the ocean",
            },
        )
        self.assertEqual(
            [len(self.text(f"openbookqa/{n}.jsonl").splitlines()) for n in ("dev", "train_sample")], [3, 4]
        )
        self.assertEqual(
            self.text("banking77/train.tsv"),
            "label\ttext\ncard_arrival\tMy card, number 0?\nreverted_card_payment?\tMy card, number 1?\n",
        )
        self.assertEqual(self.text("clinc150/test.tsv"), "label\ttext\nweather\twhat is the weather\noos\twho cares\n")
        news = self.text("ag_news/test_sample.tsv").splitlines()
        self.assertEqual(
            news[:2],
            [
                "label\ttitle\tdescription",
                "Business\tWall St. Bears Claw Back (Reuters)\tReuters - Short-sellers are seeing green.",
            ],
        )
        self.assertEqual(sorted(line.split("\t")[0] for line in news[1:]), ["Business", "Sci/Tech", "Sports", "World"])
        self.assertEqual(
            sorted(self.text("sst2/train_sample.tsv").splitlines()),
            [
                "0\ta sometimes tedious film that never finds its way .",
                "1\tit 's a charming and often affecting journey .",
                "label\ttext",
            ],
        )
        self.assertEqual(self.text("sst2/dev.tsv"), "label\ttext\n0\tunflinchingly bleak and desperate\n")
        self.assertEqual(
            self.text("pairs/stsb_dev.tsv").splitlines()[1:],
            ["5\tA man with a hat.\tA man wearing a hat.\tunknown\tunknown", "1.4\tA cat.\tA dog.\tunknown\tunknown"],
        )
        for name in ("wikitext", "squad", "openbookqa", "banking77", "clinc150", "sst2", "stsb"):
            workload = WORKLOADS[name]
            self.assertTrue(workload.read(*(self.out / file for file in workload.files)).requests)
        self.assertEqual(len(read_news(self.out / "ag_news/test_sample.tsv", fill=2).label_names), 4)
        entries = self.lock()
        self.assertEqual(list(entries), sorted(DATA_SETS))
        locked = sorted(file for entry in entries.values() for file in entry["files"])
        self.assertEqual(self.written(), sorted([*locked, LOCK_FILE]))

    def test_what_is_there_is_skipped_and_what_changed_is_made_again(self) -> None:
        self.assertEqual(self.download("banking77", "stsb")[0], 0)
        self.assertEqual(len(self.hub.asked("GET", "/resolve/")), 3)
        status, out, _ = self.download("banking77", "stsb")
        self.assertEqual((status, self.hub.requests), (0, []))
        self.assertEqual(out.count("already there, skipped"), 2)
        good = self.text("banking77/train.tsv")
        for damage in (lambda path: path.write_text(good[:-5]), Path.unlink):
            damage(self.out / "banking77/train.tsv")
            status, out, err = self.download("banking77", "stsb")
            self.assertEqual(status, 0, err)
            self.assertEqual(self.text("banking77/train.tsv"), good)
            self.assertEqual(self.hub.asked("GET", "/resolve/"), [])  # downloads are kept
            self.assertIn("stsb: already there, skipped", out)

    def test_a_download_that_breaks_off_is_tried_again(self) -> None:
        self.hub.answers["train.jsonl"] = Answer(body=lambda content: content[:40], times=1)
        status, _, err = self.download("banking77")
        self.assertEqual(status, 0, err)
        self.assertEqual(len(self.hub.asked("GET", "train.jsonl")), 2)

    def test_a_failing_data_set_does_not_keep_others_away(self) -> None:
        self.hub.answers["train.jsonl"] = Answer(status=500)
        status, _, err = self.download("banking77", "stsb")
        self.assertEqual(status, 1)
        self.assertIn("mteb/banking77/train.jsonl@", err)
        self.assertEqual(self.written(), ["pairs/stsb_dev.tsv", LOCK_FILE])


class FailureTest(DownloadTest):
    def test_contents_that_are_not_those_of_the_hubs_list(self) -> None:
        for lfs, part in ((True, "from the hub"), (False, "git id")):
            with self.subTest(part):
                self.hub.repos["mteb/banking77"].lfs = lfs
                self.hub.answers["train.jsonl"] = Answer(body=lambda content: content.replace(b"card", b"cart"))
                self.refused("mteb/banking77/train.jsonl@aaaaaaaaaaaa", part)
        self.hub.answers.clear()
        self.assertEqual(self.download("banking77")[0], 0)  # what was refused is not kept
        self.assertEqual(self.written(), [*BANKING, LOCK_FILE])

    def test_contents_that_are_not_those_of_the_table(self) -> None:
        """The tool as it is: it asks for the commit of the table."""
        commit = DATA_SETS["banking77"].revision
        self.hub.repos["mteb/banking77"].commit = commit
        status, _, err = self.download("banking77", small=False)
        self.assertEqual((status, self.written()), (1, []))
        self.assertIn(f"expected {DATA_SETS['banking77'].sources[0].sha256} from data_sources.py", err)
        self.assertEqual(len(self.hub.asked("GET", f"/api/datasets/mteb/banking77/revision/{commit}")), 1)
        for _, path in self.hub.asked("GET", "/resolve/"):
            self.assertIn(commit, path)
        self.hub.repos["mteb/banking77"].commit = "b" * 40
        status, _, err = self.download("banking77", small=False)
        self.assertEqual(status, 1)
        self.assertIn(f"mteb/banking77@{commit}: the hub answers with status 404", err)

    def test_cut_off(self) -> None:
        self.hub.answers["train.jsonl"] = Answer(body=lambda content: content[:-5])
        self.refused("mteb/banking77/train.jsonl@", "the answer is cut off")
        # By something on the way that gives the length of what it sends.
        self.hub.answers["train.jsonl"] = Answer(body=lambda content: content[:-5], claim=True)
        self.refused("mteb/banking77/train.jsonl@", "size")

    def test_answers_that_are_no_hubs(self) -> None:
        for answer, part in (
            (Answer(status=500), "status 500"),
            (Answer(body=lambda _: b"<html>Please log in</html>"), "mteb/banking77@main"),
            (Answer(body=lambda _: b"{}"), "mteb/banking77@main"),
        ):
            with self.subTest(part):
                self.hub.answers["api"] = answer
                self.refused("mteb/banking77@main", part)
        del self.hub.answers["api"]
        del self.hub.repos["mteb/banking77"].files["test.jsonl"]
        self.refused("mteb/banking77/test.jsonl@", "not in the hub's list")
        del self.hub.repos["mteb/banking77"]
        self.refused("mteb/banking77@main", "status 404")

    def test_a_file_without_its_columns(self) -> None:
        self.hub.repos["mteb/banking77"].files["train.jsonl"] = jsonl([{"text": "a", "label": 1}] * 2)
        self.refused("train.jsonl", "no column label_text")

    def test_hub_that_cannot_be_reached(self) -> None:
        with self.hub.away():
            status, out, err = self.download(small=False)
        self.assertEqual((status, out, err.count("\n")), (3, "", 1))
        self.assertIn(f"download_data: {self.hub.endpoint} cannot be reached", err)
        self.assertEqual(self.written(), [])

    def test_hub_that_answers_no_more(self) -> None:
        self.hub.last = "sentence-transformers/stsb"
        status, _, err = self.download("banking77", "stsb")
        self.assertEqual(status, 3)
        self.assertIn("the hub does not answer any more", err.splitlines()[-1])
        self.assertEqual(self.written(), [*BANKING, LOCK_FILE])

    def test_interruption_leaves_no_half_files(self) -> None:
        for number, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
            with self.subTest(number.name):
                go_on = threading.Event()
                self.hub.stalled.clear()
                self.hub.answers["test.jsonl"] = Answer(stall=go_on)
                folders = (str(Path(__file__).parent), str(ROOT))
                running = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, *folders, "--out", str(self.out), "--only", "banking77"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                self.addCleanup(running.kill)
                self.assertTrue(self.hub.stalled.wait(PATIENCE))
                running.send_signal(number)
                _, err = running.communicate(timeout=PATIENCE)
                go_on.set()
                self.assertEqual((running.returncode, self.written()), (expected, []), err)
                self.assertNotIn("Traceback", err)
        self.hub.answers.clear()
        self.assertEqual(self.download("banking77")[0], 0)
        self.assertEqual(self.written(), [*BANKING, LOCK_FILE])
        self.assertEqual(self.hub.asked("GET", "train.jsonl"), [])  # it had come whole

    def test_wrong_arguments(self) -> None:
        status, _, err = self.download("no-such-set", small=False)
        self.assertEqual(status, 2)
        self.assertIn("no-such-set", err)


class ContentsTest(ToolTest):
    def test_files_with_other_contents_than_expected(self) -> None:
        known = DATA_SETS["clinc150"]
        source = replace(known, sources=tuple(replace(file, rows=2) for file in known.sources))
        rows = [{"text": "a", "intent": 0}, {"text": "b", "intent": 1}]
        names = {"intent": ["oos", "weather"]}
        good = parquet(rows, names)
        paths = [self.folder / f"{name}.parquet" for name in ("train", "val", "test")]
        out = self.folder / "out"
        for content, parts in (
            (parquet([{"text": "a", "label": 0}] * 2, names), ("no column intent", "only label, text")),
            (parquet(rows[:1], names), ("1 rows", "expected 2")),
            (parquet([rows[0], {"text": "b", "intent": 2}], names), ("test.parquet:2:", "'intent' is 2", "0 to 1")),
            (parquet([rows[0], {"text": " ", "intent": 1}], names), ("test.parquet:2:", "'text'")),
            (parquet(rows), ("no names of the classes in 'intent'",)),
            (parquet(rows, {"intent": ["oos", "unknown"]}), ("clinc150/test.tsv:3: label 'unknown'",)),
            (good[:-9], ("test.parquet: not a whole Parquet file",)),
            (b"version https://git-lfs.github.com/spec/v1\n", ("test.parquet: not a whole Parquet file",)),
        ):
            with self.subTest(parts):
                for path, bytes_ in zip(paths, (good, good, content)):
                    path.write_bytes(bytes_)
                with self.assertRaises(DataError) as failed:
                    download_data.write(source, paths, self.folder / "staging", out)
                for part in parts:
                    self.assertIn(part, str(failed.exception))
                self.assertFalse(out.exists())
        paths[2].write_bytes(good)
        self.assertEqual(len(download_data.write(source, paths, self.folder / "staging", out)), 3)
        wrong = replace(source, written={"clinc150/test.tsv": "0" * 64})
        with self.assertRaisesRegex(DataError, "clinc150/test.tsv: would be written with SHA-256"):
            download_data.write(wrong, paths, self.folder / "staging", out)

    def test_a_damaged_lock_file(self) -> None:
        path = self.folder / LOCK_FILE
        self.assertEqual(download_data.read_lock(path), {})
        for text in ("{", "[]", '{"data_sets": {"stsb": {}}}', '{"data_sets": {"stsb": {"files": {"a": 1}}}}'):
            with self.subTest(text):
                path.write_text(text)
                with self.assertRaisesRegex(DataError, f"{path}: not what this program wrote"):
                    download_data.read_lock(path)
                with mock.patch.dict("os.environ"):
                    status, _, err = self.run_tool(download_data, "--out", self.folder)
                self.assertEqual((status, err.count("\n")), (1, 1))

    def test_titles_end_where_something_tells(self) -> None:
        for article, title in (
            ("Stocks Rise on Oil (AP) AP - Stocks rose.", "Stocks Rise on Oil (AP)"),
            ("Stocks rise on oil AP - Stocks rose.", "Stocks rise on oil"),
            ("Oil prices soar again WASHINGTON, Aug. (Reuters) - Oil rose.", "Oil prices soar again"),
            ("Oil prices soar again NEW YORK (Reuters) - Oil rose.", "Oil prices soar again"),
            ("Rocket lifts off. It flew well.", "Rocket lifts off."),
            ("one two three four five six seven eight nine ten", "one two three four five six seven eight"),
            ("one two", "one"),
        ):
            with self.subTest(article):
                self.assertEqual(title_and_text(article), (title, article[len(title) + 1 :]))


class LockTest(DownloadTest):
    def setUp(self) -> None:
        super().setUp()
        self.assertEqual(self.download("stsb")[0], 0)
        self.repo = self.hub.repos["sentence-transformers/stsb"]
        self.good = self.text("pairs/stsb_dev.tsv")
        self.path = self.out / "pairs/stsb_dev.tsv"
        self.other = parquet([{"sentence1": "A", "sentence2": "B", "score": score} for score in (0.5, 0.6)])

    def test_a_branch_is_looked_up_once(self) -> None:
        entry = self.lock()["stsb"]
        self.assertEqual((entry["revision"], entry["commit"]), ("main", self.repo.commit))
        (name,), (locked,) = self.repo.files, entry["sources"].values()
        self.assertEqual(locked["size"], len(self.repo.files[name]))
        old = self.repo.commit
        self.repo.commit, self.repo.branches = "b" * 40, ("main", old)
        self.path.unlink()
        status, _, err = self.download("stsb")
        self.assertEqual(status, 1)
        self.assertIn("the hub answers with another commit", err)
        self.assertEqual(len(self.hub.asked("GET", f"/revision/{old}")), 1)
        self.repo.commit, self.repo.branches = old, ("main",)
        self.assertEqual(self.download("stsb")[0], 0)
        self.assertEqual(self.text("pairs/stsb_dev.tsv"), self.good)

    def test_other_contents_are_refused(self) -> None:
        (name,) = self.repo.files
        self.repo.files[name] = self.other
        for cached in (self.out / ".cache").rglob("*"):
            if cached.is_file() or cached.is_symlink():
                cached.unlink()
        self.path.write_text("mine")
        status, _, err = self.download("stsb")
        self.assertEqual(status, 1)
        self.assertIn(f"sentence-transformers/stsb/{name}@", err)
        self.assertIn("from sources.lock.json", err)
        self.assertEqual(self.path.read_text(), "mine")
        entries = json.loads((self.out / LOCK_FILE).read_text())
        del entries["data_sets"]["stsb"]
        (self.out / LOCK_FILE).write_text(json.dumps(entries))
        self.assertEqual(self.download("stsb")[0], 0)  # taken on purpose
        self.assertIn("2.5\tA\tB", self.text("pairs/stsb_dev.tsv"))

    def test_a_cached_file_that_was_altered_is_refused_and_fetched_again(self) -> None:
        self.path.unlink()
        (cached,) = (self.out / ".cache").rglob("*.parquet")
        content = cached.read_bytes()
        cached.resolve().write_bytes(content[:-1] + b"x")
        self.assertEqual(self.download("stsb")[0], 1)
        self.assertEqual(self.download("stsb")[0], 0)
        self.assertEqual(self.text("pairs/stsb_dev.tsv"), self.good)


class FoldersTest(ToolTest):
    def test_downloaded_data_comes_first_and_lacking_files_from_beside_the_repository(self) -> None:
        downloaded, beside = self.folder / "raw", self.folder / "shared" / "data"
        for path in (downloaded / "squad", beside / "squad", beside / "qqp"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

        def chosen(given: Path | None = None) -> list[Path]:
            return [folder for folder, _ in raw_files.raw_folders(given, downloaded)]

        with (
            mock.patch.object(raw_files, "ROOT", self.folder / "repository"),
            mock.patch.dict("os.environ"),
        ):
            os.environ.pop("LLMCACHE_RAW_DATA", None)
            self.assertEqual(chosen(), [beside])  # nothing was downloaded by the tool
            (downloaded / LOCK_FILE).touch()
            self.assertEqual(chosen(), [downloaded, beside])
            self.assertEqual(raw_files.raw_folder_of(("squad",), chosen()), downloaded)
            self.assertEqual(raw_files.raw_folder_of(("qqp",), chosen()), beside)
            self.assertEqual(raw_files.raw_folder_of(("squad", "qqp"), chosen()), beside)
            self.assertIsNone(raw_files.raw_folder_of(("none",), chosen()))
            os.environ["LLMCACHE_RAW_DATA"] = str(beside)
            self.assertEqual(chosen(), [beside])
            self.assertEqual(chosen(downloaded), [downloaded])


if __name__ == "__main__":
    unittest.main()
