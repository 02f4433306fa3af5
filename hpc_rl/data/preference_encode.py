"""From preference pairs to token ids: one sequence of two, so that nothing parts the sides of a pair.

The chosen sequence comes first and ends at `split`, the rejected one follows; both begin with the prompt's
tokens, and the answers' are learned. No torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpc_rl.data.encode import Encoded, EncodedRow, Encoder
from hpc_rl.data.errors import DataError
from hpc_rl.data.preference import TextPair, one_rendering, pair_of
from hpc_rl.recipe.schema import DatasetSpec


class PairEncoder:
    """Rows of one data set of pairs. `max_length` is that of one side. One per thread, as its `Encoder`."""

    def __init__(self, encoder: Encoder, spec: DatasetSpec, max_length: int | None = None) -> None:
        self._encoder, self._spec, self._max_length = encoder, spec, max_length

    def __call__(self, row: dict[str, Any], where: str = "") -> EncodedRow:
        """The pair of a row, or none where nothing can be learned of it. Raises DataError."""
        where, template = where or self._spec.path, self._encoder.template
        pair = pair_of(row, self._spec, where, wrap=template is not None)
        if isinstance(pair, TextPair):
            texts = (pair.chosen, pair.rejected)
            sides = [self._encoder.plain(pair.prompt, text, where) for text in texts]
            return self._fitted(sides[0], sides[1], 0, where)
        if template is None:
            raise DataError(f"{where} has chat messages, and the tokenizer has no chat template")
        sides = []
        for conversation in pair.sides:
            prepared = replace(conversation, messages=template.prepared(conversation.messages))
            rendering = one_rendering(template, prepared, pair.prompt, where)
            sides.append(self._encoder.sequence(rendering, prepared, where))
        return self._fitted(sides[0], sides[1], int(pair.chosen.repaired), where)

    def _fitted(self, chosen: Encoded, rejected: Encoded, repaired: int, where: str) -> EncodedRow:
        """Both sides within `max_length`, as `overlong` says.

        `truncate` cuts where both answers run past the limit, and drops the pair where one does: cutting one
        side alone would teach that answers without an end are better, or worse.
        """
        row, limit, sides = EncodedRow(repaired=repaired), self._max_length, [chosen, rejected]
        over = [limit is not None and len(side.token_ids) > limit for side in sides]
        if any(over):
            if self._spec.overlong == "error":
                longest = max(len(side.token_ids) for side in sides)
                raise DataError(f"{where} has {longest} tokens on one side, more than policy.max_length")
            if self._spec.overlong == "drop" or not all(over):
                row.dropped = 1
                return row
            sides = [Encoded(side.token_ids[:limit], side.loss_mask[:limit]) for side in sides]
            row.truncated = 1
        for side in sides:
            side.loss_mask[:1] = [0]  # nothing predicts the first token
        alike = sides[0].token_ids == sides[1].token_ids
        if alike or not all(any(side.loss_mask) for side in sides):
            row.dropped = 1
            return row
        tokens, masks = (
            [*sides[0].token_ids, *sides[1].token_ids],
            [*sides[0].loss_mask, *sides[1].loss_mask],
        )
        row.sequences.append(Encoded(tokens, masks, split=len(sides[0].token_ids)))
        return row
