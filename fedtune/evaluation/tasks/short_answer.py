"""Tasks whose answer is a letter or a word: multiple choice, and yes, no or maybe (protocol, section 4)."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from fedtune.evaluation.tasks.base import LETTERS, Prediction, Question, Row, Task, TokenCounts, index_of, text_of

ACCEPTED = frozenset(("a", "b", "c", "d", "e", "yes", "no"))
# The first of these that an output contains is replaced.
DOUBLED = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))


class ShortAnswerTask(Task):
    """A task whose prompts carry turn markers and whose answers are as long as the right ones."""

    def wrap(self, prompt: str) -> str:
        """Return `prompt` with the turn markers that every model gets, whether it has a chat template or not."""
        return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"

    def new_tokens(self, counted: TokenCounts) -> list[int]:
        """Return for each question the token count of the right answer of the first question in its batch.

        Questions with the same prompt get the last one's number, because the last one's output is stored for all.
        """
        size = counted.batch_size
        last = {question.prompt: counted.golds[n // size * size] for n, question in enumerate(counted.questions)}
        return [last[question.prompt] for question in counted.questions]

    def score(self, question: Question, output: str) -> Prediction:
        """Compare the output's letter or word with the right answer.

        >>> task = ChoiceTask("x", "X", "Answer.", (), ask=lambda row: ("", ""), parts={})
        >>> task.score(Question("x/0", "", "B"), "B. Because")
        Prediction(value='b', parsed=True, correct=True)
        """
        raw, gold = output.lower(), question.gold.lower()
        text = raw.split("\n##")[1].split("\n")[0] if "\n##" in raw else raw
        text = self._shorten(re.sub(" +", " ", re.sub("[^a-zA-Z0-9]", " ", text).strip()))
        if text in ACCEPTED:
            return Prediction(text, True, text == gold)
        return Prediction(raw, self._is_other_answer(raw), raw == gold)

    @abstractmethod
    def _shorten(self, text: str) -> str:
        """Return the part of a cleaned output that may be an answer."""

    def _is_other_answer(self, _raw: str) -> bool:
        return False


class ChoiceTask(ShortAnswerTask):
    """A multiple-choice task: the first character counts."""

    answer_type: ClassVar[str] = "choice"
    golds: ClassVar[frozenset[str]] = frozenset("ABCDE")

    def _shorten(self, text: str) -> str:
        return text[:1]


class YesNoTask(ShortAnswerTask):
    """A task that is answered with yes, no or maybe."""

    answer_type: ClassVar[str] = "yes-no"
    golds: ClassVar[frozenset[str]] = frozenset(("yes", "no", "maybe"))

    def _shorten(self, text: str) -> str:
        doubled, single = next((pair for pair in DOUBLED if pair[0] in text), ("", ""))
        return text.replace(doubled, single) if doubled else text

    def _is_other_answer(self, raw: str) -> bool:
        # The leaderboard does not accept "maybe", but it compares an unparsed output with the right answer.
        return raw == "maybe"


def plain_prompt(instruction: str, body: str) -> str:
    """Return the prompt, without turn markers, of a general-nlp or medical benchmark."""
    return f"{instruction}\n{body}\nThe answer is:\n"


def choice_prompt(instruction: str, question: str, options: Sequence[str]) -> str:
    """Return the prompt, without turn markers, of a multiple-choice question.

    A `?` is appended when the question ends in neither `?` nor `.`.

    >>> choice_prompt("Answer.", "Is it", ["yes", "no"])
    'Answer.\\nQuestion: Is it?\\n\\nOptions:\\nA. yes\\nB. no\\nThe answer is:\\n'
    """
    mark = "" if question.endswith(("?", ".")) else "?"
    lines = "\n".join(f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(options))
    return plain_prompt(instruction, f"Question: {question}{mark}\n\nOptions:\n{lines}")


def ask_choice(instruction: str, options: Sequence[str], first: int) -> Callable[[Row], tuple[str, str]]:
    """Return the function from a row with `question`, one field per option and `cop` to (prompt, gold).

    Args:
        instruction: First line of the prompt.
        options: The options' fields.
        first: The `cop` of the first option.
    """

    def ask(row: Row) -> tuple[str, str]:
        texts = [text_of(row, name) for name in options]
        prompt = choice_prompt(instruction, text_of(row, "question"), texts)
        return prompt, LETTERS[index_of(row, "cop", first, first + len(LETTERS) - 1) - first]

    return ask
