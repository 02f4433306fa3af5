r"""Where the answer stands in a response, and when two answers are the same: shared by the rewards.

Nothing here is evaluated, and every pattern is linear in the text: responses may be anything.
"""

from __future__ import annotations

import re
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_NUMBER = re.compile(r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?[\d.]{1,40})\}\{([-+]?[\d.]{1,40})\}")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)(?!\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}])\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
_SIZES = re.compile(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr|Bigl|Bigr)(?![A-Za-z])")
_SPACES = re.compile(r"\\[,;:! ]|\\(?:quad|qquad)(?![A-Za-z])|~|\s+")
_NAME = re.compile(r"^[A-Za-z]\s*=\s*(?!.*=)")


def final_part(response: str) -> str:
    """What the response gives as its answer: the text behind the last `</think>`, and in it the content of
    the last `<answer>`. Empty where the thinking never ended."""
    _, ended, rest = response.rpartition("</think>")
    if not ended and "<think>" in response:
        return ""
    text = rest if ended else response
    _, opened, tail = text.rpartition("<answer>")
    return tail.partition("</answer>")[0] if opened else text


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox`) whose braces close; None if there is none."""
    closing = _closing(text)
    found = None
    end = 0
    for box in _BOX.finditer(text):
        if box.start() < end or box.end() not in closing:
            continue  # inside the one before, which is the answer; or it never ends
        end = closing[box.end()]
        found = text[box.end() + 1 : end]
    return found


def _closing(text: str) -> dict[int, int]:
    """Where each brace of `text` is closed, by where it opens. Escaped braces are text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def reference_part(answer: str) -> str:
    r"""The answer proper of a row: in its last `\boxed{}`, else behind its last `####`, else all of it;
    without the dollar signs or brackets that enclose it."""
    text = last_boxed(answer)
    if text is None:
        text = answer.rpartition("####")[2]
    text = text.strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(left) : len(text) - len(right)]
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            return inner.strip() if left not in inner else text
    return text


def plain_signs(text: str) -> str:
    """With ASCII's minus, for the typographic ones, and plain spaces."""
    for sign, plain in (("−", "-"), ("﹣", "-"), ("－", "-"), ("\u00a0", " "), ("\u202f", " ")):
        text = text.replace(sign, plain)
    return text


def without_text(text: str) -> str:
    r"""`text` with `\\text{}` and its kin opened."""
    return _TEXT.sub(r"\1", text)


def normal(text: str) -> str:
    r"""`text` without what does not change an answer: spaces, `\left`, `\text{}` around words, units behind
    a number, dollar signs, degree and percent signs at the end, thousands separators, a final stop, `x =`."""
    text = plain_signs(text).strip().strip("$").strip().rstrip(".").strip()
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace("{,}", ",")
    text = text.replace(r"\$", "").replace(r"\%", "%").removeprefix("$")
    text = _NAME.sub("", _SPACES.sub("", _SIZES.sub("", text)))
    text = without_text(_UNIT.sub("", text))
    text = re.sub(r"(?:\^\{?\\circ\}?|\\degree|°|%)$", "", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def number(text: str) -> Fraction | None:
    r"""The value of a `normal` text that is one number: `-1.5`, `3/4`, `\frac{3}{4}`. Else None."""
    found = _FRACTION.fullmatch(text)
    if found:
        sign, above, below = found.groups()
        text = f"{above}/{below}"
    else:
        sign = ""
    parts = text.split("/")
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part) for part in parts]
    if len(values) == 2 and values[1] == 0:
        return None
    value = values[0] / values[1] if len(values) == 2 else values[0]
    return -value if sign == "-" else value


def same(one: str, other: str) -> bool:
    """Whether two answers are equal: as numbers where both are one, else as `normal` text."""
    one, other = normal(one), normal(other)
    values = number(one), number(other)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    return one == other
