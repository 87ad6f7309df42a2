"""Where real data comes from: repositories of the Hugging Face hub, their commits, files, checksums and licences.

This table is all that is pinned. It was written without access to the hub: each commit is one that several independent
public projects name for that repository, each SHA-256 one that at least two of them give for that file at that commit.
Where none was found it is None: the first download takes what the hub states, and sources.lock.json holds it from then
on. The paths, columns and rows are those of the data sets' cards and of programs that read these files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tools.data import data_conversions as conversions
from tools.data.data_conversions import Written, each
from tools.data.readers import read_intents, read_news, read_openbookqa, read_squad, read_stsb, read_wikitext


@dataclass(frozen=True)
class HubFile:
    path: str  # in the repository
    rows: int
    sha256: str | None = None


@dataclass(frozen=True)
class DataSet:
    repo: str
    revision: str  # a commit; a branch is looked up once, and its commit kept in LOCK_FILE
    licence: str
    columns: tuple[str, ...]  # that are used of each source
    sources: tuple[HubFile, ...]
    convert: Callable[..., Written]  # from the tables of the sources
    checks: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...]  # readers, and the written files each must take
    written: dict[str, str] = field(default_factory=dict)  # SHA-256 of written files, where known


CLINC150 = ("clinc150/train_small.tsv", "clinc150/val.tsv", "clinc150/test.tsv")


def _parquet(name: str, rows: int, sha256: str | None = None) -> HubFile:
    return HubFile(f"{name}-00000-of-00001.parquet", rows, sha256)


DATA_SETS: dict[str, DataSet] = {
    "wikitext": DataSet(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "CC BY-SA 3.0 and GFDL",
        ("text",),
        (_parquet("wikitext-2-raw-v1/test", 4358),),
        each(conversions.wikitext, "wikitext/wiki.test.raw"),
        ((read_wikitext, ("wikitext/wiki.test.raw",)),),
        # of the file in the original archive, which is written again byte for byte
        {"wikitext/wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"},
    ),
    "squad_v2": DataSet(
        "rajpurkar/squad_v2",
        "3ffb306f725f7d2ce8394bc1873b24868140c412",
        "CC BY-SA 4.0",
        ("id", "title", "context", "question", "answers"),
        (_parquet("squad_v2/validation", 11873, "0560174ab095c5ac0a8c8dc8da05f1625453c45a77e4ce9cabc6947ddfdd24cb"),),
        each(conversions.squad, "squad_v2/squad_v2_dev.jsonl"),
        ((read_squad, ("squad_v2/squad_v2_dev.jsonl",)),),
    ),
    "openbookqa": DataSet(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        "unknown for the data (the code of allenai/OpenBookQA is Apache-2.0)",
        ("id", "question_stem", "choices", "answerKey", "fact1"),
        (  # "additional" is "main" with the fact each question was written from
            _parquet("additional/test", 500, "33b318ea8e2354484868bc601c1b30a58149e9deb93162ff422bb8de980c7105"),
            _parquet("additional/validation", 500, "92e5e68e4da7bec7d130d925385abf377c2d82b89a16de502b4e1b9cf3f50a26"),
            _parquet("additional/train", 4957, "d16d719e87efb86ed0a2ac4c8cdf380f7bfb94b602088393674c0a64ce9ed3d3"),
        ),
        each(conversions.openbookqa, *(f"openbookqa/{name}.jsonl" for name in ("test", "dev", "train_sample"))),
        tuple((read_openbookqa, (f"openbookqa/{name}.jsonl",)) for name in ("test", "dev", "train_sample")),
    ),
    "banking77": DataSet(
        "mteb/banking77",  # PolyAI/banking77 has a script that fetches the files from elsewhere
        "0fd18e25b25c072e09e0d92ab615fda904d66300",
        "CC BY 4.0",
        ("text", "label_text"),
        (
            HubFile("train.jsonl", 10003, "d411780d8c0e18e166f5664c6cfe90dc9de399d722aa7cde282e31a771323ea7"),
            HubFile("test.jsonl", 3080, "fb1b0043ded745b8767687084786e6dd0a5f0ce03243b6131992a1c7ae2c2595"),
        ),
        each(conversions.banking77, "banking77/train.tsv", "banking77/test.tsv", header="label text"),
        ((read_intents, ("banking77/train.tsv", "banking77/test.tsv")),),
    ),
    "clinc150": DataSet(
        "clinc/clinc_oos",
        "155b9c710419136e17307b80d0a13e68cd46b4ec",
        "CC BY 3.0",
        ("text", "intent"),
        (  # "small" and "plus" differ in the training part only
            _parquet("small/train", 7600),
            _parquet("plus/validation", 3100, "fbd545b46c611c4a7ba4b48cae6c7f09bb5b59f33ff56206ad1cd366c85cdfaa"),
            _parquet("plus/test", 5500, "3e60e45b25bf86543aa5df8ba4fcc674114164e6184f0197690648c2908d0102"),
        ),
        each(conversions.clinc150, *CLINC150, header="label text"),
        tuple((read_intents, (CLINC150[0], other)) for other in CLINC150[1:]),
    ),
    "ag_news": DataSet(
        "fancyzhx/ag_news",
        "eb185aade064a813bc0b7f42de02595523103ca4",
        "none stated: for research and other non-commercial activity",
        ("text", "label"),
        (_parquet("data/test", 7600, "71de87ec66bc5737752a2502204dfa6d7fe9856ade3ea444dc6317789a4f13fb"),),
        each(conversions.ag_news, "ag_news/test_sample.tsv", header="label title description"),
        ((partial(read_news, fill=0), ("ag_news/test_sample.tsv",)),),
    ),
    "sst2": DataSet(
        "stanfordnlp/sst2",
        "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
        "unknown",
        ("sentence", "label"),
        (
            _parquet("data/train", 67349, "c7921283b75a42e685f50edecb96798607ea0fcbfd0739ee8975f22c12d55f09"),
            _parquet("data/validation", 872, "fb00fe008f6828f86ba2beda8415a4cf5da0c884f21c5f238c87131b5aa19529"),
        ),
        conversions.sst2,
        ((partial(read_intents, apart=True), ("sst2/train_sample.tsv", "sst2/dev.tsv")),),
    ),
    "stsb": DataSet(
        "sentence-transformers/stsb",
        "ab7a5ac0e35aa22088bdcf23e7fd99b220e53308",
        "scores CC BY-SA 4.0; each sentence as where it is from, some of which ask for an agreement",
        ("sentence1", "sentence2", "score"),
        (_parquet("data/validation", 1500),),
        each(conversions.stsb, "pairs/stsb_dev.tsv", header="score text_a text_b genre subset"),
        ((read_stsb, ("pairs/stsb_dev.tsv",)),),
    ),
}
