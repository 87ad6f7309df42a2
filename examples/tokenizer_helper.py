#!/usr/bin/env python3
"""Turns text into token ids and back for a program that starts it: one JSON object a line in, one a line out.

Why a process of its own: neither Debian nor PyPI carries a C++ library that reads the models' tokenizer.json, while
the `tokenizers` package is what the models were trained with, and is installed with transformers anyway. Turning text
into ids takes microseconds where the model takes milliseconds, so the pipe costs nothing that matters.

    tokenizer_helper.py TOKENIZER    a folder with tokenizer.json, or that file; tokenizer_config.json and
                                     chat_template.jinja beside it are read if they are there

The first line out says what was loaded: {"ready": true, "vocabulary": N, "end": [ids], "chat": bool}. Then, one answer
to each request:
    {"op": "encode", "text": T, "max_tokens": N}   {"ids": [...]}      special tokens added; cut to N if that is given
    {"op": "chat", "messages": [{role, content}]}  {"ids": [...]}      through the chat template
    {"op": "decode", "ids": [...]}                 {"text": T}         special tokens left out
    {"op": "id", "token": T}                       {"id": N}           null if the vocabulary has no such token
    {"op": "stream", "id": N}                      {"text": T}         what token N adds to the text so far
    {"op": "finish"}                               {"text": T}         what the stream held back; a new one begins
A request that fails is answered by {"error": T}. Ends when its input does; exit status 1 if the tokenizer cannot be
loaded, after one line {"error": T}.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to


class TextStream:
    """Text of tokens that come one by one. A character's bytes may be spread over several tokens: what is not whole
    is held back, but for no more tokens than the longest character has bytes."""

    LONGEST = 4

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.shown: list[int] = []  # the last tokens whose text is out: decoding may look at what stands before
        self.held: list[int] = []

    def add(self, token: int) -> str:
        self.held.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self.held) < self.LONGEST:
            return ""
        return self._show(text)

    def finish(self) -> str:
        text = self._new_text() if self.held else ""
        self.shown, self.held = [], []
        return text

    def _new_text(self) -> str:
        before = self.tokenizer.decode(self.shown)
        both = self.tokenizer.decode(self.shown + self.held)
        return both[len(before) :]

    def _show(self, text: str) -> str:
        # Special tokens and ids without text add nothing: keep what was there to look at.
        self.shown, self.held = (self.held if text else self.shown + self.held), []
        return text


class Helper:
    def __init__(self, path: Path) -> None:
        import tokenizers

        folder = path if path.is_dir() else path.parent
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise OSError(f"{file} is not there")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = self._read_config(folder / "tokenizer_config.json")
        end = config.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        self.special = {name: value for name, value in config.items() if name.endswith("_token")}
        end_id = self.tokenizer.token_to_id(end) if isinstance(end, str) else None
        self.end = [] if end_id is None else [end_id]
        template = folder / "chat_template.jinja"
        self.template = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
        if not isinstance(self.template, str):  # none, or several with names, of which none is asked for here
            self.template = None
        self.stream = TextStream(self.tokenizer)

    @staticmethod
    def _read_config(file: Path) -> dict[str, Any]:
        if not file.exists():
            return {}
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise OSError(f"{file} holds no JSON object")
        return config

    def about(self) -> dict[str, Any]:
        return {
            "ready": True,
            "vocabulary": self.tokenizer.get_vocab_size(),
            "end": self.end,
            "chat": self.template is not None,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request["op"]
        if operation == "encode":
            return {"ids": self._encode(request["text"], request.get("max_tokens"))}
        if operation == "chat":
            return {"ids": self.tokenizer.encode(self._chat(request["messages"]), add_special_tokens=False).ids}
        if operation == "decode":
            return {"text": self.tokenizer.decode(request["ids"])}
        if operation == "id":
            return {"id": self.tokenizer.token_to_id(request["token"])}
        if operation == "stream":
            return {"text": self.stream.add(request["id"])}
        if operation == "finish":
            return {"text": self.stream.finish()}
        raise ValueError(f"no operation is called {operation!r}")

    def _encode(self, text: str, max_tokens: int | None) -> list[int]:
        if max_tokens is not None:
            self.tokenizer.enable_truncation(max_tokens)
        try:
            return self.tokenizer.encode(text).ids
        finally:
            self.tokenizer.no_truncation()

    def _chat(self, messages: list[dict[str, str]]) -> str:
        if self.template is None:
            raise ValueError("the tokenizer has no chat template")
        # A template is a program that came with a model: it gets nothing but the messages.
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self.template)
        return template.render(messages=messages, add_generation_prompt=True, **self.special)


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        say({"error": "usage: tokenizer_helper.py TOKENIZER"})
        return 1
    try:
        helper = Helper(Path(arguments[0]))
    except ImportError as error:
        say({"error": f"{error}; install the Python package tokenizers, or name a Python that has it"})
        return 1
    except Exception as error:  # noqa: BLE001  tokenizers raises plain Exception
        say({"error": str(error)})
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program that asks ends first
    say(helper.about())
    for line in sys.stdin:
        try:
            say(helper.answer(json.loads(line)))
        except Exception as error:  # noqa: BLE001  the next request may be a better one
            say({"error": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
