"""The `hf` engine: Transformers on one device, one prompt group at a time. Needs no vLLM.

Each group is generated alone, first come first served, with a random generator per sample: what comes
out depends on the seed and the weights and not on other traffic, so a synchronous run is bit-equal over
a resume. A pause holds the token loop at its next step; when the weights changed meanwhile, the key-value
cache is recomputed over the whole prefix, as vLLM does. A push is collected and verified whole before the
first tensor is replaced (a copy of the model that stays), so a failed one leaves the old weights.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hpc_rl.data.prompt_media import PromptMedia
from hpc_rl.rollout.engine import EngineError, EngineSettings, Sample, WeightReport, check_places, prompt_room
from hpc_rl.rollout.engines.config import HfOptions
from hpc_rl.rollout.engines.hf_media import MediaPrefix, Prefix
from hpc_rl.types import EngineLoad, Sampling, VersionSpan
from hpc_rl.weights.adapter import Factors, read_adapter
from hpc_rl.weights.mirror import Mirror
from hpc_rl.weights.names import checkpoint_names, local_folder, tied_names
from hpc_rl.weights.protocol import Channel, WeightTransferError
from hpc_rl.weights.receiver import Receiver
from hpc_rl.weights.sender import group_prefix
from hpc_rl.weights.transports import load_transport

PAUSE_LIMIT_S = 120.0


class _Boundary:
    """One user of the model at a time, for one forward; `close` keeps all out, between two token steps."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._busy = False
        self._closed = False

    def __enter__(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed and not self._busy)
            self._busy = True

    def __exit__(self, *error: object) -> None:
        with self._condition:
            self._busy = False
            self._condition.notify_all()

    def close(self, timeout_s: float) -> bool:
        with self._condition:
            self._closed = True
            return self._condition.wait_for(lambda: not self._busy, timeout_s)

    def open(self) -> None:
        with self._condition:
            self._closed = False
            self._condition.notify_all()


class HfEngine:
    """See `Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.tp * settings.pp != 1:
            raise ValueError("the hf engine runs on one device: rollout.parallel must be tp 1, pp 1")
        self.settings = settings
        self.version = 0
        self.vocab_size = 0
        self.max_model_len = 0
        self._model: Any = None
        self._tokenizer: Any = None
        self._eos: frozenset[int] = frozenset()
        self._placeholders: frozenset[int] = frozenset()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf-engine")
        self._boundary = _Boundary()
        self._channel: Channel | None = None
        self._receiver: Receiver | None = None  # of a push that is here and not applied yet
        self._mirror = Mirror()
        self._seconds: dict[str, float] = {}
        self._aborted: set[str] = set()
        self._waiting: dict[str, int] = {}  # request -> answers; the first is being generated
        self._broken = ""
        self._base = ""  # fingerprint of the model's files, and the weights of adapted layers as loaded
        self._loaded: dict[str, torch.Tensor] = {}

    # --- life --------------------------------------------------------------------------------------
    async def start(self) -> None:
        await self._in_thread(self._load)

    def _load(self) -> None:
        from transformers import AutoTokenizer

        from hpc_rl.models.hf.classes import find_class
        from hpc_rl.models.hf.folder import fingerprint, model_folder
        from hpc_rl.models.hf.media import placeholder_ids
        from hpc_rl.recipe.schema import Model

        options: HfOptions = self.settings.options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        common = {"revision": self.settings.revision, "trust_remote_code": self.settings.trust_remote_code}
        folder = model_folder(self.settings.model, self.settings.revision)
        if self.settings.adapter is not None:
            self._base = fingerprint(folder).hex()
        # The class that is trained, or the names of its weights would not fit.
        cls, config, _ = find_class(folder, Model(path=str(folder), **common))
        self._model = cls.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, self.settings.dtype),
            attn_implementation=self.settings.attn_implementation,
            trust_remote_code=self.settings.trust_remote_code,
        )
        self._model.to(device).eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(
            self.settings.tokenizer or self.settings.model, **common
        )
        text_config = self._model.config.get_text_config()
        self.vocab_size = text_config.vocab_size
        limit = text_config.max_position_embeddings
        self.max_model_len = min(self.settings.max_model_len or limit, limit)
        self._placeholders = placeholder_ids(self._model.config)
        ends = _eos_ids(self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id)
        self._eos = ends | self._placeholders  # nothing can be read after a place without its medium

    async def close(self) -> None:
        self._boundary.open()
        self._aborted |= self._waiting.keys()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._channel is not None:
            self._channel.close()

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    # --- generation --------------------------------------------------------------------------------
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
        prefix = Prefix(self._model) if media is None else MediaPrefix(self._model, media)
        limit = min(sampling.max_tokens, room)
        self._waiting[request_id] = count
        try:
            samples: list[Sample] = await self._in_thread(
                self._generate, list(prompt_ids), sampling, count, limit, request_id, prefix
            )
            self._aborted.discard(request_id)
            return samples
        except asyncio.CancelledError:
            self._aborted.add(request_id)  # the thread looks at it before the next token
            raise
        finally:
            self._waiting.pop(request_id, None)

    @torch.inference_mode()
    def _generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        count: int,
        max_tokens: int,
        request_id: str,
        prefix: Prefix,
    ) -> list[Sample]:
        generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(count)]
        samples = [Sample([], [], [], "length") for _ in range(count)]
        active = list(range(count))
        cache: Any = None
        version = -1
        for position in range(max_tokens):
            with self._boundary:
                if request_id in self._aborted:
                    for i in active:
                        samples[i].finish = "abort"
                    break
                if cache is None or version != self.version:
                    version = self.version
                    rows = [prompt_ids + samples[i].token_ids for i in active]
                    logits, cache = self._prefill(rows, position, prefix)
                else:
                    last = [samples[i].token_ids[-1:] for i in active]
                    logits, cache = self._forward(last, len(prompt_ids) + position - 1, cache, prefix)
            log_probs = processed_log_probs(logits, sampling.temperature, sampling.top_p)
            going = []
            for row, i in enumerate(active):
                token = _draw(log_probs[row], sampling.temperature, generators[i])
                _append(samples[i], token, float(log_probs[row, token]), version)
                if self._ends(samples[i]):
                    samples[i].finish = "stop"
                else:
                    going.append(row)
            if len(going) < len(active):
                active = [active[row] for row in going]
                if not active:
                    break
                cache.batch_select_indices(torch.tensor(going, device=self._model.device))
        return samples

    def _prefill(self, rows: list[list[int]], position: int, prefix: Prefix) -> tuple[torch.Tensor, Any]:
        """Logits of the next token and a cache, over the whole prefix of each row."""
        if position > 0:
            return self._forward(rows, 0, None, prefix)
        logits, cache = self._forward(rows[:1], 0, None, prefix)  # the prompt is the same for all rows
        if len(rows) > 1:
            cache.batch_repeat_interleave(len(rows))
        return logits.expand(len(rows), -1), cache

    def _forward(
        self, rows: list[list[int]], start: int, cache: Any, prefix: Prefix
    ) -> tuple[torch.Tensor, Any]:
        """fp32 logits [rows, vocab] after the last token of equally long `rows`, which begin at `start`."""
        ids = torch.tensor(rows, device=self._model.device)
        inputs = prefix.inputs(ids, start)
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
        return output.logits[:, -1].float().cpu(), output.past_key_values

    def _ends(self, sample: Sample) -> bool:
        if sample.token_ids[-1] in self._eos:
            return True
        if not self.settings.stop:
            return False
        # A token is at least one byte of text, so a stop string lies within this many last tokens.
        longest = max(len(stop.encode()) for stop in self.settings.stop)
        tail = self._tokenizer.decode(sample.token_ids[-longest - 1 :], skip_special_tokens=True)
        return any(stop in tail for stop in self.settings.stop)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        # Not in the generating thread: a score must not wait for the groups that are queued there.
        return await asyncio.to_thread(self._score, list(token_ids))

    @torch.inference_mode()
    def _score(self, token_ids: list[int]) -> list[float]:
        ids = torch.tensor([token_ids], device=self._model.device)
        with self._boundary:
            logits = self._model(input_ids=ids).logits[0, :-1].float()
        log_probs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        return [float(value) for value in log_probs]

    def load(self) -> EngineLoad:
        counts = list(self._waiting.values())
        return EngineLoad(running=sum(counts[:1]), waiting=sum(counts[1:]))

    async def abort(self, request_id: str) -> None:
        if request_id in self._waiting:
            self._aborted.add(request_id)

    # --- weights -----------------------------------------------------------------------------------
    async def pause(self) -> None:
        if not await asyncio.to_thread(self._boundary.close, PAUSE_LIMIT_S):
            raise EngineError(f"no token boundary was reached in {PAUSE_LIMIT_S:.0f} s")

    async def resume(self) -> None:
        if self._broken:
            raise EngineError(f"cannot resume with mixed weights: {self._broken}")
        self._boundary.open()

    async def fetch_weights(self, version: int, timeout_s: float) -> None:
        if self.settings.transfer is not None and self.settings.transfer.keep:
            await asyncio.to_thread(self._fetch, version, timeout_s)

    async def receive_weights(self, version: int, timeout_s: float) -> WeightReport:
        return await asyncio.to_thread(self._receive, version, timeout_s)

    def _fetch(self, version: int, timeout_s: float) -> None:
        began = time.monotonic()
        self._seconds = {}
        if self._channel is None:
            self._channel = self._join(version, timeout_s)
            self._seconds["join"] = time.monotonic() - began
        self._receiver = self._make_receiver(self._channel)
        try:
            self._receiver.fetch(version, began + timeout_s, self._mirror)
        except BaseException:
            self._leave()
            raise
        self._seconds["receive"] = time.monotonic() - began

    def _receive(self, version: int, timeout_s: float) -> WeightReport:
        if self._receiver is None or self._mirror.version != version:
            self._fetch(version, timeout_s)
        receiver, self._receiver = self._receiver, None
        assert receiver is not None
        began = time.monotonic()
        tensors = {name: tensor for bucket in self._mirror.buckets() for name, tensor in bucket}
        try:
            if self.settings.adapter is not None:
                self._apply_adapter(read_adapter(tensors, self._base), version)
            else:
                self._apply(tensors, version)
            receiver.finish(True, began + timeout_s)
        except BaseException:
            self._leave()
            raise
        self._seconds["finish"] = time.monotonic() - began
        self.version = version
        self._broken = ""
        return WeightReport(version, receiver.tensors, receiver.nbytes, self._seconds)

    def _leave(self) -> None:
        assert self._channel is not None
        self._channel.close()
        self._channel = self._receiver = None

    def _make_receiver(self, channel: Channel) -> Receiver:
        if self.settings.adapter is not None:  # it says itself what it must hold
            return Receiver(channel)
        folder = local_folder(self.settings.model, self.settings.revision)
        return Receiver(channel, checkpoint_names(folder), tied_names(folder))

    def _join(self, version: int, timeout_s: float) -> Channel:
        transfer = self.settings.transfer
        if transfer is None:
            raise EngineError("this engine was made without transfer settings")
        prefix = group_prefix(transfer.attempt, transfer.replica, transfer.incarnation, version)
        transport = load_transport(transfer.transport)
        channel: Channel = transport.join(transfer.bus_file, prefix, 0, 1, timeout_s)
        return channel

    @torch.inference_mode()
    def _apply(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """Replace the weights; a family whose file names differ from its modules' is converted first."""
        target = self._model.state_dict()
        if not tensors.keys() <= target.keys():
            tensors = self._converted(tensors)
        for name, tensor in tensors.items():
            if target[name].shape != tensor.shape:
                raise WeightTransferError(
                    f"{name} has shape {tuple(tensor.shape)}, the model {tuple(target[name].shape)}"
                )
        self._broken = f"the update to version {version} did not finish"
        for name, tensor in tensors.items():
            target[name].copy_(tensor)

    @torch.inference_mode()
    def _apply_adapter(self, layers: dict[str, Factors], version: int) -> None:
        """W + scale * B A over the weights as loaded, by the policy's own formula: the numbers of a merged
        push. Costs one copy of the adapted layers."""
        from hpc_rl.models.hf.lora import merge

        target = self._model.state_dict()
        for layer, factors in layers.items():
            shape = (factors.b.shape[0], factors.a.shape[1])
            weight = target.get(f"{layer}.weight")
            if weight is None or weight.shape != shape:
                raise WeightTransferError(f"the model has no layer {layer} of shape {list(shape)}")
            if layer not in self._loaded:
                self._loaded[layer] = weight.clone()
        self._broken = f"the update to version {version} did not finish"
        for layer, loaded in self._loaded.items():
            value = loaded
            if layer in layers:
                factors = layers[layer]
                value = merge(loaded, factors.a.to(loaded.device), factors.b.to(loaded.device), factors.scale)
            target[f"{layer}.weight"].copy_(value)

    def _converted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model = type(self._model).from_pretrained(
            None, config=self._model.config, state_dict=tensors, dtype=self._model.dtype
        )
        state: dict[str, torch.Tensor] = model.state_dict()
        return state


def processed_log_probs(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """fp32 log-softmax of logits / temperature over the kept tokens; -inf for those top-p removes.

    `logits` is [rows, vocab]. Temperature 0 (greedy) counts as 1.
    """
    scaled = logits if temperature == 0 else logits / temperature
    if top_p < 1.0:
        ordered, index = scaled.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # A token is kept while the mass before it is below top_p; the likeliest always is.
        removed = probs.cumsum(-1) - probs >= top_p
        removed[:, 0] = False
        scaled = scaled.masked_fill(removed.scatter(-1, index, removed), float("-inf"))
    return torch.log_softmax(scaled, -1)


def _draw(log_probs: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(log_probs.argmax())
    noise = torch.empty_like(log_probs).exponential_(generator=generator)
    return int((log_probs.exp() / noise).argmax())


def _append(sample: Sample, token: int, log_prob: float, version: int) -> None:
    end = len(sample.token_ids)
    sample.token_ids.append(token)
    sample.log_probs.append(log_prob)
    if sample.spans and sample.spans[-1].version == version:
        sample.spans[-1] = VersionSpan(version, sample.spans[-1].start, end + 1)
    else:
        sample.spans.append(VersionSpan(version, end, end + 1))


def _eos_ids(*values: int | list[int] | None) -> frozenset[int]:
    found: set[int] = set()
    for value in values:
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    return frozenset(found)
