"""vLLM's weight-transfer engine over our gloo channel. Runs inside vLLM's worker processes.

The init information names the bus FILE and the group's prefix, never a password. One `update_weights`
call receives a whole push; its report goes into the group's rendezvous store, where the replica's main
process reads it (vLLM's update call returns nothing).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from hpc_rl.weights.gloo import GlooChannel, GlooTransport
from hpc_rl.weights.mirror import Mirror
from hpc_rl.weights.names import checkpoint_names, local_folder, tied_names
from hpc_rl.weights.nccl import NcclChannel
from hpc_rl.weights.protocol import Bucket, Channel, WeightTransferError
from hpc_rl.weights.receiver import Receiver
from hpc_rl.weights.store import RedisStore


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    bus_file: str
    prefix: str
    workers: int
    timeout_s: float


@dataclass
class PushUpdateInfo(WeightTransferUpdateInfo):
    """One push: its version and how long it may take."""

    version: int
    timeout_s: float


@dataclass
class Fetched:
    """The weights that arrived last, and the receiver that has still to say that they are loaded."""

    mirror: Mirror = field(default_factory=Mirror)
    receiver: Receiver | None = None


class PushReport(msgspec.Struct):
    """What a worker says of a push it applied."""

    version: int
    tensors: int
    nbytes: int
    seconds: float


def make_receiver(channel: Channel, model_path: str, revision: str | None) -> Receiver:
    """One that knows which tensors the engine was loaded from."""
    folder = local_folder(model_path, revision)
    return Receiver(channel, checkpoint_names(folder), tied_names(folder))


def load_buckets(model: torch.nn.Module, buckets: Iterable[Bucket], parameters: Iterable[str]) -> None:
    """Give all buckets of a push to vLLM's `load_weights`.

    Raises WeightTransferError naming those of `parameters` that vLLM says it has not loaded, as it does
    itself when a model starts, but not in an update.
    """
    missing: set[str] | None = set(parameters)
    for bucket in buckets:
        loaded: set[str] | None = model.load_weights(iter(bucket))  # type: ignore[operator]
        missing = None if missing is None or loaded is None else missing - loaded  # None: it does not say
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise WeightTransferError(f"vLLM applied no new weights to {len(missing)} of its parameters: {names}")


def receive_into(
    model: torch.nn.Module, receiver: Receiver, info: PushUpdateInfo, parameters: Iterable[str]
) -> PushReport:
    """Receive a push and give each verified bucket to vLLM's `load_weights`.

    Raises WeightTransferError; the model then holds a mixture and must get a whole push before use.
    """
    began = time.monotonic()
    deadline = began + info.timeout_s
    try:
        load_buckets(model, receiver.receive(info.version, deadline), parameters)
    except BaseException:
        receiver.channel.close()  # the sender sees the closed connection instead of waiting for its deadline
        raise
    receiver.finish(True, deadline)
    return PushReport(info.version, receiver.tensors, receiver.nbytes, time.monotonic() - began)


def receive_and_report(
    engine: WeightTransferEngine[Any, Any],
    channel: GlooChannel | NcclChannel | None,
    info: PushUpdateInfo,
    parameters: Iterable[str] = (),
) -> None:
    """`receive_into` the model of `engine`; the report goes into the group's rendezvous store."""
    if channel is None:
        raise WeightTransferError("update_weights before init_weight_transfer_engine")
    config = engine.model_config
    receiver = make_receiver(channel, config.model, config.revision)
    report = receive_into(engine.model, receiver, info, parameters)
    key = f"report:{info.version}:{engine.parallel_config.rank}"
    channel.store.set(key, msgspec.msgpack.encode(report))


def refresh_tied(model: torch.nn.Module) -> None:
    """Let modules that share another module's weight process it again.

    vLLM's layerwise reload processes a module when its own weights arrive; a tied lm_head never gets
    any. On CPU that head computes with a repacked copy, which without this stays that of the old weights.
    """
    owners: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    for modules in owners.values():
        if len(modules) > 1:
            for module in modules:
                method = getattr(module, "quant_method", None)
                if isinstance(method, QuantizeMethodBase):
                    method.process_weights_after_loading(module)


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, PushUpdateInfo]):
    """Registered with vLLM as backend `hpc_rl_gloo`."""

    init_info_cls = GlooInitInfo
    update_info_cls = PushUpdateInfo
    supports_draft_weight_update = False

    _channel: GlooChannel | None = None
    _fetched: Fetched | None = None
    _parameters: frozenset[str] = frozenset()  # what a push must load

    @property
    def channel(self) -> GlooChannel | None:
        """The transfer group; None before the first push."""
        return self._channel

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join a transfer group; a previous one is left."""
        self.shutdown()
        self._channel = GlooTransport.join(
            init_info.bus_file,
            init_info.prefix,
            self.parallel_config.rank,
            init_info.workers,
            init_info.timeout_s,
        )

    def begin_fetch(self, version: int, timeout_s: float, init_info: dict[str, Any]) -> None:
        """Receive the push of `version` into host memory, in a thread: the worker goes on generating.

        How it went is written under `fetched:<version>:<rank>` of the group's store. The first push joins
        the transfer group.
        """
        if self._fetched is None:
            self._fetched = Fetched()
        self._fetched.receiver = None
        thread = threading.Thread(
            target=self._fetch,
            args=(self._fetched, version, timeout_s, GlooInitInfo(**init_info)),
            name=f"fetch-{version}",
            daemon=True,
        )
        thread.start()

    def _fetch(self, fetched: Fetched, version: int, timeout_s: float, init_info: GlooInitInfo) -> None:
        deadline = time.monotonic() + timeout_s
        store = RedisStore.from_bus_file(init_info.bus_file, init_info.prefix, timeout_s)
        key = f"fetched:{version}:{self.parallel_config.rank}"
        try:
            if self._channel is None:
                self.init_transfer_engine(init_info)
            channel = self._channel
            assert channel is not None
            receiver = make_receiver(channel, self.model_config.model, self.model_config.revision)
            receiver.fetch(version, deadline, fetched.mirror)
        except (RuntimeError, OSError, ValueError) as error:  # the engine waits for it under the key
            self.shutdown()
            store.set(key, f"{type(error).__name__}: {error}".encode())
            return
        fetched.receiver = receiver
        store.set(key, b"")

    def start_weight_update(self) -> None:
        before = {name for name, _ in self.model.named_parameters()}  # tied ones once
        initialize_layerwise_reload(self.model)
        # A quantised layer has other parameters than it loads.
        if self.model_config.quantization is None:
            self._parameters = frozenset(n for n, _ in self.model.named_parameters() if n in before)

    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        """Load what was fetched, or receive."""
        fetched, channel = self._fetched, self._channel
        if fetched is None or fetched.mirror.version != update_info.version or fetched.receiver is None:
            receive_and_report(self, channel, update_info, self._parameters)
            return
        assert channel is not None
        began = time.monotonic()
        try:
            load_buckets(self.model, fetched.mirror.buckets(), self._parameters)
        except BaseException:
            channel.close()
            raise
        receiver, fetched.receiver = fetched.receiver, None
        receiver.finish(True, began + update_info.timeout_s)
        report = PushReport(update_info.version, receiver.tensors, receiver.nbytes, time.monotonic() - began)
        key = f"report:{update_info.version}:{self.parallel_config.rank}"
        channel.store.set(key, msgspec.msgpack.encode(report))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied(self.model)

    def shutdown(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
