"""What travels between processes: prompts, trajectories, version spans, blob references.

Every type here is a `msgspec.Struct`: it encodes to msgpack, decodes with a type check, and
imports neither torch nor numpy, so the command line and the controller stay light.
"""

from hpc_rl.types.load import EngineLoad
from hpc_rl.types.trajectory import (
    BlobRef,
    Prompt,
    PromptGroup,
    Sampling,
    TrainSample,
    Trajectory,
    VersionSpan,
)

__all__ = [
    "BlobRef",
    "EngineLoad",
    "Prompt",
    "PromptGroup",
    "Sampling",
    "TrainSample",
    "Trajectory",
    "VersionSpan",
]
