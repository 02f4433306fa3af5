"""What a recipe may say of an algorithm."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hpc_rl.algorithms.config import GrpoConfig


def test_top_p_is_refused_because_the_ratio_would_be_biased() -> None:
    assert GrpoConfig().top_p == 1.0
    with pytest.raises(ValidationError, match=r"must be 1\.0: engines renormalise"):
        GrpoConfig(top_p=0.95)
