"""The teacher: log-probs of sampled tokens under another model, as the learner counts its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.bus import messages as m
from hpc_rl.recipe.schema import Model, Teacher
from hpc_rl.scoring.base import Failed, Halving, Job, ServedError, load_model, load_tokenizer, positions
from hpc_rl.scoring.forward import logits_at

_PART = "teacher"


class TeacherWork:
    """`Work` of the teacher group. Raises ServedError where the teacher's tokens are not the student's."""

    def __init__(self, teacher: Teacher, student: Model) -> None:
        from transformers import AutoModelForCausalLM

        theirs = load_tokenizer(teacher)
        ours = load_tokenizer(student, student.tokenizer)
        check_vocabulary(ours.get_vocab(), theirs.get_vocab(), teacher.path)
        self.batch_tokens = teacher.batch_tokens
        self.model = load_model(AutoModelForCausalLM, teacher)
        self._vocabulary = int(self.model.get_input_embeddings().num_embeddings)
        self._positions = positions(self.model)
        self._careful = Halving("teacher")

    def open(self, request: m.Message) -> Job:
        if not isinstance(request, m.ScoreTokens):
            raise TypeError(f"the teacher cannot answer {type(request).__name__}")
        row = [*request.prompt_ids, *request.token_ids]
        job = Job(request.number, request.reply_to, len(row))
        if self._positions is not None and len(row) > self._positions:
            job.errors[_PART] = f"{len(row)} tokens; the teacher's positions end at {self._positions}"
        elif not request.prompt_ids or max(row) >= self._vocabulary or min(row) < 0:
            job.errors[_PART] = (
                f"no prompt, or a token outside the teacher's vocabulary of {self._vocabulary}"
            )
        else:
            job.parts[_PART] = request
        return job

    def run(self, jobs: Sequence[Job]) -> list[m.Message]:
        ready = [index for index, job in enumerate(jobs) if _PART in job.parts]
        values = self._careful(self.log_probs, [jobs[index].parts[_PART] for index in ready])
        found = dict(zip(ready, values, strict=True))
        return [self._answer(job, found.get(index)) for index, job in enumerate(jobs)]

    @staticmethod
    def _answer(job: Job, value: list[float] | Failed | None) -> m.TokensScored:
        if isinstance(value, list):
            return m.TokensScored(job.number, value)
        words = job.errors[_PART] if value is None else value.words
        return m.TokensScored(job.number, error=f"teacher: {words}")

    @torch.inference_mode()
    def log_probs(self, asked: Sequence[m.ScoreTokens]) -> list[list[float]]:
        """Of each request's tokens: fp32 logits over its temperature, logsumexp."""
        found: list[list[float]] = [[] for _ in asked]
        places = [index for index, request in enumerate(asked) if request.token_ids]
        if not places:
            return found
        texts = [asked[index] for index in places]
        rows = [[*request.prompt_ids, *request.token_ids] for request in texts]
        # Logits at position t are about token t + 1.
        wanted = [range(len(r.prompt_ids) - 1, len(row) - 1) for r, row in zip(texts, rows, strict=True)]
        logits = logits_at(self.model, rows, wanted)
        parts = logits.split([len(request.token_ids) for request in texts])
        for index, request, part in zip(places, texts, parts, strict=True):
            targets = torch.tensor(request.token_ids, device=part.device)
            log_probs, _ = token_log_probs(part, targets, request.temperature)
            found[index] = log_probs.tolist()
        return found


def check_vocabulary(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> None:
    """Raises ServedError at the first of the student's tokens that is not the teacher's under that number."""
    different = [(number, token) for token, number in ours.items() if theirs.get(token) != number]
    if not different:
        return
    number, token = min(different)
    other = theirs.get(token)
    says = "does not have it" if other is None else f"has it as {other}"
    raise ServedError(
        f"teacher.path {path}: distillation needs the policy's own tokens, and {len(different)} of them "
        f"differ: token {number} is {token!r}, the teacher {says}; take a teacher of the same family"
    )
