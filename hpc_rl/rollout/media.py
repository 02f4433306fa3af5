"""The images and videos of prompts, read by the replica that generates; the bus carries row numbers only."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from hpc_rl.data.errors import DataError
from hpc_rl.data.prompt_media import Maker, MediaPrompts, PromptMedia
from hpc_rl.data.prompt_rows import has_media
from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.folder import load_processor
from hpc_rl.recipe.schema import DatasetSpec, Recipe
from hpc_rl.rollout.engine import PromptError
from hpc_rl.run.paths import RunDir
from hpc_rl.types import Prompt


class MediaLoader:
    """`open(prompt, spec)` in threads of its own; processors and data sets are loaded when first needed."""

    def __init__(self, recipe: Recipe, run_dir: RunDir) -> None:
        self._recipe, self._run_dir = recipe, run_dir
        self._pool = ThreadPoolExecutor(max(1, recipe.data.workers), "hpc-rl-media")
        self._sets: dict[str, MediaPrompts] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    async def open(self, prompt: Prompt, spec: DatasetSpec) -> PromptMedia | None:
        """The media of a prompt of the data set `spec`, None if it has none. Raises PromptError."""
        if not has_media(prompt.content):
            return None
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._open, prompt, spec)
        except (DataError, ModelError) as error:
            raise PromptError(str(error)) from error

    def close(self) -> None:
        """Begin no more; a row under way is finished by its thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open(self, prompt: Prompt, spec: DatasetSpec) -> PromptMedia:
        make = self._maker(spec)
        if make.messages(prompt.row) != prompt.content:
            raise DataError(
                f"row {prompt.row} of {spec.path} is not what the controller read: have the data been "
                "changed since the run began, or does this node see other files?"
            )
        return make(prompt.row)

    def _maker(self, spec: DatasetSpec) -> Maker:
        """One per thread and data set."""
        key = spec.model_dump_json()
        makers: dict[str, Maker] = self._local.__dict__.setdefault("makers", {})
        if key not in makers:
            with self._lock:
                if key not in self._sets:
                    self._sets[key] = self._prompts(spec)
            makers[key] = self._sets[key].maker()
        return makers[key]

    def _prompts(self, spec: DatasetSpec) -> MediaPrompts:
        model = self._recipe.model
        processor = load_processor(model)
        if processor is None:
            raise ModelError(f"prompts have images or videos, and {model.path} has no processor for them")
        return MediaPrompts(spec, self._run_dir.root, processor, self._run_dir.made)
