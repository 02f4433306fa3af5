"""From a recipe to its SFT data: files, archives, tokenizer or processor, and how ranks agree."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hpc_rl.catalog.facts import max_position
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.multimodal import Multimodal
from hpc_rl.data.prompt_media import data_folder
from hpc_rl.data.rows import Rows, load_rows
from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.folder import load_processor, load_tokenizer, model_folder, read_config
from hpc_rl.policy.sft_data import SftData
from hpc_rl.policy.sft_rows import Agree, RowSource, row_source
from hpc_rl.policy.sft_sizes import Share, Store
from hpc_rl.policy.step import Ranks
from hpc_rl.recipe.schema import DatasetSpec, Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.types import TrainSample


def open_sft_data(
    recipe: Recipe,
    run_dir: RunDir,
    ranks: Ranks,
    *,
    needs_picture: bool = False,
    packed: bool = True,
    store: Store | None = None,
) -> SftData:
    """The data of a recipe for this rank. With `needs_picture`, every forward must have one.

    `packed` says whether the model takes rows as they are, or unpacks them into padded batches. Ranks tell
    each other sizes of rows in `store`. Raises DataError or ModelError.
    """
    processor = load_processor(recipe.model)
    if processor is not None and not packed and recipe.policy.batch_tokens is not None:
        raise ModelError(
            f"policy.batch_tokens packs rows with images, and those of {recipe.model.path} must be padded: "
            "use policy.batch_size with policy.micro_batch_size"
        )
    tokenizer = load_tokenizer(recipe.model) if processor is None else processor.tokenizer
    if needs_picture and processor is None:
        raise ModelError(f"{recipe.model.path} takes images, and its folder has no processor for them")
    train, held_out = open_sources(recipe, run_dir, tokenizer, processor)
    return SftData(
        train,
        recipe.policy,
        recipe.seed,
        ranks.data_parallel,
        held_out=held_out,
        rank=ranks.rank // ranks.tp,
        workers=recipe.data.workers,
        blank=blank_samples(processor, train.spec) if needs_picture else None,
        agree=agree_over(ranks),
        share=_share(store, ranks, media=processor is not None),
    )


def _share(store: Store | None, ranks: Ranks, *, media: bool) -> Share | None:
    """Where ranks tell each other sizes of rows, if that is worth it.

    Text is encoded twice where it is shared: for its sizes, and where it is trained on. That is less only if
    the two parts are less than a whole.
    """
    worth = media or 1 / ranks.world_size + 1 / ranks.data_parallel < 1
    if store is None or not worth:
        return None
    return Share(store, ranks.rank, ranks.world_size)


def agree_over(ranks: Ranks) -> Agree:
    """Over the default process group; the ranks of a tensor-parallel group count the same tokens."""

    def agree(count: int, sums: list[float]) -> tuple[int, list[float]]:
        if ranks.world_size == 1:
            return count, sums
        most = torch.tensor(count, device=ranks.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if sums:
            total = torch.tensor(sums, dtype=torch.float64, device=ranks.device)
            dist.all_reduce(total)
            sums = (total / ranks.tp).tolist()
        return int(most), sums

    return agree


def open_sources(
    recipe: Recipe, run_dir: RunDir, tokenizer: Any, processor: Any = None
) -> tuple[RowSource, RowSource | None]:
    """`(training rows, validation rows)` of a recipe; archives of media are unpacked. Raises DataError."""
    data, limit, today = recipe.data, length_limit(recipe), run_dir.made

    def source(rows: Rows, spec: DatasetSpec) -> RowSource:
        files = None
        if processor is not None:
            files = MediaFiles(spec, data_folder(spec, run_dir.root))
            files.prepare()
        return row_source(rows, spec, tokenizer, limit, processor=processor, files=files, today=today)

    train, held = load_rows(data.train, run_dir.root), None
    if data.eval is not None:
        held = source(load_rows(data.eval, run_dir.root), data.eval)
    elif data.holdout:
        train, part = train.split(data.holdout, recipe.seed)
        held = source(part, data.train)
    return source(train, data.train), held


def length_limit(recipe: Recipe) -> int | None:
    """`policy.max_length`, else the model's positions: beyond them a model has learned nothing, and one row
    without end would hold or kill the run. None where the model's config names none."""
    if recipe.policy.max_length is not None:
        return recipe.policy.max_length
    return max_position(read_config(model_folder(recipe.model.path, recipe.model.revision)))


def blank_samples(processor: Any, spec: DatasetSpec) -> Callable[[int], TrainSample]:
    """Samples with a blank picture or clip, of which nothing is learned."""
    media = Multimodal(processor, MediaFiles(spec, None))

    @functools.cache
    def blank(kind: int) -> TrainSample:
        one = media.blank(kind)
        return TrainSample(-1, -1, one.token_ids, one.loss_mask, [], [], media=one.media)

    return blank
