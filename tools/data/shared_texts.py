"""Workloads in which requests share much of their text, but not from the beginning on: the same passages in another
order, and conversations with a corrected turn. For decoders."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from tools.data.raw_files import DataError, Row, json_lines
from tools.data.readers import gold_answers, system_of, systems_of, turns_of
from tools.data.squad_rule import normal_answer
from tools.data.traffic import (
    ANSWER,
    AS_IT_IS,
    ASSISTANT,
    NEXT_USER,
    SYSTEM,
    USER,
    Request,
    Sequence,
    Traffic,
    shuffled,
    some,
)

HEAD = "Answer the question from the passages.\n\n"
POOL = 24  # passages
TOGETHER = 6  # of them, in front of a question
PASSAGE_WORDS = (48, 58)  # about 70 tokens
QUESTIONS = 200  # requests in each part
DIALOGUES = 2  # that one conversation consists of
CORRECTIONS = 3  # at most, of one conversation


@dataclass(frozen=True)
class _Passage:
    text: str
    questions: tuple[tuple[str, str], ...]  # with their answers, which are in the text


def _beginning(context: str) -> str | None:
    """Takes as many sentences as PASSAGE_WORDS allows. The result is None if they are too few."""
    least, most = PASSAGE_WORDS
    taken: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", context):
        words = sentence.split()
        if len(taken) + len(words) > most:
            break
        taken += words
    return " ".join(taken) if len(taken) >= least else None


def _pool(path: Path) -> list[_Passage]:
    """Reads the POOL passages with the most questions."""
    questions: dict[str, list[tuple[str, str]]] = {}
    for row in json_lines(path):
        text, answers = _beginning(row.text("context")), gold_answers(row)
        if text and answers and answers[0] in text:
            questions.setdefault(text, []).append((row.text("question"), answers[0]))
    passages = [_Passage(text, tuple(dict(asked).items())) for text, asked in questions.items()]
    return sorted(passages, key=lambda passage: -len(passage.questions))[:POOL]


def read_passages(path: Path) -> Traffic:
    """A head, six passages in changing order, and a question about one of them with its answer.

    Both parts draw from the same passages, but no order and no question is in both."""
    pool = _pool(path)
    asked = shuffled((place, question) for place, passage in enumerate(pool) for question in passage.questions)
    if len(pool) <= TOGETHER or len(asked) < 2:
        raise DataError(f"{path}: {len(pool)} passages with questions in it, too few; fetch the file again")
    draw = random.Random(0)
    seen: set[tuple[int, ...]] = set()
    groups: dict[str, int] = {}
    requests: list[Request] = []
    for part in (asked[: len(asked) // 2], asked[len(asked) // 2 :]):
        for number in range(QUESTIONS):
            about, (question, answer) = part[number % len(part)]
            order = _order(about, len(pool), seen, draw)
            group = groups.setdefault(normal_answer(answer) or answer.lower(), len(groups))
            texts = [f"{pool[place].text}\n\n" for place in order]
            pieces = (HEAD, *texts, f"Question: {question}\nAnswer:", f" {answer}")
            sequence = Sequence((question, None), pieces, scored=len(pieces) - 1)
            requests.append(Request([sequence], group=group))
    return Traffic(requests, fill=QUESTIONS)


def _order(about: int, pool: int, seen: set[tuple[int, ...]], draw: random.Random) -> tuple[int, ...]:
    """Draws TOGETHER places, one of them `about`, in an order that was not seen before."""
    while True:
        others = draw.sample([place for place in range(pool) if place != about], TOGETHER - 1)
        others.insert(draw.randrange(TOGETHER), about)
        if (order := tuple(others)) not in seen:
            seen.add(order)
            return order


Dialogue = list[str]  # user, assistant, user, assistant


def _dialogues(bench: Path, two_turns: Path, contextual: Path) -> list[Dialogue]:
    """Reads the dialogues whose answers are in the data."""
    found: list[Dialogue] = []
    for row in json_lines(bench):
        turns, answers = turns_of(row), row["reference"]
        if isinstance(answers, list) and len(answers) == len(turns) and all(str(answer).strip() for answer in answers):
            found.append([str(text) for turn in zip(turns, answers, strict=True) for text in turn])
    for path, fields in (
        (two_turns, ("u0", "response0", "u1", "response1")),
        (contextual, ("main_query", "main_response", "followup_query", "followup_response")),
    ):
        found += [[row.text(field) for field in fields] for row in json_lines(path)]
    return found


def _conversation(texts: list[str], system: str = SYSTEM) -> tuple[str, ...]:
    pieces = [system]
    for place in range(0, len(texts), 2):
        question, answer = texts[place : place + 2]
        pieces += [NEXT_USER if place else USER, question, ASSISTANT, ANSWER + answer]
    return tuple(pieces)


def _corrected(text: str, vocabulary: list[str], draw: random.Random) -> str | None:
    """The text with a word of four letters or more replaced by one that is a letter longer or shorter at most."""
    words = list(re.finditer(r"[A-Za-z]{4,}", text))
    draw.shuffle(words)
    for word in words:
        fitting = [o for o in vocabulary if abs(len(o) - len(word[0])) <= 1 and o.lower() != word[0].lower()]
        if fitting:
            return text[: word.start()] + draw.choice(fitting) + text[word.end() :]
    return None


def read_corrections(bench: Path, two_turns: Path, contextual: Path) -> Traffic:
    """Conversations of two dialogues, each as it was and then with a word of one of its first two questions replaced.

    The first half of the dialogues fills, the second asks; new words come from the questions of the same half."""
    dialogues = shuffled(_dialogues(bench, two_turns, contextual))
    half = len(dialogues) // 2
    requests: list[Request] = []
    fill = 0
    for part in (dialogues[:half], dialogues[half:]):
        fill = len(requests)
        questions = " ".join(text for dialogue in part for text in dialogue[::2])
        vocabulary = sorted(set(re.findall(r"[A-Za-z]{4,}", questions)))
        for start in range(0, len(part) - DIALOGUES + 1, DIALOGUES):
            texts = [text for dialogue in part[start : start + DIALOGUES] for text in dialogue]
            requests += _with_corrections(texts, vocabulary, group=len(requests))
    return Traffic(some(requests, two_turns), fill=fill)


def _with_corrections(texts: list[str], vocabulary: list[str], group: int) -> list[Request]:
    draw = random.Random(" ".join(texts))
    share = 100 / sum(len(text.split()) for text in texts)

    def request(kind: str, percent: float, changed: list[str]) -> Request:
        return _corrected_request(kind, percent, changed, SYSTEM, group)

    found: dict[tuple[str, ...], None] = {}
    for _ in range(CORRECTIONS):
        place = draw.choice((0, 2))
        corrected = _corrected(texts[place], vocabulary, draw)
        if corrected is not None:
            found[(*texts[:place], corrected, *texts[place + 1 :])] = None
    original = request(AS_IT_IS, 0, texts)
    return [original, *(request("substituted", share, list(changed)) for changed in found)]


def read_instructed_corrections(chat: Path, system_prompts: Path) -> Traffic:
    """Conversations with their answers behind one of a few system prompts, each as it was and then as corrected in an
    early turn, where it has a correction; the last answer is scored. The first half fills, the second asks."""
    systems = systems_of(system_prompts)
    conversations: list[list[Request]] = []
    for row in json_lines(chat):
        turns, answers = turns_of(row), row["reference"]
        if not isinstance(answers, list) or len(answers) != len(turns):
            raise row.bad(f"'reference' is {str(answers)[:40]}", "an answer to each turn")
        system = system_of(row, systems)
        texts = [str(text) for turn in zip(turns, answers, strict=True) for text in turn]
        versions = [(AS_IT_IS, 0.0, texts)]
        if row["corrected"]:
            place, text = _correction(row, turns)
            share = 100 / sum(len(part.split()) for part in texts)
            versions.append(("substituted", share, [*texts[: 2 * place], text, *texts[2 * place + 1 :]]))
        conversations.append([_corrected_request(*version, system, len(conversations)) for version in versions])
    conversations = shuffled(conversations)
    half = len(conversations) // 2
    fill = sum(map(len, conversations[:half]))
    return Traffic(some([request for versions in conversations for request in versions], chat), fill=fill)


def _correction(row: Row, turns: list[str]) -> tuple[int, str]:
    corrected = row["corrected"]
    place = corrected.get("turn") if isinstance(corrected, dict) else None
    if not isinstance(place, int) or not 0 <= place < len(turns) - 1:
        raise row.bad(f"'corrected' is {str(corrected)[:40]}", "the number of an early turn, and its text")
    return place, row.part(corrected).text("text")


def _corrected_request(kind: str, percent: float, texts: list[str], system: str, group: int) -> Request:
    pieces = _conversation(texts, system)
    sequence = Sequence((texts[0], None), pieces, scored=len(pieces) - 1, edit_kind=kind, edit_percent=percent)
    return Request([sequence], group=group)
