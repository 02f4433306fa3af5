"""What vLLM samples from each of several models, as JSON: run as a program, with vLLM imported once.

    python -m tests.models.vllm_samples JOBS.json

JOBS.json is a list of `{family, folder, prompt_ids | prompt and images, out}`; with `adapter`, a file that
holds the push of one, it samples twice, then with the adapter. Each model runs in a fork of its own: an
engine cannot be unloaded, and importing vLLM costs more than a tiny model.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

TOKENS, LIMIT = 20, 128


def sample(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from tests.tiny_vlms import picture

    prompt: dict[str, Any] = {"prompt_token_ids": job.get("prompt_ids")}
    images = job.get("images", [])
    if images:
        prompt = {"prompt": job["prompt"], "multi_modal_data": {"image": [picture(*i) for i in images]}}
    llm = LLM(
        job["folder"],
        skip_tokenizer_init=not images,
        dtype="float32",
        enforce_eager=True,
        max_model_len=LIMIT,
        max_num_seqs=2,
        max_num_batched_tokens=LIMIT,
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": len(images)} if images else None,
        disable_log_stats=True,
        **(adapters(job["folder"]) if "adapter" in job else {}),
    )
    params = SamplingParams(
        max_tokens=TOKENS, temperature=1.0, seed=1, logprobs=0, ignore_eos=True, detokenize=False
    )
    answer = answered(llm.generate([prompt], params, use_tqdm=False))
    if "adapter" in job:
        from hpc_rl.weights.adapter import read_adapter
        from hpc_rl.weights.vllm_adapter import REQUEST, install

        layers = read_adapter(load_file(job["adapter"]), job["base"])
        llm.collective_rpc("add_blank_adapter")
        llm.apply_model(lambda model: install(model, layers))
        answer["adapted"] = answered(llm.generate([prompt], params, use_tqdm=False, lora_request=REQUEST))
    return answer


def adapters(folder: str) -> dict[str, Any]:
    from hpc_rl.rollout.engine import AdapterShape, EngineSettings
    from hpc_rl.rollout.engines.vllm import adapter_arguments

    return adapter_arguments(EngineSettings(folder, None), AdapterShape(rank=8))


def answered(outputs: list[Any]) -> dict[str, Any]:
    (output,) = outputs
    made = output.outputs[0]
    log_probs = [entry[token].logprob for entry, token in zip(made.logprobs, made.token_ids, strict=True)]
    return {"prompt_ids": output.prompt_token_ids, "token_ids": list(made.token_ids), "log_probs": log_probs}


def main() -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    import vllm  # noqa: F401  # once, for all forks

    for job in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            answer = sample(job)
        except BaseException:  # noqa: BLE001 -- the test of this family shows it
            answer = {"error": traceback.format_exc()}
        Path(job["out"]).write_text(json.dumps(answer))
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
