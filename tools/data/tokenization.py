"""From texts to token ids: how each tokenizer writes the sequences of a workload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tools.data.squad_rule import spoken
from tools.data.traffic import ANSWER, ASSISTANT, INSTRUCTED, MAX_TOKENS, NEXT_USER, SYSTEM, USER, Sequence
from tools.models import tokenizer_files

TOKENIZERS = ("bert-base-uncased", "gpt2", "smollm2")
# How the turns of a conversation are marked: as the model was trained to read them, or in plain words.
PLAIN_MARKS = {
    SYSTEM: "",
    INSTRUCTED: "{}\n\n",
    USER: "User: ",
    ASSISTANT: "\nAssistant:",
    ANSWER: " ",
    NEXT_USER: "\nUser: ",
}
END_OF_TURN = "<|im_end|>"
CHAT_MARKS = {
    "smollm2": {
        SYSTEM: "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
        INSTRUCTED: "<|im_start|>system\n{}<|im_end|>\n",
        USER: "<|im_start|>user\n",
        ASSISTANT: f"{END_OF_TURN}\n<|im_start|>assistant\n",
        ANSWER: "",
        NEXT_USER: f"{END_OF_TURN}\n<|im_start|>user\n",
    }
}


@dataclass
class Tokenizer:
    """One of the three tokenizers; it is loaded when the first text comes."""

    name: str
    raw: Path | None  # the folder that has GPT2_FILES
    stand_in: str = ""  # the tokenizer whose ids are taken instead; known once it is loaded

    @property
    def encoder(self) -> bool:
        return self.name == "bert-base-uncased"

    @cached_property
    def loaded(self) -> Any:
        made = tokenizer_files.gpt2(self.raw) if self.name == "gpt2" else tokenizer_files.TOKENIZERS[self.name]()
        self.stand_in = made.stand_in
        if self.encoder:
            made.tokenizer.enable_truncation(MAX_TOKENS, strategy="longest_first")
        return made.tokenizer

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.loaded.encode_batch(texts, add_special_tokens=False)]

    def encode(self, sequences: list[Sequence]) -> list[Encoded]:
        if self.encoder:
            texts = [first if second is None else (first, second) for first, second in (s.pair for s in sequences)]
            encodings = self.loaded.encode_batch(texts)
            return [
                Encoded(
                    encoding.ids,
                    cut=bool(encoding.overflowing),
                    pool=pooled(encoding, sequence.pool_from),
                    passage=None if sequence.answers is None else passage_of(encoding, sequence.pair[1] or ""),
                )
                for encoding, sequence in zip(encodings, sequences, strict=True)
            ]
        marks = CHAT_MARKS.get(self.name, PLAIN_MARKS)
        distinct = list(dict.fromkeys(piece for sequence in sequences for piece in sequence.pieces))
        ids = dict(zip(distinct, self.ids([written(piece, marks) for piece in distinct]), strict=True))
        return [join([ids[piece] for piece in s.pieces], s.shorten, s.scored) for s in sequences]

    def end_of_turn(self) -> int | None:
        """Finds the token that ends an answer, if the model knows one."""
        return self.ids([END_OF_TURN])[0][0] if self.name in CHAT_MARKS else None


@dataclass
class Encoded:
    ids: list[int]
    scored: tuple[int, int] | None = None  # [begin, end)
    cut: bool = False  # tokens beyond MAX_TOKENS were left out
    pool: list[int] | None = None  # for each token, whether the output is read there (1) or not (0)
    passage: Passage | None = None


@dataclass
class Passage:
    """The second text of a pair, in which an answer is looked for."""

    tokens: tuple[int, int]  # [begin, end)
    texts: list[str]  # of all tokens, by SQuAD's rule, with the white space in front; empty outside the passage


def written(piece: str, marks: dict[str, str]) -> str:
    if piece.startswith(ANSWER):
        return marks[ANSWER] + piece.removeprefix(ANSWER)
    if piece.startswith(INSTRUCTED):
        return marks[INSTRUCTED].format(piece.removeprefix(INSTRUCTED))
    return marks.get(piece, piece)


def pooled(encoding: Any, start: int | None) -> list[int] | None:
    """Marks the tokens of the first text from character `start` on by 1. The result is None without a start."""
    if start is None:
        return None
    places = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    return [int(text == 0 and begin >= start) for (begin, _), text in places]


def passage_of(encoding: Any, text: str) -> Passage:
    places = [place for place, part in enumerate(encoding.sequence_ids) if part == 1]
    if not places:  # a question so long that nothing of the passage is left
        return Passage((len(encoding.ids), len(encoding.ids)), [""] * len(encoding.ids))
    begin, end = places[0], places[-1] + 1
    texts = [""] * len(encoding.ids)
    said = 0  # characters of the passage
    for place in range(begin, end):
        texts[place] = spoken(text[said : encoding.offsets[place][1]])
        said = encoding.offsets[place][1]
    return Passage((begin, end), texts)


def join(pieces: list[list[int]], shorten: int, scored: int | None) -> Encoded:
    """Puts the pieces in a row and finds the scored one. What is beyond MAX_TOKENS is taken off the end of one piece."""
    excess = sum(map(len, pieces)) - MAX_TOKENS
    if excess > 0 and shorten >= 0 and excess < len(pieces[shorten]):
        pieces = list(pieces)
        pieces[shorten] = pieces[shorten][: len(pieces[shorten]) - excess]
    ids = [token for piece in pieces for token in piece][:MAX_TOKENS]
    if scored is None:
        return Encoded(ids, (len(ids), len(ids)), cut=excess > 0)
    start = sum(map(len, pieces[:scored]))
    begin = min(max(start, 1), len(ids))  # the first token has no probability
    return Encoded(ids, (begin, max(begin, min(start + len(pieces[scored]), len(ids)))), cut=excess > 0)
