"""The images and videos of RL samples: the rank that trains on an answer reads the media of its prompt.

A sample names the row of its prompt. The row is read and encoded by the same functions as in the replica
(`data/prompt_media.py`), once for all answers to it, by threads while the first ones are taken. Data set,
processor and chat template are opened at the first sample that needs them: a run on text alone pays nothing.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Sequence

from hpc_rl.data.encode import IMAGE, VIDEO
from hpc_rl.data.errors import DataError
from hpc_rl.data.multimodal import kinds_of
from hpc_rl.data.prompt_media import MediaPrompts, PromptMedia
from hpc_rl.data.stream import RowStream
from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.folder import load_processor
from hpc_rl.policy.sft_open import agree_over, blank_samples
from hpc_rl.policy.step import Ranks
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.types import TrainSample

KINDS = (IMAGE, VIDEO)


class RlMedia:
    """Gives the samples of a step their media. With `needs_media` (a vision tower that is sharded) every
    forward gets a blank of each kind that some rank has in the step, as in SFT."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, ranks: Ranks, *, needs_media: bool) -> None:
        self._recipe, self._run_dir = recipe, run_dir
        self._agree = agree_over(ranks) if needs_media else None
        self._stream: RowStream[PromptMedia] = RowStream(self._maker, recipe.data.workers)
        self._lock = threading.Lock()

    def fill(self, micro_batches: Sequence[list[TrainSample]]) -> None:
        """Attach media to the samples of this rank, and add blank ones. Collective with `needs_media`.

        Raises DataError or ModelError.
        """
        samples = [sample for samples in micro_batches for sample in samples if sample.row >= 0]
        rows = list(dict.fromkeys(sample.row for sample in samples))
        self._stream.want(rows)
        made = {row: self._stream.take(row) for row in rows}
        for sample in samples:
            media = made[sample.row]
            if sample.token_ids[: len(media.token_ids)] != media.token_ids:
                raise DataError(
                    f"{self._prompts.rows.where(sample.row)}: its images or videos make other tokens here "
                    "than in the replica that generated: have files changed since, or do nodes see others?"
                )
            sample.media = media.tensors
        if self._agree is not None:
            self._add_blanks(micro_batches, self._agree)

    def close(self) -> None:
        self._stream.close()

    def _add_blanks(
        self,
        micro_batches: Sequence[list[TrainSample]],
        agree: Callable[[int, list[float]], tuple[int, list[float]]],
    ) -> None:
        has = [_kinds(samples) for samples in micro_batches]
        own = functools.reduce(operator.or_, has, 0)
        _, counts = agree(0, [float(bool(own & kind)) for kind in KINDS])
        wanted = [kind for kind, count in zip(KINDS, counts, strict=True) if count > 0]
        for samples, kinds in zip(micro_batches, has, strict=True):
            samples += [self._blank(kind) for kind in wanted if not kinds & kind]

    @functools.cached_property
    def _blank(self) -> Callable[[int], TrainSample]:
        return blank_samples(self._processor, self._recipe.data.train)

    @functools.cached_property
    def _processor(self) -> object:
        model = self._recipe.model
        processor = load_processor(model)
        if processor is None:
            raise ModelError(f"prompts have images or videos, and {model.path} has no processor for them")
        return processor

    @functools.cached_property
    def _prompts(self) -> MediaPrompts:
        spec, run_dir = self._recipe.data.train, self._run_dir
        return MediaPrompts(spec, run_dir.root, self._processor, run_dir.made)

    def _maker(self) -> Callable[[int], PromptMedia]:
        with self._lock:
            prompts = self._prompts
        return prompts.maker()


def _kinds(samples: Sequence[TrainSample]) -> int:
    return functools.reduce(operator.or_, (kinds_of(sample.media) for sample in samples), 0)
