"""Safetensors that `from_pretrained` and vLLM load as they are: streamed, sharded at 4 GB, atomic.

The weights come bucket by bucket from a weight source (the live policy, or a checkpoint on disk), under
the names of the checkpoint file. At most two files' worth of tensors is in memory: one being
collected, one being written. The folder appears under its name when everything in it is synced.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from hpc_rl.checkpoint.layout import sync_folder

SHARD_BYTES = 4_000_000_000
BUCKET_BYTES = 512 << 20
# What goes along with the weights: everything that describes the model, its words and its sampling.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*processor_config.json",
    "*.py",
    "LICENSE*",
)


class Source(Protocol):
    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]: ...


class ExportError(RuntimeError):
    """The export could not be written."""


class Export:
    """One export under way. `feed` on all ranks (gathering is collective), then `join` on rank 0.

    `model` is the folder of the model that was trained (config and tokenizer are copied from it),
    `tokenizer` another folder for the tokenizer, or None.
    """

    def __init__(self, target: Path, model: Path, tokenizer: Path | None, dtype: torch.dtype) -> None:
        self.target, self.model, self.tokenizer, self.dtype = target, model, tokenizer, dtype
        self.folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
        self.error: str | None = None
        self._shards: queue.Queue[dict[str, Tensor] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._write_all, name="export", daemon=True)

    def feed(self, source: Source) -> None:
        """Copy the weights out of `source`; writing goes on in a thread. Training may go on afterwards."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._thread.start()
        shard: dict[str, Tensor] = {}
        nbytes = 0
        for bucket in source.buckets(BUCKET_BYTES):
            for name, tensor in bucket:
                size = tensor.numel() * tensor.element_size()
                if shard and nbytes + size > SHARD_BYTES:
                    self._put(shard)
                    shard, nbytes = {}, 0
                # A copy: the original is a view of something larger, or what training changes next.
                shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
                nbytes += size
        self._put(shard)
        self._put(None)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> Path:
        """Wait for the files; the finished folder. Raises ExportError."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise ExportError(f"{self.target} was not written within {timeout_s:.0f} s")
        if self.error is not None:
            raise ExportError(self.error)
        return self.target

    def _put(self, shard: dict[str, Tensor] | None) -> None:
        """Hand over, unless the writer has failed: then gathering goes on for the other ranks' sake."""
        while self.error is None:
            try:
                return self._shards.put(shard, timeout=0.2)
            except queue.Full:
                continue

    def _write_all(self) -> None:
        try:
            files: list[tuple[Path, dict[str, int]]] = []
            while (shard := self._shards.get()) is not None:
                path = self.folder / f"part-{len(files)}.safetensors"
                save_file(shard, path, metadata={"format": "pt"})
                files.append((path, {n: t.numel() * t.element_size() for n, t in shard.items()}))
            self._name(files)
            self._describe()
            self._publish()
        except OSError as error:
            self.error = f"{type(error).__name__}: {error}"
            shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, files: list[tuple[Path, dict[str, int]]]) -> None:
        if len(files) == 1:
            files[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (path, sizes) in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            path.rename(self.folder / name)
            weight_map.update(dict.fromkeys(sizes, name))
        total = sum(size for _, sizes in files for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _describe(self) -> None:
        config = json.loads((self.model / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for folder in (self.model, self.tokenizer):
            for pattern in COMPANIONS if folder is not None else ():
                for path in folder.glob(pattern):  # type: ignore[union-attr]
                    if path.is_file():
                        shutil.copyfile(path, self.folder / path.name)

    def _publish(self) -> None:
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(self.folder)
        old = self.target.with_name(f".{self.target.name}.{os.getpid()}.old")
        if self.target.exists():  # of an attempt that was rolled back
            os.replace(self.target, old)
        os.replace(self.folder, self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)
