"""Token ids with their places in the text, and the loss mask of spans of the text. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_rl.data.templates import Span

Places = npt.NDArray[np.int64]


@dataclass
class Tokens:
    """Token t stands for the text from `starts[t]` to `ends[t]` (empty for what a tokenizer adds)."""

    ids: list[int]
    starts: Places
    ends: Places


class Control:
    """Tokens that are no text: specials, and added ones such as `<|im_end|>`.

    Blank added tokens are text: Gemma adds line breaks and runs of blanks.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()]
        ids = sorted({*tokenizer.all_special_ids, *added})
        self._known = np.zeros(max(ids, default=0) + 2, bool)  # the last place: all ids above
        self._known[ids] = True

    def __contains__(self, token: int) -> bool:
        return bool(self._known[min(token, len(self._known) - 1)])

    def places(self, ids: list[int]) -> Places:
        """Positions of control tokens in `ids`."""
        return np.nonzero(self._known[np.minimum(np.asarray(ids, np.int64), len(self._known) - 1)])[0]


def tokenise(
    tokenizer: Any, text: str, control: Control, spans: Sequence[Span] = (), special: bool = False
) -> Tokens:
    """The tokens of the whole text at once; `special` lets the tokenizer add its BOS.

    Where what stands before a span would be other tokens if it stood alone, as it does at inference, the
    text is cut there. Tokenizers without offsets (not fast ones) get it cut at both ends of each span.
    """
    if not tokenizer.is_fast:
        return _pieces(tokenizer, text, [place for span in spans for place in span], special, control)
    tokens = _piece(tokenizer, text, 0, special, control)
    borders = control.places(tokens.ids)
    cuts = [start for start, _ in spans if not _is_boundary(tokenizer, text, tokens, start, borders)]
    return _pieces(tokenizer, text, cuts, special, control) if cuts else tokens


def _piece(tokenizer: Any, text: str, shift: int, special: bool, control: Control) -> Tokens:
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        starts, ends = _found_in(tokenizer, ids, text, control)
        return Tokens(ids, starts + shift, ends + shift)
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    starts, ends = regions_of(found["offset_mapping"], len(text))
    return Tokens(list(found["input_ids"]), starts + shift, ends + shift)


def _found_in(tokenizer: Any, ids: list[int], text: str, control: Control) -> tuple[Places, Places]:
    """Starts and ends without offsets: control tokens stand in the text as they are written.

    All tokens between two of them have the whole text between them. A control token that is not there,
    such as BOS that the tokenizer adds, is empty.
    """
    starts, ends = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    reached, first, absent = 0, 0, []  # `reached`: where the text of token `first` begins
    for t in control.places(ids).tolist():
        written = tokenizer.convert_ids_to_tokens(ids[t])
        begin = text.find(written, reached)
        if begin < 0 or (t == first and text[reached:begin].strip()):  # blanks alone may have been stripped
            absent.append(t)
            first += t == first
            continue
        starts[first:t], ends[first:t] = reached, begin
        starts[t], ends[t] = begin, begin + len(written)
        reached, first = begin + len(written), t + 1
    starts[first:], ends[first:] = reached, len(text)
    ends[absent] = starts[absent]
    return starts, ends


def _pieces(tokenizer: Any, text: str, cuts: Sequence[int], special: bool, control: Control) -> Tokens:
    places = sorted({0, len(text), *cuts})
    pieces = [
        _piece(tokenizer, text[start:end], start, special and start == 0, control)
        for start, end in pairwise(places)
    ]
    return Tokens(
        [token for piece in pieces for token in piece.ids],
        np.concatenate([piece.starts for piece in pieces]),
        np.concatenate([piece.ends for piece in pieces]),
    )


def _is_boundary(tokenizer: Any, text: str, tokens: Tokens, place: int, borders: Places) -> bool:
    """Whether the tokens before `place` are those of the text before it, tokenised alone.

    A control token cuts any text, so it is enough to look from the last one on.
    """
    later = tokens.ends > place
    upto = int(np.argmax(later)) if later.any() else len(tokens.ids)
    before = int(np.searchsorted(borders, upto)) - 1
    first = int(borders[before]) if before >= 0 else 0
    if before >= 0 and tokens.ends[first] == place and upto == first + 1:
        return True
    while first < upto and tokens.starts[first] == tokens.ends[first]:
        first += 1  # BOS that the tokenizer put in front
    start = int(tokens.starts[first]) if first < upto else 0
    alone = tokenizer(text[start:place], add_special_tokens=False)["input_ids"]
    return list(alone) == tokens.ids[first:upto]


def regions_of(offsets: Sequence[Sequence[int]], length: int) -> tuple[Places, Places]:
    """Starts and ends from the offsets of a fast tokenizer, with those of trimmed blanks mended.

    Byte-level tokenizers trim blanks from offsets: a token of blanks alone has the empty one at their
    end, or at 0 where they begin the text.
    """
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    starts, ends = places[:, 0].copy(), places[:, 1].copy()
    for t in np.nonzero(starts >= ends)[0].tolist():
        reached, end = int(ends[:t].max(initial=0)), int(ends[t])
        full = np.nonzero(starts[t + 1 :] < ends[t + 1 :])[0]
        following = int(starts[t + 1 + full[0]]) if len(full) else length
        starts[t] = reached
        ends[t] = end if end > reached else max(reached, following if end else reached)
    return starts, ends


def one_bos(tokens: Tokens, bos: int | None) -> Tokens:
    """A template and a tokenizer (or the text itself) may both begin with BOS: one stays."""
    extra = 0
    while bos is not None and tokens.ids[extra : extra + 2] == [bos, bos]:
        extra += 1
    return Tokens(tokens.ids[extra:], tokens.starts[extra:], tokens.ends[extra:]) if extra else tokens


def mask_of(tokens: Tokens, text: str, spans: Sequence[Span], control: Control) -> list[int]:
    """1 for every token that overlaps a span, up to the token that ends the turn.

    What a template writes after that (a line break) is not the model's to write: inference stops before.
    """
    mask = np.zeros(len(tokens.ids), np.int64)
    borders = control.places(tokens.ids)
    for start, end in spans:
        inside = (tokens.starts < end) & (tokens.ends > start) & (tokens.starts < tokens.ends)
        ends = borders[inside[borders]]
        if len(ends) and not text[tokens.ends[ends[-1]] : end].strip():
            inside[ends[-1] + 1 :] = False
        mask[inside] = 1
    found: list[int] = mask.tolist()
    return found


def learn_endings(tokens: Tokens, text: str, mask: list[int], control: Control) -> None:
    """Put the token that ends the text into `mask` behind each answer that it follows at once.

    For spans that a template marks: some leave out the token that ends the turn, and a model must learn it.
    """
    ending = last_control(tokens, text, control)
    for t in range(1, len(mask)):
        if tokens.ids[t] == ending and mask[t - 1] and tokens.ids[t - 1] not in control:
            mask[t] = 1


def last_control(tokens: Tokens, text: str, control: Control) -> int | None:
    """The id of the control token that ends `text` (blanks may follow), or None."""
    places = control.places(tokens.ids)
    if not len(places) or text[tokens.ends[places[-1]] :].strip():
        return None
    return tokens.ids[places[-1]]
