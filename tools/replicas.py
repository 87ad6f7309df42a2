"""Tries several replicas: two processes of llmcache-replica behind nginx, above one redis-server, all started here.

Conversations take turns. Meanwhile a replica is killed and started again, and the Redis server stopped for two turns. Every
request must be answered; what was known of each turn is printed. Needs nginx and redis-server.

    python3 tools/replicas.py --replica build/bin/llmcache-replica --model build/models/tiny-llama-sdpa.pt
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

CONFIGURATION = Path(__file__).parent.parent / "docs/nginx/llmcache.conf"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def post(port: int, body: str, conversation: str = "") -> bytes:
    headers = {"X-Conversation": conversation}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", data=body.encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read()


class Setup:
    """The processes; ended with it."""

    def __init__(self, replica: Path, model: Path, folder: Path) -> None:
        self.command = [str(replica), "--model", str(model)]
        self.redis_port, self.front, *self.ports = (free_port() for _ in range(4))
        self.processes = contextlib.ExitStack()
        self.redis = self.start(["redis-server", "--port", str(self.redis_port), "--save", "", "--dir", str(folder)])
        self.replicas = [self.start_replica(port) for port in self.ports]
        text = CONFIGURATION.read_text(encoding="utf-8").replace("8080", str(self.front))
        text = text.replace("8081", str(self.ports[0])).replace("8082", str(self.ports[1]))
        paths = "".join(f"{name}_temp_path {folder}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        own = f"pid {folder}/pid; daemon off; events {{}} http {{ access_log off; {paths} {text} }}"
        (folder / "nginx.conf").write_text(own, encoding="utf-8")
        self.start(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])
        time.sleep(1)

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes.callback(process.wait)
        self.processes.callback(process.terminate)
        return process

    def start_replica(self, port: int) -> subprocess.Popen[str]:
        process = self.start([*self.command, "--listen", str(port), "--redis", str(self.redis_port)])
        assert process.stdout is not None and "port" in process.stdout.readline(), "the replica does not begin"
        return process


class Conversations:
    """Some that begin alike; each turn adds a user's tokens and the model's."""

    def __init__(self, setup: Setup, count: int, vocabulary: int) -> None:
        self.setup = setup
        self.random = random.Random(1)
        self.vocabulary = vocabulary
        system = self.tokens(64)
        self.ids = {f"c{i}": list(system) for i in range(count)}
        self.home: dict[str, int] = {}

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(10, self.vocabulary) for _ in range(count)]

    def turn(self, name: str) -> None:
        known = total = 0
        moved = []
        for conversation, ids in self.ids.items():
            ids += self.tokens(32)
            answer = json.loads(post(self.setup.front, " ".join(map(str, ids)), conversation))
            ids.append(answer["next"])
            known, total = known + answer["known"], total + answer["tokens"]
            if self.home.get(conversation, answer["process"]) != answer["process"]:
                moved.append(f"{answer['known']} of {answer['tokens']}")
            self.home[conversation] = answer["process"]
        homes = sorted(list(self.home.values()).count(process) for process in set(self.home.values()))
        told = f"; {len(moved)} came to the other replica, which knew {moved[0]}" if moved else ""
        print(f"{name:24} {known:5} of {total} tokens known; replicas have {homes}{told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tries replicas behind nginx, above one redis-server")
    parser.add_argument("--replica", type=Path, required=True, help="the program llmcache-replica")
    parser.add_argument("--model", type=Path, required=True, help="a causal model; its .json says the vocabulary")
    parser.add_argument("--conversations", type=int, default=8)
    chosen = parser.parse_args()
    vocabulary = json.loads(chosen.model.with_suffix(".json").read_text(encoding="utf-8"))["vocab"]
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(chosen.replica, chosen.model, Path(folder))
        with setup.processes:
            talk = Conversations(setup, chosen.conversations, vocabulary)
            for turn in ("turn 1", "turn 2", "turn 3"):
                talk.turn(turn)
            time.sleep(3)  # what is written behind the answers
            setup.replicas[0].send_signal(signal.SIGKILL)
            talk.turn("one replica killed")
            setup.replicas[0] = setup.start_replica(setup.ports[0])
            time.sleep(6)  # nginx leaves it alone for 5 s
            talk.turn("it is there again")
            talk.turn("turn 6")
            setup.redis.send_signal(signal.SIGSTOP)
            talk.turn("Redis stopped")
            talk.turn("turn 8")
            setup.redis.send_signal(signal.SIGCONT)
            time.sleep(6)
            talk.turn("Redis goes on")
            for port in setup.ports:
                print(post(port, "stats").decode())


if __name__ == "__main__":
    main()
