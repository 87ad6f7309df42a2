"""The benchmark workloads: where each one's raw files are, what they become, and what is measured on them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tools.data.edits import MARGIN, PERCENTS, SMALL_PERCENTS, read_edits
from tools.data.instructions import INSTRUCTIONS
from tools.data.readers import (
    read_beginnings,
    read_chat,
    read_instructed_chat,
    read_intents,
    read_news,
    read_openbookqa,
    read_qqp,
    read_queries_and_edits,
    read_sample,
    read_squad,
    read_stsb,
    read_wikitext,
)
from tools.data.shared_texts import (
    CORRECTIONS,
    DIALOGUES,
    POOL,
    TOGETHER,
    read_corrections,
    read_instructed_corrections,
    read_passages,
)
from tools.data.traffic import EDIT_KINDS, MAX_TOKENS, Traffic

NEW_TOKENS = 32  # that are generated for each prompt
PROMPT_TOKENS = (128, 512)
SHOTS = "openbookqa"  # the workload that can have solved examples in front
SHOTS_BEHIND = re.compile(r"-[1-9]\d?shot$")
BY_EIGHT = "in batches of eight; one part fills, the other asks"
IN_ORDER, SHUFFLED = "data order", "shuffled, seed 0"
FILL_SHUFFLED = "fill part and asking part each shuffled, seed 0"
EDIT_TOKENS = (128, 256, 512)
NEWS_FILL = 2000  # articles
INSTRUCTED_FILL = 4000  # queries
REPEATS = 0.3  # of the sample's questions
SAMPLE_EDIT_TOKENS, SAMPLE_PERCENTS = 200, (1, 2, 5, 10)
FIT_SHARE = 0.5  # half of what fills is left to calibrate on
TOO_LONG = f"those that would be longer than {MAX_TOKENS} tokens are left out"
SQUAD, WIKITEXT = ("squad_v2/squad_v2_dev.jsonl",), ("wikitext/wiki.test.raw",)
BANKING77 = ("banking77/train.tsv", "banking77/test.tsv")
CLINC150 = ("clinc150/train_small.tsv", "clinc150/test.tsv")
CHATS = ("prompts/mt_vicuna_bench.jsonl", "prompts/meancache_multiturn.jsonl")
FAQ = ("faq/train.tsv", "faq/test.tsv")
SAMPLE_DOCUMENTS, SAMPLE_ARTICLES = ("documents/documents.jsonl",), ("articles/articles.raw",)
SAMPLE_CHATS = ("chat/chat.jsonl", "chat/systems.json")


@dataclass(frozen=True)
class Workload:
    name: str
    files: tuple[str, ...]  # below the raw folder
    texts: str  # what it is made of, in words
    form: str  # what becomes of that
    order: str
    read: Callable[..., Traffic]  # from the files' paths
    task: str = ""  # "", classification, choice, perplexity, answer, similarity, duplicates or generation
    decoders_only: bool = False
    encoders_only: bool = False
    on_request: bool = False  # prepared and run only if named
    whole: bool = False  # a request that would have to be cut is left out, and the edits of its text with it
    growing: bool = False  # each request is a document so far: stop once it has reached MAX_TOKENS
    prompt_tokens: int = 0  # each sequence is cut to that many, shorter ones are left out; 0: as they are
    fit_share: float = 1.0  # task classification: a probe is fitted on the first of the requests that fill
    new_tokens: int = 0  # task generation: that many are generated behind each sequence
    conversations: bool = False  # task generation: an answer ends where the model ends its turn
    examples: str = ""  # the file of solved examples that can stand in front
    of_sample: bool = False  # its files are below data/sample, not below the raw folder; it stands in, or is named
    stands_in_for: tuple[str, ...] = ()  # the workloads whose place it takes where their raw data are missing
    words: str = ""  # what kind of traffic it is, in plain words for reports; else its name

    @property
    def description(self) -> str:
        return f"{self.texts}: {self.form}"


def _generation(tokens: int) -> Workload:
    form = f"the first {tokens} tokens of each, continued by {NEW_TOKENS} tokens"
    lengths = {"prompt_tokens": tokens, "new_tokens": NEW_TOKENS}
    made = Workload(f"generate-{tokens}", WIKITEXT, "WikiText test articles", form, IN_ORDER, read_beginnings)
    return replace(made, task="generation", decoders_only=True, words=f"text generation ({tokens} tokens)", **lengths)


def _edits(name: str, tokens: int, percents: tuple[int, ...], words: str) -> Workload:
    return Workload(
        f"{name}-{tokens}",
        SQUAD,
        f"SQuAD passages of about {min(tokens, MAX_TOKENS - MARGIN)} tokens",
        _edits_of(percents),
        "passages shuffled, seed 0; edits of a passage behind it, shuffled",
        partial(read_edits, tokens=tokens, most_tokens=MAX_TOKENS, percents=percents),
        encoders_only=True,
        on_request=(name, tokens) != ("small-edits", 256),
        whole=True,
        words=f"{words} ({tokens} tokens)",
    )


def _edits_of(percents: tuple[int, ...]) -> str:
    return (
        f"one a request, each followed by {len(percents) * (len(EDIT_KINDS) - 1)} edits, of "
        f"{', '.join(map(str, sorted(set(percents))))} % of its words: substituted, inserted, deleted, appended, "
        f"moved. Some passages fill, with their edits, others ask; {TOO_LONG}"
    )


def _classes(*what: Any, words: str, read: Callable[..., Traffic]) -> Workload:
    """Labelled texts of which a part of those that fill is left to calibrate on; prepared on request."""
    made = Workload(*what, FILL_SHUFFLED, read, task="classification", words=words)
    return replace(made, fit_share=FIT_SHARE, encoders_only=True, on_request=True)


_OF_REAL_DATA = (
    Workload(
        "wikitext",
        WIKITEXT,
        "WikiText test articles",
        f"scored paragraph by paragraph, each request is the article so far, up to {MAX_TOKENS} tokens",
        IN_ORDER,
        read_wikitext,
        task="perplexity",
        growing=True,
        words="growing articles",
    ),
    Workload(
        "squad",
        SQUAD,
        "SQuAD 2.0 development questions, about ten for each passage",
        "one a request; for decoders with the gold answer behind them",
        IN_ORDER,
        read_squad,
        task="answer",
        words="questions about documents",
    ),
    Workload(
        "openbookqa",
        ("openbookqa/test.jsonl",),
        "OpenBookQA test questions",
        "a request is one question with its four choices",
        IN_ORDER,
        read_openbookqa,
        task="choice",
        examples="openbookqa/train_sample.jsonl",
        words="multiple-choice questions",
    ),
    Workload(
        "banking77",
        BANKING77,
        "Banking77 queries",
        BY_EIGHT,
        FILL_SHUFFLED,
        read_intents,
        task="classification",
        words="bank customers' questions",
    ),
    Workload(
        "clinc150",
        CLINC150,
        "CLINC150 queries of 150 intents, 50 each in the small training split, and out of scope (a class of its own)",
        BY_EIGHT,
        FILL_SHUFFLED,
        read_intents,
        task="classification",
        words="assistant commands, some out of scope",
    ),
    Workload(
        "clinc150-in-scope",
        CLINC150,
        "CLINC150 queries of the 150 intents, none out of scope, so that both parts are draws of one kind",
        BY_EIGHT,
        FILL_SHUFFLED,
        partial(read_intents, without="oos"),
        task="classification",
        on_request=True,
        words="assistant commands",
    ),
    Workload(
        "qqp",
        ("pairs/qqp_gptcache.tsv",),
        "Quora question pairs",
        "one question a request; the distinct first questions fill, the second ones ask",
        FILL_SHUFFLED,
        read_qqp,
        task="duplicates",
        words="pairs of questions",
    ),
    Workload(
        "stsb",
        ("pairs/stsb_dev.tsv",),
        "STS Benchmark development pairs",
        "a request is the two sentences of a pair",
        SHUFFLED,
        read_stsb,
        task="similarity",
        encoders_only=True,
        words="pairs of sentences",
    ),
    *map(_generation, PROMPT_TOKENS),
    Workload(
        "chat",
        CHATS,
        "MT-bench, Vicuna-bench and two-turn conversations",
        f"each turn sends the conversation so far and is answered by up to {NEW_TOKENS} tokens; {TOO_LONG}",
        SHUFFLED,
        read_chat,
        task="generation",
        decoders_only=True,
        new_tokens=NEW_TOKENS,
        conversations=True,
        words="chat",
    ),
    _classes(
        "agnews",
        ("ag_news/test_sample.tsv",),
        "AG News articles, title and description, four classes",
        f"in batches of eight; {NEWS_FILL} articles of a sample of the test file, chosen with seed 0, fill, others ask",
        read=partial(read_news, fill=NEWS_FILL),
        words="news",
    ),
    _classes(
        "sst2",
        ("sst2/train_sample.tsv", "sst2/dev.tsv"),
        "SST-2 sentences, positive or negative",
        BY_EIGHT,
        read=partial(read_intents, apart=True),
        words="film reviews",
    ),
    *(
        _classes(
            f"instruct-{tokens}",
            BANKING77,
            f"Banking77 queries, each behind the same instruction of about {tokens} tokens",
            f"in batches of eight; {INSTRUCTED_FILL} training queries fill, test queries ask; pool marks them",
            read=partial(read_intents, instruction=instruction, most=INSTRUCTED_FILL, apart=True),
            words=f"questions behind one instruction ({tokens} tokens)",
        )
        for tokens, instruction in INSTRUCTIONS.items()
    ),
    *(_edits("edits", tokens, PERCENTS, "edited documents") for tokens in EDIT_TOKENS),
    *(_edits("small-edits", tokens, SMALL_PERCENTS, "lightly edited documents") for tokens in EDIT_TOKENS),
    Workload(
        "queries-and-edits",
        (*BANKING77, *SQUAD),
        "Banking77 queries in batches of eight, and between them edited SQuAD passages, those of small-edits-256",
        "one passage a request; training queries and some passages fill, test queries and other passages ask",
        "queries and passages each in the order of their own workload, spread evenly",
        partial(read_queries_and_edits, tokens=256, percents=SMALL_PERCENTS),
        encoders_only=True,
        on_request=True,
    ),
    Workload(
        "passages",
        SQUAD,
        "SQuAD passages",
        f"{TOGETHER} of {POOL} in changing order behind a fixed head, and a question about one of them with its "
        "answer; some orders and questions fill, others ask",
        FILL_SHUFFLED,
        read_passages,
        task="answer",
        decoders_only=True,
        on_request=True,
        whole=True,
        words="known passages in changing order",
    ),
    Workload(
        "chat-edit",
        (*CHATS, "prompts/meancache_contextual.jsonl"),
        f"Conversations of {DIALOGUES} dialogues with their answers",
        f"each as it was, then with a word of an early question replaced, up to {CORRECTIONS} times; the last answer "
        f"is scored. Some conversations fill, others ask; {TOO_LONG}",
        "conversations shuffled, seed 0; corrections of a conversation behind it",
        read_corrections,
        task="answer",
        decoders_only=True,
        on_request=True,
        whole=True,
        words="chats with a corrected turn",
    ),
)
_REAL = {workload.name: workload for workload in _OF_REAL_DATA}


def _sample(name: str, like: str, files: tuple[str, ...], texts: str, **changes: Any) -> Workload:
    """Made of this repository's own text: it is read like that workload, if not said otherwise, and stands in for it."""
    sample = replace(_REAL[like], name=f"sample-{name}", files=files, texts=texts)
    return replace(sample, of_sample=True, **{"on_request": False, "stands_in_for": (like,), **changes})


_OF_SAMPLE = (
    _sample(
        "faq",
        "banking77",
        FAQ,
        "Questions to an invented help desk, 30 intents",
        form=f"{BY_EIGHT}. {REPEATS:.0%} of what asks repeats an earlier question "
        "word for word (drawn by Zipf's law, seed 0)",
        read=partial(read_intents, repeats=REPEATS),
        words="help-desk questions",
        stands_in_for=("banking77", "clinc150", "clinc150-in-scope"),
    ),
    _sample("documents", "squad", SAMPLE_DOCUMENTS, "Questions about 45 short written passages, five or six for each"),
    _sample(
        f"edits-{SAMPLE_EDIT_TOKENS}",
        "edits-256",
        SAMPLE_DOCUMENTS,
        f"Written passages of about {SAMPLE_EDIT_TOKENS} tokens",
        form=_edits_of(SAMPLE_PERCENTS),
        words=f"edited documents ({SAMPLE_EDIT_TOKENS} tokens)",
        read=partial(read_edits, tokens=SAMPLE_EDIT_TOKENS, most_tokens=MAX_TOKENS, percents=SAMPLE_PERCENTS),
        stands_in_for=tuple(f"{name}-{tokens}" for name in ("edits", "small-edits") for tokens in EDIT_TOKENS),
    ),
    _sample(
        "queries-and-edits",
        "queries-and-edits",
        (*FAQ, *SAMPLE_DOCUMENTS),
        "Questions to an invented help desk in batches of eight, and between them edited written passages",
        read=partial(read_queries_and_edits, tokens=SAMPLE_EDIT_TOKENS, percents=SAMPLE_PERCENTS),
        on_request=True,
    ),
    _sample("passages", "passages", SAMPLE_DOCUMENTS, "Written passages"),
    _sample(
        "choices",
        "openbookqa",
        ("choices/test.jsonl",),
        "Written questions of everyday knowledge",
        examples="choices/train.jsonl",
    ),
    _sample("articles", "wikitext", SAMPLE_ARTICLES, "Written articles"),
    *(_sample(f"generate-{n}", f"generate-{n}", SAMPLE_ARTICLES, "Written articles") for n in PROMPT_TOKENS),
    _sample(
        "chat",
        "chat",
        SAMPLE_CHATS,
        "Written conversations of three to five turns behind one of three system prompts",
        read=read_instructed_chat,
    ),
    _sample(
        "chat-edit",
        "chat-edit",
        SAMPLE_CHATS,
        "The conversations of sample-chat with their answers",
        form="each as it was, then with an early turn corrected; the last answer is scored. Half of the conversations "
        "fill, the others ask",
        order="conversations shuffled, seed 0; the corrected one behind its original",
        read=read_instructed_corrections,
    ),
    Workload(
        "sample",
        ("sample.jsonl",),
        "Short queries in batches of four, passages, edits and questions alone",
        "all mixed, a quick trial",
        SHUFFLED,
        read_sample,
        of_sample=True,
        words="short texts of all kinds",
    ),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in (*_OF_REAL_DATA, *_OF_SAMPLE)}


def with_shots(plain: Workload, shots: int) -> Workload:
    """Puts that many solved examples in front of each question, the same for all."""
    return replace(
        plain,
        name=f"{plain.name}-{shots}shot",
        files=(*plain.files, plain.examples),
        form=f"{plain.form}, behind {shots} solved questions, the same for all",
        words=f"{plain.words} behind {shots} solved ones",
        read=partial(read_openbookqa, shots=shots),
        decoders_only=True,
    )


def stand_in_for(workload: Workload) -> Workload | None:
    """Finds the sample workload of its kind."""
    plain = SHOTS_BEHIND.sub("", workload.name)
    like = next((sample for sample in WORKLOADS.values() if plain in sample.stands_in_for), None)
    return like and next(iter(named(like.name + workload.name.removeprefix(plain))), None)


def named(name: str) -> list[Workload]:
    """A name means the workload of this name, or all whose names are it with a number behind it; "-5shot" behind it means
    that five solved examples stand in front."""
    plain = SHOTS_BEHIND.sub("", name)
    if plain != name:
        shots = int(name.removeprefix(plain)[1:-4])
        return [with_shots(WORKLOADS[plain], shots)] if plain in WORKLOADS and WORKLOADS[plain].examples else []
    return [one for known, one in WORKLOADS.items() if known == name or re.fullmatch(re.escape(name) + r"-\d+", known)]


def words_for(name: str) -> str:
    """What kind of traffic a workload is. A name that is not known stands for itself."""
    return next((one.words for one in named(name) if one.name == name and one.words), name)
