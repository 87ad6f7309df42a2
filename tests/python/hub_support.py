"""A stand-in for the Hugging Face hub on this machine, which serves data sets and models, and small data sets in the
form in which the hub has them."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet

PATIENCE = 300.0  # seconds: longer than anything takes on a machine that does much else


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str = "a" * 40
    lfs: bool = True
    branches: tuple[str, ...] = ("main",)


@dataclass
class Answer:
    """What a test can change about the body of a file: its bytes, and how it is sent."""

    status: int = 200
    body: Callable[[bytes], bytes] = bytes  # what is sent instead
    claim: bool = False  # Content-Length is that of what is sent, not that of the file
    times: int = 1 << 30  # that it applies
    stall: threading.Event | None = None  # waited for behind the first half


@dataclass
class Hub:
    """Answers as huggingface.co does where download_data.py and transformers ask; `requests` are all that came."""

    repos: dict[str, Repo] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)  # by path in a repository, or "api"
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path
    stalled: threading.Event = field(default_factory=threading.Event)
    last: str = ""  # the repository after whose description nothing answers any more
    port: int = 0  # the same from its first start on

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self, repos: dict[str, Repo]) -> None:
        """Forgets all that a test changed or asked."""
        self.stop()
        self.repos, self.last = repos, ""
        self.answers.clear()
        self.requests.clear()
        self.stalled.clear()
        self.start()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nothing answers meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def start(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, method: str, part: str = "") -> list[tuple[str, str]]:
        return [request for request in self.requests if request[0] == method and part in request[1]]

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if path == "/":
                self.send(request, 200, b"", {})
            elif path.startswith("/api/datasets/") and "/revision/" in path:
                name, revision = path.removeprefix("/api/datasets/").split("/revision/")
                self.describe(request, name, revision)
            elif "/resolve/" in path:  # a model's path has nothing in front of its name
                name, rest = path.removeprefix("/datasets").removeprefix("/").split("/resolve/")
                revision, _, file = rest.partition("/")
                self.resolve(request, name, revision, file, body)
            else:
                self.send(request, 404, b"", {})

    def known(self, name: str, revision: str) -> Repo | None:
        repo = self.repos.get(name)
        return repo if repo and revision in (repo.commit, *repo.branches) else None

    def describe(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
        repo, changed = self.known(name, revision), self.answers.get("api", Answer())
        if changed.status != 200:
            self.send(request, changed.status, b"", {})
        elif repo is None:
            self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = []
            for file, content in repo.files.items():
                known = {"rfilename": file, "size": len(content), "blobId": git_id(content)}
                if repo.lfs:
                    known["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 130}
                siblings.append(known)
            answer = json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode()
            if name == self.last:
                self.stop()
            self.send(request, 200, changed.body(answer), {"Content-Type": "application/json"})

    def resolve(self, request: BaseHTTPRequestHandler, name: str, revision: str, file: str, body: bool) -> None:
        repo = self.known(name, revision)
        if repo is None or file not in repo.files:
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
            return
        content = repo.files[file]
        headers = {
            "X-Repo-Commit": repo.commit,
            "ETag": f'"{git_id(content)}"',
            "Content-Type": "application/octet-stream",
        }
        if repo.lfs:
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        changed = self.answers.get(file, Answer())
        if not body or changed.times <= 0:
            changed = Answer()
        elif changed.status != 200:
            self.send(request, changed.status, b"", {})
            return
        changed.times -= body
        sent = changed.body(content)
        headers["Content-Length"] = str(len(sent) if changed.claim else len(content))
        if changed.stall and body:
            self.send(request, 200, sent[: len(sent) // 2], headers)
            request.wfile.flush()
            self.stalled.set()
            changed.stall.wait(PATIENCE)
        else:
            self.send(request, 200, sent if body else b"", headers)

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def parquet(rows: list[dict[str, Any]], classes: dict[str, list[str]] | None = None) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    if classes:
        features = {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WIKITEXT = [
    "",
    " = One = \n",
    "",
    " First @-@ paragraph . \n",
    " Second paragraph . \n",
    "",
    " = = Part = = \n",
    " Third . \n",
]
SQUAD = [
    {
        "id": f"q{number}",
        "title": "Normans",
        "context": "The Normans came from Normandy.",
        "question": f" Where from, {number}?",
        "answers": {"text": ["Normandy"] * (number % 2), "answer_start": [23] * (number % 2)},
    }
    for number in range(4)
]
OPENBOOKQA = [
    {
        "id": f"7-{number}",
        "question_stem": f"Frilled sharks, {number}",
        "choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number],
        "fact1": "deep sea animals live deep in the ocean",
        "humanScore": 1.0,
    }
    for number in range(4)
]
BANKING77 = [
    {"text": f"My card,\nnumber {number}?", "label": number, "label_text": name}
    for number, name in enumerate(("card_arrival", "reverted_card_payment?"))
]
CLINC150 = [{"text": "what is\tthe  weather", "intent": 1}, {"text": "who cares", "intent": 0}]
INTENTS = {"intent": ["oos", "weather"]}
AG_NEWS = [
    {"text": r"Wall St. Bears Claw Back (Reuters) Reuters - Short-sellers\are seeing green.", "label": 2},
    {"text": "Local team wins again and again NEW YORK (AP) - They won.", "label": 1},
    {"text": "A single thought about the world goes on and on", "label": 0},
    {"text": "Rocket lifts off. It flew well.", "label": 3},
]
SST2_TRAIN = [
    {"idx": 0, "sentence": "hide new secretions ", "label": 0},
    {"idx": 1, "sentence": "it 's a charming and often affecting journey . ", "label": 1},
    {"idx": 2, "sentence": "a sometimes tedious film that never finds its way . ", "label": 0},
]
SST2_DEV = [{"idx": 0, "sentence": "unflinchingly bleak and desperate ", "label": 0}]
STSB = [
    {"sentence1": "A man with a hat.", "sentence2": "A man wearing a hat.", "score": 1.0},
    {"sentence1": "A cat.", "sentence2": "A dog.", "score": 0.28},
]


def small_repos() -> dict[str, Repo]:
    """A repository for each of data_sources.DATA_SETS."""
    openbookqa = {
        f"additional/{split}-00000-of-00001.parquet": parquet(OPENBOOKQA[:count])
        for split, count in (("train", 4), ("validation", 3), ("test", 2))
    }
    clinc150 = {
        f"{config}/{split}-00000-of-00001.parquet": parquet(CLINC150, INTENTS)
        for config, split in (("small", "train"), ("plus", "validation"), ("plus", "test"))
    }
    return {
        "Salesforce/wikitext": Repo(
            {"wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet([{"text": text} for text in WIKITEXT])}
        ),
        "rajpurkar/squad_v2": Repo({"squad_v2/validation-00000-of-00001.parquet": parquet(SQUAD)}),
        "allenai/openbookqa": Repo(openbookqa),
        "mteb/banking77": Repo({"train.jsonl": jsonl(BANKING77), "test.jsonl": jsonl(BANKING77[1:])}, lfs=False),
        "clinc/clinc_oos": Repo(clinc150),
        "fancyzhx/ag_news": Repo({"data/test-00000-of-00001.parquet": parquet(AG_NEWS)}),
        "stanfordnlp/sst2": Repo(
            {
                "data/train-00000-of-00001.parquet": parquet(SST2_TRAIN),
                "data/validation-00000-of-00001.parquet": parquet(SST2_DEV),
            }
        ),
        "sentence-transformers/stsb": Repo({"data/validation-00000-of-00001.parquet": parquet(STSB)}),
    }


HUB = Hub()


def use_hub() -> None:
    """From now on HUB is the hub of this process and of those that it starts: for setUpModule."""
    if os.environ.get("HF_ENDPOINT") == HUB.endpoint:
        return
    if "huggingface_hub" in sys.modules:
        raise RuntimeError("huggingface_hub has read its settings: run these tests before those that import it")
    HUB.start()
    home = tempfile.TemporaryDirectory()
    atexit.register(home.cleanup)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": HUB.endpoint,
        "HF_HOME": home.name,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
