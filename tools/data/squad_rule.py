"""SQuAD's rule for equal answers: case, punctuation, the articles and white space do not count (the data set's own
evaluation script)."""

from __future__ import annotations

import string

ARTICLES = ("a", "an", "the")


def spoken(text: str) -> str:
    """Lower case, without punctuation; white space of any kind becomes spaces."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return "".join(" " if character.isspace() else character for character in kept)


def normal_answer(text: str) -> str:
    """Equal for equal answers; empty for a text of nothing but articles and punctuation."""
    return " ".join(word for word in spoken(text).split() if word not in ARTICLES)
