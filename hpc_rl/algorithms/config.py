"""What a recipe may say under `algorithm:`. Torch-free; the implementations are the neighbours.

The defaults and where they are from: docs/losses.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hpc_rl.recipe.schema import NonNegative, Positive, Section

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length"]
_BOUNDS = {"icepop": (0.5, 5.0), "sequence_mask": (0.99, 1.01)}


class Correction(Section):
    """Off-policy correction by the sampler's recorded log-probs (docs/losses.md).

    `cap` is the largest weight of a token. `low` and `high` bound what `icepop` and `sequence_mask` leave in
    (null: 0.5 and 5 for tokens, 0.99 and 1.01 for the geometric mean of a sequence).
    """

    kind: Literal["tis", "icepop", "sequence_mask", "none"] = "tis"
    cap: float = Field(default=2.0, gt=0)
    low: Annotated[float, Field(ge=0)] | None = None
    high: Annotated[float, Field(gt=0)] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """What `icepop` and `sequence_mask` leave in."""
        low, high = _BOUNDS[self.kind]
        return (low if self.low is None else self.low, high if self.high is None else self.high)

    @model_validator(mode="after")
    def _bounds_belong_to_masks(self) -> Correction:
        if self.kind in _BOUNDS:
            low, high = self.bounds
            if low >= high:
                raise ValueError(f"low {low:g} must be less than high {high:g}: no token would be left")
        elif self.low is not None or self.high is not None:
            raise ValueError(
                f"low and high belong to kind icepop and sequence_mask; with kind {self.kind} leave them out"
            )
        return self


class RlConfig(Section, ABC):
    """What every algorithm on rollouts has. `max_staleness` is in policy versions; 0 is synchronous.

    With `drop_zero_variance` groups whose answers were scored the same are dropped, and further prompts are
    started for them: at most `max_refill` times the prompts of a step, then the step is smaller.
    `overlong_buffer`: from so many tokens before `rollout.max_tokens` on, the reward falls to one less at
    the end; null: a fifth of it, 0: not at all.
    """

    group_size: Positive = 8
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    kl_beta: float = Field(default=0.0, ge=0)
    kl_estimator: Literal["k1", "k2", "k3", "k3_k2"] | None = (
        None  # null: k3_k2 in the loss, k1 in the reward
    )
    kl_in: Literal["loss", "reward"] = "loss"
    max_staleness: NonNegative = 2
    # What the ratio is taken against (algorithms/core.py): the sampler's recorded log-probs, which
    # corrects and clips at once, or the trainer's own at the start of the step times a correction.
    proximal: Literal["sampler", "recompute", "interpolate"] = "sampler"
    correction: Correction = Correction()
    off_policy_mask: Annotated[float, Field(gt=0)] | None = None
    entropy_beta: float = Field(default=0.0, ge=0)
    positive_nll: float = Field(default=0.0, ge=0)
    loss_aggregation: Aggregation = "token_mean"
    loss_length: Positive | None = None
    drop_zero_variance: bool = False
    max_refill: float = Field(default=3.0, ge=0, le=1000)
    overlong_buffer: NonNegative | None = 0

    # Answers to a prompt that the advantages need.
    min_group: ClassVar[int] = 1
    # Answers come with the log-probs of the recipe's `teacher`.
    needs_teacher: ClassVar[bool] = False
    # With `kl_in: reward`, a token's penalty is that of itself and what follows, not that of the whole
    # answer.
    kl_to_go: ClassVar[bool] = False

    @property
    @abstractmethod
    def advantage(self) -> str:
        """Which of `algorithms.advantages.ESTIMATORS` the controller uses."""

    @model_validator(mode="before")
    @classmethod
    def _no_masks_of_the_vocabulary(cls, data: Any) -> Any:
        for key in ("top_k", "min_p"):
            if isinstance(data, dict) and key in data:
                raise ValueError(
                    f"{key} must be left out: engines renormalise log-probs within the words that it leaves "
                    "and the trainer does not, so that every ratio would be off by their mass"
                )
        return data

    @field_validator("top_p")
    @classmethod
    def _whole_vocabulary(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError(
                "must be 1.0: engines renormalise log-probs within the nucleus and the trainer does not, so "
                "that every ratio would be off by the mass of the nucleus"
            )
        return value

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks for the log-probs of `policy.reference`."""
        return self.kl_beta > 0

    @property
    def estimator(self) -> str:
        """`kl_estimator`, or the one for where the penalty is."""
        return self.kl_estimator or ("k3_k2" if self.kl_in == "loss" else "k1")

    @property
    def penalised_rewards(self) -> bool:
        """Whether the policy makes the advantages: of rewards less the KL, which the controller does not
        know."""
        return self.kl_beta > 0 and self.kl_in == "reward"

    @model_validator(mode="after")
    def _estimator_fits(self) -> RlConfig:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator must not be k1 in the loss, where its gradient is 0 on average and it would "
                "only add noise: use k3_k2 (the value of k3, the gradient of the KL), or kl_in: reward"
            )
        if self.kl_in == "reward" and self.kl_estimator == "k3_k2":
            raise ValueError(
                "kl_estimator k3_k2 differs from k3 in its gradient, and a reward has none: say k3"
            )
        return self

    @field_validator("group_size")
    @classmethod
    def _group_can_be_compared(cls, value: int) -> int:
        if value < cls.min_group:
            raise ValueError(
                f"must be at least {cls.min_group}: an answer's advantage is against the others of its prompt"
            )
        return value

    @model_validator(mode="after")
    def _correction_fits_proximal(self) -> RlConfig:
        if self.proximal == "sampler" and self.correction.kind == "none":
            raise ValueError(
                "correction.kind none needs proximal: recompute or interpolate "
                "(with proximal: sampler the ratio itself is the correction)"
            )
        return self

    @model_validator(mode="after")
    def _groups_can_differ(self) -> RlConfig:
        if self.drop_zero_variance and self.group_size == 1:
            raise ValueError("drop_zero_variance needs group_size of 2 or more: one answer differs from none")
        return self

    @model_validator(mode="after")
    def _refill_needs_drops(self) -> RlConfig:
        changed = self.max_refill != RlConfig.model_fields["max_refill"].default
        if changed and not self.drop_zero_variance:
            raise ValueError("max_refill belongs to drop_zero_variance: true (else no group is left out)")
        return self

    @model_validator(mode="after")
    def _length_belongs_to_constant_length(self) -> RlConfig:
        if self.loss_length is not None and self.loss_aggregation != "constant_length":
            raise ValueError(
                f"loss_length belongs to loss_aggregation: constant_length; with {self.loss_aggregation} "
                "leave it out"
            )
        return self


class GroupConfig(RlConfig):
    """Advantages within the prompt group, over its standard deviation or not (Dr. GRPO)."""

    normalize_std: bool = True

    @property
    def advantage(self) -> str:
        return "group_std" if self.normalize_std else "group_mean"


class Clip(RlConfig):
    """PPO's clip. `dual_clip` bounds the ratio where the advantage is negative; null: `correction.cap`."""

    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.2, ge=0)
    dual_clip: Annotated[float, Field(gt=1)] | None = None

    @property
    def floor(self) -> float:
        return self.correction.cap if self.dual_clip is None else self.dual_clip


class Truncation(RlConfig):
    """A ratio without gradient, of at most `is_cap`, as the weight of log p."""

    is_cap: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _cap_is_used(self) -> Truncation:
        used = self.proximal != "sampler"
        if not used and self.correction.cap != Correction.model_fields["cap"].default:
            raise ValueError("correction.cap does nothing with proximal: sampler; the weight's cap is is_cap")
        return self


class GrpoConfig(Clip, GroupConfig):
    """Group-relative policy optimisation."""


class DrGrpoConfig(Clip):
    """GRPO without what it divides by: no standard deviation, and a constant instead of each length."""

    min_group: ClassVar[int] = 2
    loss_aggregation: Literal["constant_length"] = "constant_length"

    @property
    def advantage(self) -> str:
        return "group_mean"


class DapoConfig(Clip, GroupConfig):
    """GRPO with a higher upper clip, a mean over tokens, only groups that teach, and shaped rewards."""

    min_group: ClassVar[int] = 2
    clip_high: float = Field(default=0.28, ge=0)
    drop_zero_variance: bool = True
    overlong_buffer: NonNegative | None = None


class GspoConfig(Clip, GroupConfig):
    """One ratio for a whole sequence, and clips as narrow as such a mean is."""

    min_group: ClassVar[int] = 2
    clip_low: float = Field(default=3e-4, ge=0, lt=1)
    clip_high: float = Field(default=4e-4, ge=0)
    loss_aggregation: Literal["sequence_mean"] = "sequence_mean"

    @field_validator("loss_aggregation", mode="before")
    @classmethod
    def _sequences_count_once(cls, value: object) -> object:
        if value != "sequence_mean":
            raise ValueError(
                "must be sequence_mean: the ratio is one of the whole sequence, and summing it over tokens "
                "would weigh sequences by their length, which is not GSPO"
            )
        return value


class CispoConfig(Truncation, GroupConfig):
    """A truncated weight instead of a clip: no token loses its gradient."""

    min_group: ClassVar[int] = 2
    is_cap: float = Field(default=5.0, gt=0)


class AipoConfig(Truncation, GroupConfig):
    """REINFORCE with the truncated ratio to the sampler."""

    min_group: ClassVar[int] = 2
    proximal: Literal["sampler"] = "sampler"


class RlooConfig(Truncation):
    """REINFORCE against the mean of the other answers; the log-prob of an answer is that of its sequence."""

    min_group: ClassVar[int] = 2
    proximal: Literal["sampler"] = "sampler"
    loss_aggregation: Aggregation = "sequence_sum"

    @property
    def advantage(self) -> str:
        return "rloo"


class ReinforcePpConfig(Clip):
    """Rewards whitened over the whole batch, no groups needed."""

    kl_to_go: ClassVar[bool] = True
    group_size: Positive = 1

    @property
    def advantage(self) -> str:
        return "batch_std"


class ReinforcePpBaselineConfig(Clip):
    """The group's mean as baseline, and the deviation of the whole batch."""

    kl_to_go: ClassVar[bool] = True
    min_group: ClassVar[int] = 2

    @property
    def advantage(self) -> str:
        return "group_mean_batch_std"


class MaxRlConfig(Clip):
    """Advantages over the group's mean: rare successes count most."""

    min_group: ClassVar[int] = 2

    @model_validator(mode="after")
    def _rewards_stay_positive(self) -> MaxRlConfig:
        if self.kl_in == "reward":
            raise ValueError(
                "kl_in must be loss with maxrl: it divides by rewards, which a penalty makes negative"
            )
        return self

    @property
    def advantage(self) -> str:
        return "maxrl"


class DistillConfig(Truncation, GroupConfig):
    """On-policy distillation: from the teacher's log-probs of the policy's answers, with rewards or not.

    `teacher_coef` weighs the teacher against the rewards' advantages.
    """

    group_size: Positive = 4
    teacher_coef: float = Field(default=1.0, gt=0)

    needs_teacher: ClassVar[bool] = True

    @field_validator("drop_zero_variance")
    @classmethod
    def _equal_rewards_teach_too(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be false: the teacher has something to say of answers with equal rewards")
        return value

    @field_validator("kl_in")
    @classmethod
    def _advantages_are_given(cls, value: str) -> str:
        if value == "reward":
            raise ValueError("must be loss: the advantages of distillation are of tokens, not of answers")
        return value


class SftConfig(Section):
    """Supervised fine-tuning: cross-entropy on completion tokens. No options yet."""

    needs_reference: ClassVar[bool] = False


class DpoConfig(Section):
    """Direct preference optimisation, on pairs of answers (docs/preference.md).

    `reference: false` compares the policy's own log-probs, and no second model is held.
    `length_normalize` takes means over an answer's tokens in place of sums (`ipo` always does). `gamma` is a
    margin that is asked for (with means and no reference: SimPO), `label_smoothing` the share of pairs that
    are labelled the wrong way round, `nll_weight` that of the log-likelihood of what was chosen.
    """

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    reference: bool = True
    length_normalize: bool = False
    gamma: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    nll_weight: float = Field(default=0.0, ge=0)

    @property
    def needs_reference(self) -> bool:
        return self.reference

    @model_validator(mode="after")
    def _options_do_something(self) -> DpoConfig:
        if self.label_smoothing > 0 and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss: sigmoid; with {self.loss} leave it out")
        if self.gamma > 0 and self.loss != "sigmoid":
            raise ValueError(f"gamma belongs to loss: sigmoid; {self.loss} has a margin of its own")
        if self.length_normalize and self.loss == "ipo":
            raise ValueError(
                "length_normalize belongs to sigmoid and hinge; ipo always takes means over tokens"
            )
        return self
