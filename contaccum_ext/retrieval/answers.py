"""Whether a passage contains an answer, as DPR decides it."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache

from ..datasets import Passage


@lru_cache(maxsize=1)
def _token_pattern() -> re.Pattern[str]:
    """Runs of letters, numbers and combining marks; any other visible character by itself."""
    # The standard re module has no classes for marks (M) and for what is not visible (Z, C).
    marks: list[str] = []
    hidden: list[str] = []
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))[0]
        if category == "M":
            marks.append(chr(code))
        elif category in "ZC":
            hidden.append(chr(code))
    return re.compile(
        rf"(?:[^\W_]|[{_ranges(marks)}])+|[^{_ranges(hidden)}]",
    )


def _ranges(characters: Sequence[str]) -> str:
    """A character class's inside, neighbouring code points joined into ranges."""
    parts: list[str] = []
    first = last = ord(characters[0])
    for character in [*characters[1:], None]:
        if character is not None and ord(character) == last + 1:
            last += 1
            continue
        parts.append(f"{re.escape(chr(first))}-{re.escape(chr(last))}")
        if character is not None:
            first = last = ord(character)
    return "".join(parts)


def answer_tokens(text: str) -> list[str]:
    """Tokens compared by `contains_answer`: Unicode NFD, split at anything but words, lower case.

    Args:
        text: a passage or an answer.
    """
    return [token.lower() for token in _token_pattern().findall(unicodedata.normalize("NFD", text))]


class AnswerMatcher:
    """Looks for answers in passages, tokenizing every passage once.

    Args:
        corpus: passage id -> passage; as in DPR, the text alone counts, not the title.
    """

    def __init__(self, corpus: Mapping[str, Passage]) -> None:
        self._corpus = corpus
        self._texts: dict[str, str] = {}

    def first_rank(self, passage_ids: Sequence[str], answers: Sequence[str]) -> int | None:
        """Rank, from 1, of the first passage with one of the answers; None where no one has it."""
        # Tokens hold no spaces: a run of tokens is a substring of the padded, joined text.
        wanted = [f" {' '.join(tokens)} " for tokens in map(answer_tokens, answers) if tokens]
        for rank, passage_id in enumerate(passage_ids, start=1):
            text = self._text(passage_id)
            if any(answer in text for answer in wanted):
                return rank
        return None

    def _text(self, passage_id: str) -> str:
        text = self._texts.get(passage_id)
        if text is None:
            text = f" {' '.join(answer_tokens(self._corpus[passage_id].text))} "
            self._texts[passage_id] = text
        return text
