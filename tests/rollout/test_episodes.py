"""Episodes on a real engine: one sequence, sampled from and trained on, whatever the environment says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch

from hpc_rl.data.errors import DataError
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.rollout.dialogue import Dialogue
from hpc_rl.rollout.engine import EngineSettings, PromptError
from hpc_rl.rollout.engines.config import HfOptions
from hpc_rl.rollout.engines.hf import HfEngine
from hpc_rl.rollout.episodes import Episode, EpisodeRunner, turn_seed
from hpc_rl.rollout.prompts import PromptCodec
from hpc_rl.simulators.base import Result, SimulatorError, Slots, Task, Turn
from hpc_rl.simulators.config import TextConfig
from hpc_rl.types import Prompt, Sampling
from tests.data.chat_templates import ALL, CONTROL, make_tokenizer
from tests.tiny_models import save_model

pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]
SPEC = DatasetSpec(path="rows")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=400, seed=11)
PROMPT = Prompt(0, 0, 3, "what is two?", None)


class Asker:
    """A conversation of `turns` turns; what it asks next depends on what was said."""

    kind: Literal["text", "arrays"] = "text"
    slots = 3

    def __init__(self, turns: int, first: str = "", on_step: Callable[[], None] | None = None) -> None:
        self.tools: list[dict[str, Any]] = []
        self._turns, self._first, self._on_step = turns, first, on_step
        self._playing, self._count = Slots(self.slots), [0] * self.slots
        self.heard: list[Turn] = []

    async def start(self) -> None:
        pass

    async def reset(self, slots: Sequence[int], tasks: Sequence[Task], seeds: Sequence[int]) -> list[Any]:
        self._playing.begin(slots)
        for slot in slots:
            self._count[slot] = 0
        return [
            [{"role": "user", "content": f"{self._first} {seed}"}] if self._first else [] for seed in seeds
        ]

    async def step(self, slots: Sequence[int], actions: Sequence[Turn]) -> list[Result]:
        self._playing.require(slots)
        (slot,), (turn,) = slots, actions
        if turn.text == "":
            raise SimulatorError("nothing was said")
        self.heard.append(turn)
        self._count[slot] += 1
        if self._on_step is not None:
            self._on_step()
        said = [{"role": "user", "content": f"more than {len(turn.text)}<|im_end|>?"}]
        return [Result(said, 0.5 * self._count[slot], self._count[slot] == self._turns, {"asked": 1.0})]

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> HfEngine:
    """Random weights; every control token ends a turn, so that turns are of about 25 tokens."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(ALL["qwen3"])
    ends = tokenizer.convert_tokens_to_ids(list(CONTROL))
    save_model(folder, "qwen3", 0, vocab_size=len(tokenizer), eos_token_id=ends, bos_token_id=1)
    tokenizer.save_pretrained(folder)
    options = HfOptions(device="cpu", threads=1)
    made = HfEngine(EngineSettings(str(folder), options, dtype="float32", max_model_len=500))
    asyncio.run(made.start())
    return made


def play(
    engine: HfEngine,
    asker: Asker,
    sampling: Sampling = SAMPLING,
    count: int = 2,
    prompt: Prompt = PROMPT,
    **config: Any,
) -> list[Episode]:
    codec = PromptCodec.load(engine.settings.model, None, False)
    runner = EpisodeRunner(engine, asker, Dialogue(codec, asker.tools), TextConfig(**config))
    return asyncio.run(runner.play(prompt, SPEC, sampling, count, "r"))


def test_the_sequence_is_what_was_sampled_from(engine: HfEngine) -> None:
    """Log-probs of a whole pass over the sequence are those of the sampler, token by token; masks, spans,
    ends and rewards fit it."""
    asker = Asker(3)
    codec = PromptCodec.load(engine.settings.model, None, False)
    for number, episode in enumerate(play(engine, asker, count=4)):  # more than there are slots
        whole = episode.sample
        size = len(whole.token_ids)
        assert whole.finish == "stop"
        assert len(whole.log_probs) == len(episode.loss_mask) == size
        assert len(episode.turn_ends) == 3
        assert episode.turn_ends[-1] == size
        assert episode.turn_rewards == [0.5, 1.0, 1.5]
        assert episode.metrics == {"turns": 3.0, "asked": 3.0}
        exact = asyncio.run(engine.score(episode.prompt_ids + whole.token_ids))[len(episode.prompt_ids) - 1 :]
        for written, sampled, scored in zip(episode.loss_mask, whole.log_probs, exact, strict=True):
            assert sampled == (pytest.approx(scored, abs=1e-5) if written else 0.0)
        runs = [0, *episode.turn_ends]
        said = [episode.loss_mask[a:b] for a, b in pairwise(runs)]
        assert said[0] == [1] * len(said[0])
        for part in said[1:]:
            first = part.index(1)
            assert first > 0  # what the environment said, then the turn
            assert part == [0] * first + [1] * (len(part) - first)
        assert episode.answer_ids == whole.token_ids[-sum(said[2]) :]
        assert whole.spans[0].start == 0
        assert whole.spans[-1].end == size
        text = codec.tokenizer.decode(whole.token_ids)
        assert text.count("<|im_start|>user\nmore than") == 2, number
        assert "?<|im_end|>\n<|im_start|>assistant\n" in text  # its own end; the one it printed is gone


def test_the_same_seed_plays_the_same_and_samples_differ(engine: HfEngine) -> None:
    first, again = play(engine, Asker(3)), play(engine, Asker(3))
    assert [e.sample.token_ids for e in first] == [e.sample.token_ids for e in again]
    assert first[0].sample.token_ids != first[1].sample.token_ids
    alone = play(engine, Asker(3), Sampling(1.0, 1.0, 400, seed=12), count=1)
    assert alone[0].sample.token_ids == first[1].sample.token_ids  # sample i of seed s is sample 0 of s + i
    codec = PromptCodec.load(engine.settings.model, None, False)
    ids = codec.encode(PROMPT.content, SPEC)
    single = asyncio.run(engine.generate(ids, SAMPLING, 1, "single"))[0]
    assert single.token_ids == first[0].sample.token_ids[: first[0].turn_ends[0]]
    assert len({turn_seed(seed, turn) for seed in range(8) for turn in range(5)}) == 40
    assert all(0 <= turn_seed(2**31, turn) < 2**32 for turn in range(5))


def test_weights_that_change_between_turns_are_in_the_spans(engine: HfEngine) -> None:
    def push() -> None:
        engine.version += 1

    try:
        (episode,) = play(engine, Asker(3, on_step=push), count=1)
    finally:
        engine.version = 0
    whole, ends = episode.sample, episode.turn_ends
    assert [span.version for span in whole.spans] == [0, 1, 2]
    # The environment's words count to the turn before them.
    starts = [whole.spans[i].end for i in range(3)]
    assert starts[2] == len(whole.token_ids)
    for number in range(2):
        assert starts[number] > ends[number]
        assert episode.loss_mask[ends[number] : starts[number]] == [0] * (starts[number] - ends[number])
        assert episode.loss_mask[starts[number]] == 1
        assert whole.spans[number + 1].start == starts[number]


def test_bounds_end_an_episode(engine: HfEngine) -> None:
    """Of turns, of tokens in a turn and in the whole, and of the model's length."""
    asker = Asker(9)
    (of_turns,) = play(engine, asker, count=1, max_turns=2)
    assert (of_turns.sample.finish, len(of_turns.turn_ends)) == ("length", 2)
    assert of_turns.metrics == {"turns": 2.0, "asked": 2.0, "out_of_turns": 1.0}
    assert len(of_turns.sample.token_ids) == of_turns.turn_ends[-1]  # no words that nobody would answer
    asker = Asker(9)
    (cut,) = play(engine, asker, count=1, max_turn_tokens=2)
    assert (cut.sample.finish, cut.turn_ends, asker.heard[0].finish) == ("length", [2], "length")
    for limit in (20, 45, 60, 90):
        (whole,) = play(engine, Asker(9), Sampling(1.0, 1.0, limit, seed=11), count=1, max_turns=9)
        assert len(whole.sample.token_ids) <= limit
        assert whole.sample.finish == "length"
        assert whole.loss_mask[-1] == 1
    (full,) = play(engine, Asker(99), Sampling(1.0, 1.0, 10_000, seed=11), count=1, max_turns=99)
    assert 400 < len(full.prompt_ids) + len(full.sample.token_ids) <= 500
    with pytest.raises(PromptError, match="max_model_len"):
        play(engine, Asker(9), count=1, prompt=Prompt(0, 0, 0, "two " * 600))


def test_what_an_environment_shows_first_is_in_the_prompt(engine: HfEngine) -> None:
    episodes = play(engine, Asker(1, first="look at"), count=2)
    codec = PromptCodec.load(engine.settings.model, None, False)
    for number, episode in enumerate(episodes):
        text = codec.tokenizer.decode(episode.prompt_ids)
        assert text.endswith(
            "what is two?<|im_end|>\n<|im_start|>user\n"
            f"look at {11 + number}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_a_lost_environment_ends_the_group_and_frees_its_slots(engine: HfEngine) -> None:
    class Lost(Asker):
        async def step(self, slots: Sequence[int], actions: Sequence[Turn]) -> list[Result]:
            if self._turns == 0:
                raise SimulatorError("the simulator is gone")
            return await super().step(slots, actions)

    codec = PromptCodec.load(engine.settings.model, None, False)
    lost = Lost(0)
    runner = EpisodeRunner(engine, lost, Dialogue(codec, []), TextConfig())

    async def twice() -> list[Episode]:
        with pytest.raises(SimulatorError, match="is gone"):
            await runner.play(PROMPT, SPEC, SAMPLING, 5, "a")
        lost._turns = 1
        return await runner.play(PROMPT, SPEC, SAMPLING, 5, "b")

    assert len(asyncio.run(twice())) == 5


@pytest.mark.parametrize("family", ["llama3", "phi4", "qwen3", "gemma", "phi3", "harmony"])
def test_ids_are_those_of_the_whole_conversation(family: str) -> None:
    """Where nothing of the history is rewritten, prompt + turn + observation are the ids of one rendering."""
    tokenizer = make_tokenizer(ALL[family])
    codec = PromptCodec(tokenizer)
    dialogue = Dialogue(codec, [])
    question, answer = "what is two and two?", "the answer is four"
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>", "harmony": "<|end|>"}
    turn = tokenizer(answer + end.get(family, "<|im_end|>"), add_special_tokens=False).input_ids
    more = [{"role": "user", "content": "and three?"}]
    history = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *more]
    whole = codec.encode(history, SPEC)
    start = whole.index(turn[0], len(codec.encode(question, SPEC)))
    for written in (turn, turn[:-1]):  # with the token that ends it, and where a stop string did
        ids = written + dialogue.observation_ids(more, written)
        assert ids == whole[start:]
    assert dialogue.turn_text(turn) == answer
    assert dialogue.prompt_ids(question, [], SPEC) == codec.encode(question, SPEC)


def test_a_template_whose_turns_end_by_the_next_role() -> None:
    """GLM's way: the role's token is what the policy stops at, and is neither doubled nor lost."""
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    tokenizer = make_tokenizer(source + "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    dialogue = Dialogue(PromptCodec(tokenizer), [])
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    answer = tokenizer("four", add_special_tokens=False).input_ids
    more = [{"role": "user", "content": "and"}]
    said = [*tokenizer("and", add_special_tokens=False).input_ids, assistant]
    assert dialogue.observation_ids(more, answer) == [user, *said]
    assert dialogue.observation_ids(more, [*answer, user]) == said
    assert dialogue.observation_ids(more, [*answer, tokenizer.eos_token_id]) == [user, *said]


def test_tokenizers_without_a_template_are_refused() -> None:
    with pytest.raises(DataError, match="need a tokenizer with a chat template"):
        Dialogue(PromptCodec(make_tokenizer(None)), [])
