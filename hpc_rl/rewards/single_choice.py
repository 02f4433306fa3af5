r"""A reward for the right letter of a multiple-choice question, however the response says it."""

from __future__ import annotations

import re
from typing import Any

from hpc_rl.rewards.answers import final_part, last_boxed, normal, without_text
from hpc_rl.rewards.config import SingleChoiceConfig

_WORDS = r"(?:answer|option|choice)"
_OPEN, _CLOSE = r"[\s*_`\"'(\[]*", r"(?![A-Za-z'’])"


class SingleChoice:
    """Reward `single_choice`."""

    def __init__(self, config: SingleChoiceConfig) -> None:
        self.config = config
        letter = f"([{config.choices}])"
        either = f"([{config.choices}{config.choices.lower()}])"
        is_ = r"(?i:\s*is|\s*are|\s*would\s+be|\s*[:=-])\s*:?\s*"
        said = rf"(?i:{_WORDS}(?:\s+(?:choice|option|letter))?)\**{is_}(?i:option|choice)?"
        # "the answer is (B)", "**Answer:** B", "correct option is **b**". A small letter alone may be the
        # article, so it must be in brackets or end the line.
        self._said = [
            re.compile(rf"{said}{_OPEN}{letter}{_CLOSE}"),
            re.compile(rf"{said}[\s*_`\"']*[(\[]{either}[)\]]"),
            re.compile(rf"(?m){said}{_OPEN}{either}[ *_`\"')\].]*$"),
        ]
        self._alone = re.compile(rf"(?i:(?:{_WORDS})?){_OPEN}{either}[\s*_`\"')\].:]*")
        self._marked = re.compile(rf"(?<![A-Za-z])(?:[(\[]{letter}[)\]]|{letter}[).:])(?![A-Za-z])")
        self._option = re.compile(rf"(?i:option|choice)\s+[*(]*{letter}{_CLOSE}")

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        """1.0 or 0.0. Raises ValueError when the row's own answer names no choice: a fault of the data."""
        options = self._options(fields)
        expected = self.letter(answer or "", options)
        if expected is None:
            letters = self.config.choices
            raise ValueError(f"reward single_choice finds none of {letters} in the row's answer {answer!r}")
        return float(self.letter(final_part(response), options) == expected)

    def letter(self, text: str, options: dict[str, str]) -> str | None:
        """The letter that `text` gives as its answer; None if it gives none, or cannot be told."""
        box = last_boxed(text)
        text = text if box is None else without_text(box)
        # One character per gap: the patterns would try a long one in many ways.
        text = re.sub(r"\s+", lambda gap: "\n" if "\n" in gap.group() else " ", text.strip())
        if found := self._alone.fullmatch(text):
            return found.group(1).upper()
        said = [match for pattern in self._said for match in pattern.finditer(text)]
        if said:
            return max(said, key=lambda match: match.start(1)).group(1).upper()
        for line in reversed(text.split("\n")):  # a line with nothing but the letter
            if found := self._alone.fullmatch(line.strip()):
                return found.group(1).upper()
        if options:
            means = [letter for letter, words in options.items() if normal(words) == normal(text)]
            if len(means) == 1:
                return means[0]
        marked = list(self._marked.finditer(text))  # "B) Paris"; not where the options are discussed
        if marked and marked[0].start() <= 2 and len({m.group(1) or m.group(2) for m in marked}) == 1:
            return marked[0].group(1) or marked[0].group(2)
        named = set(self._option.findall(text))
        return named.pop() if len(named) == 1 else None

    def _options(self, fields: dict[str, Any]) -> dict[str, str]:
        column = self.config.options
        if column is None:
            return {}
        value = fields.get(column)
        if isinstance(value, list):
            return dict(zip(self.config.choices, map(str, value), strict=False))
        if isinstance(value, dict):
            return {str(key).upper(): str(words) for key, words in value.items()}
        raise ValueError(f"reward single_choice: column {column!r} must hold a list or a mapping of options")
