"""The `vllm` engine: vLLM's AsyncLLM with in-flight weight updates through its weight-transfer API.

Requests under way are frozen at a token boundary (`pause(mode="keep")`), their KV cache is dropped and
recomputed with the new weights after the update, and vLLM itself records which tokens each weight
version made. An update that fails leaves a mixture in the workers, so the engine then refuses to resume.
With `adapter` all requests name one adapter, which an update replaces; the weights stay as loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from hpc_rl.catalog.facts import tensor_shapes
from hpc_rl.data.prompt_media import PromptMedia
from hpc_rl.models.hf.media import placeholder_ids
from hpc_rl.rollout.engine import (
    AdapterShape,
    EngineError,
    EngineSettings,
    PromptError,
    Sample,
    WeightReport,
    check_places,
    prompt_room,
)
from hpc_rl.rollout.engines.config import VllmOptions
from hpc_rl.rollout.engines.vllm_media import check_expanded, media_prompt, text_prompt
from hpc_rl.types import EngineLoad, Sampling, VersionSpan
from hpc_rl.weights.names import local_folder
from hpc_rl.weights.protocol import WeightTransferError
from hpc_rl.weights.sender import group_prefix
from hpc_rl.weights.store import RedisStore
from hpc_rl.weights.transports import load_transport
from hpc_rl.weights.vllm_fetch import EXTENSION as FETCH_EXTENSION

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams

    from hpc_rl.rollout.engines.vllm_meter import Meter

log = logging.getLogger(__name__)

# An update that vLLM itself does not end by its deadline gets this much longer before we give up on it.
GRACE_S = 10.0
NOT_LINEAR = {"embed_tokens", "lm_head"}


def set_environment(options: VllmOptions) -> None:
    """vLLM reads these from the environment only. What the user has set wins.

    `nobind` lets replicas on one node share the cores that Slurm gave them: vLLM's own binding would put
    every replica on the same first cores.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(options.cpu_kv_cache_gb))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if options.enforce_eager is not False:
            # What vLLM compiles beside the model (a count of log-probs) is compiled anew, by a C++ compiler
            # and for tens of seconds, whenever the batch takes another shape; a push can time out on that.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """vLLM's arguments for these settings, by vLLM's names."""
    from vllm.config.weight_transfer import WeightTransferConfig

    options: VllmOptions = settings.options
    on_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "tokenizer": settings.tokenizer,
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
        "tensor_parallel_size": settings.tp,
        "pipeline_parallel_size": settings.pp,
        "max_model_len": settings.max_model_len,
        "seed": settings.seed,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": not on_gpu if options.enforce_eager is None else options.enforce_eager,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if options.max_num_seqs is not None:
        arguments["max_num_seqs"] = options.max_num_seqs
    if on_gpu:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    else:
        # A prompt in chunks makes vLLM step a seeded generator back, which torch's CPU generator cannot.
        arguments["enable_chunked_prefill"] = False
    if settings.transfer is not None:
        backend = load_transport(settings.transfer.transport).vllm_backend
        arguments["weight_transfer_config"] = WeightTransferConfig(backend=backend)
        if settings.transfer.keep:
            arguments["worker_extension_cls"] = FETCH_EXTENSION
    if settings.adapter is not None:
        arguments |= adapter_arguments(settings, settings.adapter)
    return {**arguments, **options.extra}


def adapter_arguments(settings: EngineSettings, adapter: AdapterShape) -> dict[str, Any]:
    """Room for one adapter, in no more layers than may have it: by itself vLLM makes some in the head too,
    which costs a product with the whole vocabulary at every token."""
    from hpc_rl.weights.vllm_adapter import EXTENSION, max_lora_rank

    layers = set(adapter.layers)
    if not layers:
        shapes = tensor_shapes(local_folder(settings.model, settings.revision)) or {}
        names = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
        layers = {name.split(".")[-2] for name in names} - NOT_LINEAR
    return {
        "enable_lora": True,
        "max_lora_rank": max_lora_rank(adapter.rank),
        "max_loras": 1,
        "max_cpu_loras": 1,
        "lora_target_modules": sorted(layers) or None,
        "worker_extension_cls": EXTENSION,
    }


def base_fingerprint(settings: EngineSettings) -> str:
    """Of the files that the engine loads; what a push of an adapter names must be the same."""
    from hpc_rl.models.hf.folder import fingerprint, model_folder

    return fingerprint(model_folder(settings.model, settings.revision)).hex()


def sampling_params(
    sampling: Sampling, count: int, stop: Sequence[str], max_tokens: int, stop_ids: Sequence[int] = ()
) -> SamplingParams:
    """vLLM's sampling parameters. Text is only made inside vLLM where stop strings need it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=count,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=max_tokens,
        seed=sampling.seed,
        stop=list(stop) or None,
        stop_token_ids=list(stop_ids) or None,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class VllmEngine:
    """See `Engine`. One vLLM engine of tp * pp workers in processes of its own."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.version = 0
        self.vocab_size = 0
        self.max_model_len = 0
        self._llm: Any = None
        self._joined = False
        self._prefix = ""
        self._init: dict[str, Any] = {}
        self._fetched = (-1, 0.0)  # version that the workers have a copy of, and how long it took
        self._broken = ""
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        self._placeholders: frozenset[int] = frozenset()
        self._base = ""  # fingerprint of the model's files, where an adapter belongs to them
        self._meter: Meter | None = None
        self._request: dict[str, Any] = {}  # what each request says besides prompt and sampling

    async def start(self) -> None:
        set_environment(self.settings.options)
        # vLLM's processes send each other pickles over Unix sockets, by default in /tmp under the user's
        # umask: in a folder of our own nobody else can connect, and none is left behind.
        self._sockets = tempfile.TemporaryDirectory(prefix="hpc-rl-vllm-")
        os.environ["VLLM_RPC_BASE_PATH"] = self._sockets.name
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if self.settings.adapter is not None:
            self._base = await asyncio.to_thread(base_fingerprint, self.settings)
        from hpc_rl.rollout.engines.vllm_meter import Meter

        def meter(config: Any, index: int = 0) -> Meter:
            self._meter = Meter(config, index)
            return self._meter

        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**engine_arguments(self.settings)), stat_loggers=[meter]
        )
        config = self._llm.vllm_config.model_config
        self.vocab_size = config.get_vocab_size()
        self.max_model_len = config.max_model_len
        # Nothing can be read after a place without its medium: an answer ends there.
        self._placeholders = placeholder_ids(config.hf_config)
        await self._llm.update_weight_version("0")
        if self.settings.adapter is not None:
            from hpc_rl.weights.vllm_adapter import REQUEST

            await self._llm.collective_rpc("add_blank_adapter")
            self._request["lora_request"] = REQUEST

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        count: int,
        request_id: str,
        media: PromptMedia | None = None,
    ) -> list[Sample]:
        room = prompt_room(prompt_ids, self.max_model_len, self.vocab_size, media)
        check_places(prompt_ids, media, self._placeholders)
        greedy = sampling.temperature == 0
        limit = min(sampling.max_tokens, room)
        params = sampling_params(
            sampling, 1 if greedy else count, self.settings.stop, limit, sorted(self._placeholders)
        )
        prompt = text_prompt(prompt_ids) if media is None else media_prompt(prompt_ids, media)
        output = await self._run(prompt, params, request_id)
        if media is not None:
            check_expanded(prompt_ids, output.prompt_token_ids)
        samples = [_sample(completion, self.version) for completion in output.outputs]
        return samples * count if greedy else samples

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=1.0)
        output = await self._run(text_prompt(token_ids), params, f"score-{time.monotonic_ns()}")
        entries = output.prompt_logprobs[1:]
        return [entry[token].logprob for entry, token in zip(entries, token_ids[1:], strict=True)]

    async def _run(self, prompt: dict[str, Any], params: SamplingParams, request_id: str) -> Any:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        output: Any = None
        try:
            async for answer in self._llm.generate(prompt, params, request_id, **self._request):
                output = answer
        except VLLMClientError as error:  # vLLM's own validation of the prompt
            raise PromptError(str(error)) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(f"vLLM failed during generation: {error}") from error
        if output is None:
            raise EngineError(f"vLLM gave no output for request {request_id}")
        return output

    def load(self) -> EngineLoad:
        return self._meter.load if self._meter is not None else EngineLoad()

    async def abort(self, request_id: str) -> None:
        await self._llm.abort(request_id)

    async def pause(self) -> None:
        await self._llm.pause_generation(mode="keep", clear_cache=True)

    @property
    def _fetches(self) -> bool:
        transfer = self.settings.transfer
        return transfer is not None and transfer.keep and self.settings.adapter is None

    async def fetch_weights(self, version: int, timeout_s: float) -> None:
        if not self._fetches:
            return
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                await self._fetch(version, timeout_s)
        except TimeoutError as error:
            raise WeightTransferError(f"version {version} was not received in {timeout_s:.0f} s") from error
        except WeightTransferError:
            raise
        except Exception as error:  # see `receive_weights`
            raise WeightTransferError(_last_line(str(error))) from error

    async def _fetch(self, version: int, timeout_s: float) -> None:
        began = time.monotonic()
        if not self._joined:
            self._init = await asyncio.to_thread(self._init_info, version, timeout_s)
        self._joined = False  # a worker that fails leaves the group
        arguments = {"version": version, "timeout_s": timeout_s, "init_info": self._init}
        await self._llm.collective_rpc("fetch_weights", kwargs=arguments)
        await asyncio.to_thread(self._await_fetched, version, timeout_s)
        self._joined = True
        self._fetched = (version, time.monotonic() - began)

    def _await_fetched(self, version: int, timeout_s: float) -> None:
        """What the workers say of their copies. Raises WeightTransferError."""
        store = RedisStore.from_bus_file(self._init["bus_file"], self._prefix, timeout_s + GRACE_S / 2)
        for rank in range(self.settings.tp * self.settings.pp):
            try:
                failure = store.get(f"fetched:{version}:{rank}").decode()
            except RuntimeError as error:
                raise WeightTransferError(
                    f"worker {rank} said nothing of version {version}: {error}"
                ) from error
            if failure:
                raise WeightTransferError(failure)

    async def receive_weights(self, version: int, timeout_s: float) -> WeightReport:
        seconds: dict[str, float] = {}
        if self._fetches and self._fetched[0] != version:
            await self.fetch_weights(version, timeout_s)
        self._broken = f"the update to version {version} did not finish"
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                report = await self._update(version, timeout_s, seconds)
        except TimeoutError as error:
            raise WeightTransferError(f"version {version} was not received in {timeout_s:.0f} s") from error
        except Exception as error:
            # vLLM gives a failure in a worker as a bare Exception; the text is all there is.
            raise WeightTransferError(_last_line(str(error))) from error
        self.version = version
        self._broken = ""
        return WeightReport(version, report["tensors"], report["nbytes"], seconds)

    async def _update(self, version: int, timeout_s: float, seconds: dict[str, float]) -> dict[str, Any]:
        """Fills `seconds` by phase; what the first worker said of the push."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        deadline = time.monotonic() + timeout_s
        if self._fetches:
            seconds["fetch"] = self._fetched[1]
        elif not self._joined:
            began = time.monotonic()
            info = await asyncio.to_thread(self._init_info, version, timeout_s)
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(info))
            self._joined = True
            seconds["join"] = time.monotonic() - began
        began = time.monotonic()
        update = {"version": version, "timeout_s": deadline - began}
        adapter = self.settings.adapter is not None
        report = await (self._take_adapter(update) if adapter else self._take_weights(update))
        seconds["receive"] = time.monotonic() - began
        began = time.monotonic()
        if adapter:
            await self._llm.update_weight_version(str(version))
        else:
            await self._llm.finish_weight_update(str(version))
        await self._llm.reset_prefix_cache()
        seconds["finish"] = time.monotonic() - began
        return report

    async def _take_weights(self, update: dict[str, Any]) -> dict[str, Any]:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update))
        return await asyncio.to_thread(self._read_report, update["version"])

    async def _take_adapter(self, update: dict[str, Any]) -> dict[str, Any]:
        reports = await self._llm.collective_rpc("receive_adapter", kwargs={**update, "base": self._base})
        report: dict[str, Any] = reports[0]
        return report

    def _init_info(self, version: int, timeout_s: float) -> dict[str, Any]:
        transfer = self.settings.transfer
        if transfer is None:
            raise EngineError("this engine was made without transfer settings")
        self._prefix = group_prefix(transfer.attempt, transfer.replica, transfer.incarnation, version)
        info: dict[str, Any] = load_transport(transfer.transport).init_info(
            transfer.bus_file, self._prefix, self.settings.tp * self.settings.pp, timeout_s
        )
        return info

    def _read_report(self, version: int) -> dict[str, Any]:
        """What the first worker said of the push (it wrote it before vLLM's call returned)."""
        assert self.settings.transfer is not None
        store = RedisStore.from_bus_file(self.settings.transfer.bus_file, self._prefix, GRACE_S)
        report: dict[str, Any] = msgspec.msgpack.decode(store.get(f"report:{version}:0"))
        return report

    async def resume(self) -> None:
        if self._broken:
            raise EngineError(f"cannot resume with mixed weights: {self._broken}")
        await self._llm.resume_generation()

    async def close(self) -> None:
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None
        if self._sockets is not None:
            self._sockets.cleanup()
            self._sockets = None


def _sample(completion: CompletionOutput, version: int) -> Sample:
    token_ids = list(completion.token_ids)
    log_probs = list(completion.logprobs.logprobs) if token_ids else []  # type: ignore[union-attr]
    spans = [VersionSpan(int(s.version), s.start, s.end) for s in completion.weight_versions or ()]
    if token_ids and not spans:
        spans = [VersionSpan(version, 0, len(token_ids))]
    return Sample(token_ids, log_probs, spans, completion.finish_reason or "abort")


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "vLLM failed without a message"
