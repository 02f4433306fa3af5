"""Token ids with their places in the text, and the loss mask of spans of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hpc_rl.data.templates import Span


@dataclass
class Tokens:
    """`regions[t]` is the part of the text that token t stands for (empty for what a tokenizer adds)."""

    ids: list[int]
    regions: list[Span]


def control_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that are no text: specials, and added ones such as `<|im_end|>`."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def tokenise(tokenizer: Any, text: str, spans: Sequence[Span] = (), special: bool = False) -> Tokens:
    """The tokens of the whole text at once; `special` lets the tokenizer add its BOS.

    Where what stands before a span would be other tokens if it stood alone, as it does at inference, the
    text is cut there. Tokenizers without offsets (not fast ones) get it cut at both ends of each span.
    """
    if not tokenizer.is_fast:
        return _pieces(tokenizer, text, [place for span in spans for place in span], special)
    tokens = _piece(tokenizer, text, 0, special)
    control = control_tokens(tokenizer)
    cuts = [start for start, _ in spans if not _is_boundary(tokenizer, text, tokens, start, control)]
    return _pieces(tokenizer, text, cuts, special) if cuts else tokens


def _piece(tokenizer: Any, text: str, shift: int, special: bool) -> Tokens:
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        return Tokens(ids, [(shift, shift + len(text))] * len(ids))
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    regions = regions_of(found["offset_mapping"], len(text))
    return Tokens(list(found["input_ids"]), [(a + shift, b + shift) for a, b in regions])


def _pieces(tokenizer: Any, text: str, cuts: Sequence[int], special: bool) -> Tokens:
    places = sorted({0, len(text), *cuts})
    tokens = Tokens([], [])
    for start, end in pairwise(places):
        piece = _piece(tokenizer, text[start:end], start, special and start == 0)
        tokens.ids += piece.ids
        tokens.regions += piece.regions
    return tokens


def _is_boundary(tokenizer: Any, text: str, tokens: Tokens, place: int, control: frozenset[int]) -> bool:
    """Whether the tokens before `place` are those of the text before it, tokenised alone.

    A control token cuts any text, so it is enough to look from the last one on.
    """
    upto = next((t for t, (_, end) in enumerate(tokens.regions) if end > place), len(tokens.ids))
    first = next((t for t in range(upto - 1, -1, -1) if tokens.ids[t] in control), 0)
    if first < upto and tokens.ids[first] in control and tokens.regions[first][1] == place:
        return True
    start = tokens.regions[first][0] if first < upto else 0
    alone = tokenizer(text[start:place], add_special_tokens=False)["input_ids"]
    while first < upto and tokens.regions[first][0] == tokens.regions[first][1]:
        first += 1  # BOS that the tokenizer put in front
    return list(alone) == tokens.ids[first:upto]


def regions_of(offsets: Sequence[Sequence[int]], length: int) -> list[Span]:
    """Offsets as a fast tokenizer gives them, with those of trimmed blanks mended.

    Byte-level tokenizers trim blanks from offsets: a token of blanks alone has the empty one at their
    end, or at 0 where they begin the text.
    """
    regions: list[Span] = []
    following = [length] * len(offsets)
    for t in range(len(offsets) - 2, -1, -1):
        start, end = offsets[t + 1]
        following[t] = start if start < end else following[t + 1]
    reached = 0
    for (start, end), next_start in zip(offsets, following, strict=True):
        if start >= end:
            start, end = reached, end if end > reached else max(reached, next_start if end else reached)
        regions.append((start, end))
        reached = max(reached, end)
    return regions


def one_bos(tokens: Tokens, bos: int | None) -> Tokens:
    """A template and a tokenizer (or the text itself) may both begin with BOS: one stays."""
    extra = 0
    while bos is not None and tokens.ids[extra : extra + 2] == [bos, bos]:
        extra += 1
    return Tokens(tokens.ids[extra:], tokens.regions[extra:])


def mask_of(tokens: Tokens, text: str, spans: Sequence[Span], control: frozenset[int]) -> list[int]:
    """1 for every token that overlaps a span, up to the token that ends the turn.

    What a template writes after that (a line break) is not the model's to write: inference stops before.
    """
    mask = [0] * len(tokens.ids)
    t = 0
    for start, end in spans:
        while t < len(mask) and tokens.regions[t][1] <= start:
            t += 1
        first = t
        while t < len(mask) and tokens.regions[t][0] < end:
            mask[t] = int(tokens.regions[t][0] < tokens.regions[t][1])
            t += 1
        ends = [i for i in range(first, t) if tokens.ids[i] in control]
        if ends and not text[tokens.regions[ends[-1]][1] : end].strip():
            mask[ends[-1] + 1 : t] = [0] * (t - ends[-1] - 1)
        # A token may reach over the end of one span into the next.
        t = max(first, t - 1)
    return mask


def last_control(tokens: Tokens, text: str, control: frozenset[int]) -> int | None:
    """The id of the control token that ends `text` (blanks may follow), or None."""
    places = [t for t, token in enumerate(tokens.ids) if token in control]
    if not places or text[tokens.regions[places[-1]][1] :].strip():
        return None
    return tokens.ids[places[-1]]
