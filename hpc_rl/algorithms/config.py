"""What a recipe may say under `algorithm:`. Torch-free; the implementations are the neighbours."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from hpc_rl.recipe.schema import NonNegative, Positive, Section


class Correction(Section):
    """Off-policy correction by the sampler's recorded log-probs: truncated importance sampling."""

    kind: Literal["tis", "none"] = "tis"
    cap: float = Field(default=2.0, gt=0)


class GrpoConfig(Section):
    """Group-relative policy optimisation. `max_staleness` is in policy versions; 0 is synchronous."""

    group_size: Positive = 8
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.2, ge=0)
    kl_beta: float = Field(default=0.0, ge=0)
    max_staleness: NonNegative = 2
    # What the ratio is taken against (algorithms/grpo.py): the sampler's recorded log-probs, which
    # corrects and clips at once, or the trainer's own at the start of the step times a correction.
    proximal: Literal["sampler", "recompute"] = "sampler"
    correction: Correction = Correction()
    loss_aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    normalize_std: bool = True

    @field_validator("top_p")
    @classmethod
    def _whole_vocabulary(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError(
                "must be 1.0: engines renormalise log-probs within the nucleus and the trainer does not, so "
                "that every ratio would be off by the mass of the nucleus"
            )
        return value

    @model_validator(mode="after")
    def _correction_fits_proximal(self) -> GrpoConfig:
        if self.proximal == "sampler" and self.correction.kind == "none":
            raise ValueError(
                "correction.kind none needs proximal: recompute "
                "(with proximal: sampler the ratio itself is the correction)"
            )
        return self


class SftConfig(Section):
    """Supervised fine-tuning: cross-entropy on completion tokens. No options yet."""
