"""The real command line in a subprocess, and a model folder that is whole as far as checks can see."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import yaml

ROOT = Path(__file__).resolve().parents[2]


def environment(home: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    """This environment with a home of its own, and outside of any Slurm job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    own = {"PYTHONPATH": str(ROOT), "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    return {**kept, **own, **(env or {})}


def hpc_rl(
    *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run `hpc-rl ARGUMENTS` in a new process, as a shell would."""
    return subprocess.run(
        [sys.executable, "-m", "hpc_rl.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=environment(cwd, env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def hpc_rl_forked(
    *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same in a fork of this process: a process of its own, without the second that imports take."""
    import hpc_rl.cli._checks
    import hpc_rl.cli.submit  # noqa: F401
    from hpc_rl.cli.main import main

    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(main, words, cwd, env, out.fileno(), err.fileno())
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def _child(
    main: Callable[[list[str]], None],
    words: list[str],
    cwd: Path,
    env: dict[str, str] | None,
    out: int,
    err: int,
) -> NoReturn:
    code: object = 1
    try:
        signal.alarm(60)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.clear()
        os.environ.update(environment(cwd, env))
        os.chdir(cwd)
        main(words)
        code = 0
    except SystemExit as leave:
        code = leave.code
    except BaseException:  # noqa: BLE001  (a fork must never return into pytest)
        traceback.print_exc()  # what the interpreter would print
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def make_model(folder: Path, *, heads: int = 4) -> Path:
    """A model folder of a few bytes: real config, tokenizer and safetensors header, no sense."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": 2,
        "vocab_size": 32,
        "max_position_embeddings": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return folder


def make_recipe(folder: Path, **changes: object) -> Path:
    """A valid SFT recipe under `folder` that runs on this machine; `changes` replace whole sections."""
    make_model(folder / "model")
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict = {
        "name": "tiny",
        "kind": "sft",
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": {"path": str(folder / "train.jsonl"), "prompt": "question", "answer": "answer"}},
        "policy": {"batch_size": 4, "steps": 2, "micro_batch_tokens": 64},
        "logging": {"wandb": {"mode": "off"}},
        "cluster": {"site": "local"},
    }
    recipe.update(changes)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def line_of(path: Path, key: str) -> int:
    """The line of the first occurrence of `key:` in a YAML file."""
    lines = path.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))
