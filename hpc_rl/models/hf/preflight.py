"""What the trainer would refuse of a model's adapters, frozen parts and splitting, found without weights.

For `check`, which runs it in a process of its own, since torch and Transformers take seconds to import:
`python -m hpc_rl.models.hf.preflight` reads `{"model": ..., "tp": ...}` of a recipe from stdin and writes
`{"error": ...}`, null if there is none, as its last line.
"""

from __future__ import annotations

import json
import logging
import sys

import torch

from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.hf import tensor_parallel
from hpc_rl.models.hf.classes import build_on_meta
from hpc_rl.models.hf.folder import model_folder
from hpc_rl.models.hf.freeze import choose_trained
from hpc_rl.recipe.schema import Model


def refusal(spec: Model, tp: int) -> str | None:
    """The message of the ModelError that building the model of `spec` would raise."""
    try:
        module, _ = build_on_meta(model_folder(spec.path, spec.revision), spec)
        choose_trained(module, spec.train, spec.freeze)
        if spec.lora is not None:
            from hpc_rl.models.hf import adapted  # PEFT takes seconds

            adapted.inject(module, spec, ParallelSpec(torch.device("cpu"), torch.float32, tp=tp))
        if tp > 1:
            tensor_parallel.check(module, tp)
    except ModelError as error:
        return str(error)
    return None


def main() -> None:
    logging.disable(logging.WARNING)
    asked = json.load(sys.stdin)
    print(json.dumps({"error": refusal(Model.model_validate(asked["model"]), asked["tp"])}))


if __name__ == "__main__":
    main()
