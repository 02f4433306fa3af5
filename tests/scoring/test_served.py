"""What reward models, judges and teachers say: plain Transformers' numbers, in any batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from hpc_rl.bus import messages as m
from hpc_rl.recipe.schema import Model, Teacher
from hpc_rl.rewards.model import ModelConfig
from hpc_rl.scoring.base import FAILURES, ScoringError, ServedError
from hpc_rl.scoring.classifier import Classifier
from hpc_rl.scoring.forward import logits_at
from hpc_rl.scoring.judge import Judge
from hpc_rl.scoring.model import make
from hpc_rl.scoring.rewards import RewardWork
from hpc_rl.scoring.server import choose
from hpc_rl.scoring.tokens import TeacherWork, check_vocabulary
from tests.scoring.models import save_causal, save_classifier
from tests.tiny_models import EOS, save_model

pytestmark = [pytest.mark.torch]
torch.set_num_threads(1)
TOLERANCE = 1e-5


def asked(number: int, response: str, prompt: str = "w20 w21", **more: Any) -> m.ScoreAnswer:
    chat = [{"role": "system", "content": "w30"}, {"role": "user", "content": prompt}]
    return m.ScoreAnswer(number, "here", chat, prompt, response, **more)


def responses(count: int) -> list[str]:
    return [" ".join(f"w{40 + (7 * i + j) % 60}" for j in range(1 + 5 * i % 17)) for i in range(count)]


@pytest.mark.parametrize(("family", "pad"), [("qwen3", None), ("qwen3", EOS), ("llama", 2)])
def test_a_classifier_says_what_transformers_says_of_one_chat(
    tmp_path: Path, family: str, pad: int | None
) -> None:
    """Without a padding token Transformers takes one row at a time; here rows of any length go together."""
    folder = save_classifier(tmp_path, family=family, pad=pad)
    served = make(ModelConfig(path=str(folder), dtype="float32"))
    requests = [asked(i, text) for i, text in enumerate(responses(6))]
    together = served.score([served.open(request)[0] for request in requests])
    plain = T.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    expected = []
    for request in requests:
        chat = [*request.conversation, {"role": "assistant", "content": request.response}]
        ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.convert_tokens_to_ids("w11")  # the system message is in it
        expected.append(plain(ids).logits[0, 0].item())
    assert max(expected) - min(expected) > 0.01
    assert together == pytest.approx(expected, abs=TOLERANCE)
    assert [served.score([served.open(r)[0]])[0] for r in requests] == pytest.approx(expected, abs=TOLERANCE)


def test_a_classifier_of_pairs_and_of_several_outputs(tmp_path: Path) -> None:
    """BERT has no chat template and counts which text a token is from; one of its outputs is the reward."""
    config = T.BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    T.BertForSequenceClassification(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(100))]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    T.BertTokenizer(str(vocabulary)).save_pretrained(tmp_path)
    with pytest.raises(ServedError, match=r"3 outputs .* say which is the reward: label"):
        Classifier(ModelConfig(path=str(tmp_path), dtype="float32"))
    served = Classifier(ModelConfig(path=str(tmp_path), dtype="float32", label=2))
    requests = [asked(i, text) for i, text in enumerate(responses(4))]
    together = served.score([served.open(request)[0] for request in requests])
    plain = T.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = T.AutoTokenizer.from_pretrained(tmp_path)
    rows = [tokenizer(r.prompt, r.response, return_tensors="pt") for r in requests]
    assert rows[0]["token_type_ids"].max() == 1
    assert together == pytest.approx([plain(**row).logits[0, 2].item() for row in rows], abs=TOLERANCE)


def test_what_is_too_long_is_an_error_of_that_answer(tmp_path: Path) -> None:
    served = make(ModelConfig(path=str(save_classifier(tmp_path)), dtype="float32", max_length=12))
    work = RewardWork({"model": served})
    jobs = [work.open(asked(1, "w50")), work.open(asked(2, "w50 " * 20))]
    one, two = work.run(jobs)
    assert isinstance(one, m.AnswerScored) and isinstance(two, m.AnswerScored)
    assert list(one.scores) == ["model"] and one.errors == {}
    assert two.scores == {}
    assert "the chat has 29 tokens; the reward model takes 12" in two.errors["model"]


def judge(folder: Path, **options: Any) -> Judge:
    settings = {"dtype": "float32", "template": "{prompt} w90 {response}", **options}
    return Judge(ModelConfig(path=str(folder), kind="judge", **settings))


def test_a_judge_replies_in_a_batch_as_it_does_alone(tmp_path: Path) -> None:
    folder = save_causal(tmp_path)
    served = judge(folder, max_tokens=6, pattern=r"w(\d+)", system="w31")
    requests = [asked(i, text) for i, text in enumerate(responses(5))]
    parts = [served.open(request)[0] for request in requests]
    replies = served.replies([part.ids for part in parts])
    plain = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    for request, reply in zip(requests, replies, strict=True):
        text = f"{request.prompt} w90 {request.response}"
        chat = [{"role": "system", "content": "w31"}, {"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        out = plain.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=EOS)[0, ids.shape[1] :]
        assert reply == tokenizer.decode(out, skip_special_tokens=True)
    assert len(set(replies)) > 1
    assert served.score(parts) == [float(reply.split()[-1].removeprefix("w")) for reply in replies]


def test_a_reply_without_a_number_is_no_score(tmp_path: Path) -> None:
    work = RewardWork({"model": judge(save_causal(tmp_path), max_tokens=2)})  # it never says Score:
    (answer,) = work.run([work.open(asked(1, "w50"))])
    assert isinstance(answer, m.AnswerScored)
    assert answer.scores == {}
    assert answer.errors == {"model": "reward 'model' gave nan, which is no score"}


def test_yes_or_no_by_log_probs(tmp_path: Path) -> None:
    folder = save_causal(tmp_path)
    requests = [asked(i, text) for i, text in enumerate(responses(5))]
    odds = judge(folder, value="log_odds", yes="w60", no="w61")
    found = odds.score([odds.open(request)[0] for request in requests])
    plain = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for request in requests:
        ids = torch.tensor([odds.open(request)[0].ids])
        log_probs = torch.log_softmax(plain(ids).logits[0, -1], -1)
        expected.append((log_probs[64] - log_probs[65]).item())  # w60 is token 64
    assert found == pytest.approx(expected, abs=TOLERANCE)
    shares = judge(folder, value="probability", yes="w60", no="w61")
    probabilities = shares.score([shares.open(request)[0] for request in requests])
    assert probabilities == pytest.approx([1 / (1 + math.exp(-x)) for x in expected], abs=TOLERANCE)
    with pytest.raises(ServedError, match="with the same token"):
        judge(folder, value="log_odds", yes="w60 w1", no="w60")


def test_a_column_that_the_row_lacks_is_named(tmp_path: Path) -> None:
    served = judge(save_causal(tmp_path), template="{response} {rubric}", max_tokens=2)
    assert served.open(asked(1, "w50", fields={"rubric": "w70"}))[1] == len(["w12", 1, 2, "w11", "w13"]) + 2
    with pytest.raises(ScoringError, match="names 'rubric', which the row lacks"):
        served.open(asked(1, "w50"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherWork:
    folder = save_causal(tmp_path_factory.mktemp("teacher"), seed=1)
    student = Model(path=str(save_causal(tmp_path_factory.mktemp("student"), seed=2)))
    return TeacherWork(Teacher(path=str(folder), dtype="float32"), student)


def tokens(number: int, answer: list[int], temperature: float = 1.0) -> m.ScoreTokens:
    return m.ScoreTokens(number, "here", [5, 6, 7 + number], answer, temperature)


def test_the_teachers_log_probs_are_those_of_transformers(teacher: TeacherWork) -> None:
    asked = [
        tokens(1, [20, 21, 22, 23]),
        tokens(1, [33], 0.7),  # two replicas may use the same number
        tokens(2, []),
        tokens(3, [40 + i for i in range(11)], 1.3),
    ]
    together = teacher.run([teacher.open(request) for request in asked])
    for request, answer in zip(asked, together, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *request.token_ids]])
        logits = teacher.model(ids).logits[0].float() / request.temperature
        log_probs = torch.log_softmax(logits, -1)[len(request.prompt_ids) - 1 : -1]
        expected = log_probs.gather(1, torch.tensor(request.token_ids, dtype=torch.long).unsqueeze(1))
        assert isinstance(answer, m.TokensScored)
        assert (answer.number, answer.error) == (request.number, "")
        assert answer.log_probs == pytest.approx(expected.flatten().tolist(), abs=TOLERANCE)
        (alone,) = teacher.run([teacher.open(request)])
        assert isinstance(alone, m.TokensScored)
        assert alone.log_probs == pytest.approx(answer.log_probs, abs=TOLERANCE)


@pytest.mark.parametrize("family", ["gemma2", "llama_tied"])
def test_logits_of_some_positions_are_the_models_own(tmp_path: Path, family: str) -> None:
    """Also where a family caps them after its output layer."""
    plain = T.AutoModelForCausalLM.from_pretrained(save_model(tmp_path, family)).eval()
    rows = [[4, 5, 6, 7, 8], [9, 10, 11]]
    found = logits_at(plain, rows, [range(1, 4), range(2, 3)])
    with torch.no_grad():
        one, two = (plain(torch.tensor([row])).logits[0] for row in rows)
    assert torch.allclose(found, torch.cat([one[1:4], two[2:3]]), atol=TOLERANCE, rtol=0)


def test_what_the_teacher_cannot_score_costs_itself(teacher: TeacherWork) -> None:
    bad, good = teacher.run([teacher.open(tokens(1, [9999])), teacher.open(tokens(2, [3]))])
    assert isinstance(bad, m.TokensScored) and isinstance(good, m.TokensScored)
    assert "outside the teacher's vocabulary of 512" in bad.error
    assert len(good.log_probs) == 1


def test_a_teacher_with_other_tokens_is_refused() -> None:
    check_vocabulary({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}, "t")  # it may have more
    with pytest.raises(ServedError, match="1 of them differ: token 1 is 'b', the teacher has it as 5"):
        check_vocabulary({"a": 0, "b": 1}, {"a": 0, "b": 5}, "t")


class Picky:
    """A served reward that fails for some answers (a plugin's)."""

    batch_tokens = 100

    def __init__(self) -> None:
        self.batches: list[int] = []

    def open(self, request: m.ScoreAnswer) -> tuple[str, int]:
        return request.response, 1

    def score(self, parts: list[str]) -> list[float]:
        self.batches.append(len(parts))
        if any("bad" in part for part in parts):
            raise RuntimeError("I do not like it")
        return [float(len(part)) for part in parts]


def test_an_answer_that_a_model_fails_for_costs_itself_alone() -> None:
    picky = Picky()
    work = RewardWork({"picky": picky})
    texts = ["a", "aa", "bad", "aaaa", "a", "a", "a", "a"]
    answers = work.run([work.open(asked(i, text)) for i, text in enumerate(texts)])
    scores = [answer.scores.get("picky") for answer in answers if isinstance(answer, m.AnswerScored)]
    assert scores == [1.0, 2.0, None, 4.0, 1.0, 1.0, 1.0, 1.0]
    assert picky.batches == [8, 4, 2, 2, 1, 1, 4]
    lost = answers[2]
    assert isinstance(lost, m.AnswerScored)
    assert lost.errors == {"picky": "reward 'picky': RuntimeError: I do not like it"}


def test_when_nothing_works_any_more_the_process_ends() -> None:
    work = RewardWork({"picky": Picky()})
    with pytest.raises(RuntimeError, match="I do not like it"):
        work.run([work.open(asked(i, "bad")) for i in range(FAILURES)])


def test_a_batch_has_the_oldest_and_what_is_as_long() -> None:
    teacher_like = [_job(n) for n in (100, 7, 96, 101, 8, 90, 400)]
    assert choose(teacher_like, 404) == [0, 2, 3, 5]
    assert choose(teacher_like[1:], 24) == [0, 3]
    assert choose([_job(5000), _job(1)], 1000) == [0]  # longer than a batch: alone
    assert choose([_job(10)] * 5, 1000) == [0, 1, 2, 3, 4]


def _job(length: int) -> Any:
    from hpc_rl.scoring.base import Job

    return Job(1, "here", length)
