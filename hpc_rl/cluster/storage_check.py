"""Whether what a run will write fits: free space, quota and inodes of `output_root`, said before the queue.

A checkpoint holds fp32 weights, optimizer state and averages once (however many ranks write it); `max_keep`
of them stay, one more is in writing, and the best one may be kept besides. Exports come on top.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.cluster.findings import Finding, place
from hpc_rl.plan.schema import Plan
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.reference_model import reference_mode
from hpc_rl.recipe.schema import Recipe

GIB = 2**30
ASK_LIMIT_S = 5.0
STRIPE_ABOVE = 16 * GIB  # a single file larger than this is worth more than one storage target
_EXPORT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SMALL_FILES = 200  # metadata, controller state, logs: whatever is not one file per rank

Ask = Callable[[list[str]], str]


@dataclass(frozen=True)
class Needs:
    """Bytes and files of a run on disk at its largest; `checkpoint` and `rank_file` are of one save."""

    checkpoint: int
    rank_file: int
    total: int
    files: int
    words: str


@dataclass(frozen=True)
class Limit:
    """What is left, of bytes or of files, and who says so."""

    kind: str  # "bytes" | "files"
    left: int
    source: str


def needs(recipe: Recipe, plan: Plan) -> Needs | None:
    """None where the model's size or the number of steps that matters is not known."""
    memory, mesh, options = plan.memory, plan.mesh, recipe.checkpoint
    if memory is None or mesh is None:
        return None
    shards = mesh.dp_shard * mesh.cp * mesh.tp * mesh.pp
    copies = memory.ema_gb
    if reference_mode(recipe) == "full" and recipe.policy.reference.reset_every is not None:
        copies += memory.gradients_gb  # what is trained, as the reference has it
    rank_file = int((memory.weights_gb + memory.optimizer_gb + copies) * GIB)
    checkpoint, kept, words = rank_file * shards, 0, []
    # Epochs are steps only when the rows are counted: then as many checkpoints as a long run keeps.
    saves = None if plan.total_steps is None else plan.total_steps // options.save_every + 1
    if options.enabled:
        best = options.keep_best and (recipe.data.eval is not None or bool(recipe.data.holdout))
        most = max(1, options.max_keep) + 1 + best
        if options.max_keep < 0 and saves is None:
            return None
        if saves is None:
            kept = most
        else:
            kept = saves if options.max_keep < 0 else min(saves, most)
        words.append(f"{kept} checkpoint(s) of {_gib(checkpoint)}")
    exports = 0 if options.export == "off" else 1
    every = options.export == "all" and options.enabled
    exports += saves if every and saves is not None else 0
    export = memory.parameters * _EXPORT_BYTES[recipe.model.dtype]
    if exports:
        more = " (more with every checkpoint)" if every and saves is None else ""
        words.append(f"{exports} export(s) of {_gib(export)}{more}")
    files = kept * (mesh.world_size + 6) + exports * (20 + export // 4_000_000_000) + _SMALL_FILES
    return Needs(checkpoint, rank_file, kept * checkpoint + exports * export, files, " and ".join(words))


def check_storage(
    loaded: LoadedRecipe,
    plan: Plan,
    recipe: Recipe,
    *,
    which: Callable[[str], str | None] = shutil.which,
    ask: Ask | None = None,
    mounts: Path = Path("/proc/mounts"),
) -> list[Finding]:
    """An error where not even one checkpoint fits, a warning where not all do."""
    folder = _existing(Path(recipe.output_root).expanduser())
    wanted = needs(recipe, plan)
    if wanted is None or not wanted.words:
        return []
    where = place(loaded, "output_root")
    kind = filesystem(folder, mounts)
    findings = []
    for limit in limits(folder, kind, which, ask or _ask):
        least = wanted.checkpoint if limit.kind == "bytes" else plan.mesh.world_size if plan.mesh else 1
        most = wanted.total if limit.kind == "bytes" else wanted.files
        if limit.left >= most:
            continue
        shown = _gib(limit.left) if limit.kind == "bytes" else f"{limit.left} files"
        needed = f"{wanted.words} = {_gib(most)}" if limit.kind == "bytes" else f"about {most} files"
        findings.append(
            Finding(
                "error" if limit.left < least else "warning",
                where,
                f"{limit.source} leaves {shown} in {folder}; this run writes {needed}",
                "make room, lower checkpoint.max_keep, or set output_root to another filesystem",
            )
        )
    if kind in ("tmpfs", "ramfs"):
        findings.append(Finding("warning", where, f"{folder} is in memory: a reboot loses every checkpoint"))
    if not findings:
        hint = ""
        if kind == "lustre" and wanted.rank_file > STRIPE_ABOVE:
            hint = (
                f"; each rank writes one file of {_gib(wanted.rank_file)}: "
                f"`lfs setstripe -c 4 {folder}` spreads it"
            )
        findings.append(Finding("ok", where, f"{wanted.words} fit{hint}"))
    return findings


def limits(folder: Path, kind: str, which: Callable[[str], str | None], ask: Ask) -> list[Limit]:
    """Everything that bounds what this user may still write to `folder`."""
    room = os.statvfs(folder)
    found = [Limit("bytes", room.f_bavail * room.f_frsize, "the filesystem")]
    if room.f_files > 0:  # 0: made on demand, as btrfs does
        found.append(Limit("files", room.f_favail, "the filesystem"))
    user = str(os.getuid())
    if kind == "lustre" and which("lfs"):
        found += parse_lfs_quota(ask(["lfs", "quota", "-q", "-u", user, str(folder)]))
    elif which("quota"):
        found += parse_quota(ask(["quota", "-w", "-p", "-u", user]), device_of(folder))
    return found


def parse_lfs_quota(text: str) -> list[Limit]:
    """`lfs quota -q`: path, KiB used, soft, hard, grace, files used, soft, hard, grace. 0 is no limit."""
    numbers = [int(word.rstrip("*")) for word in text.split()[1:] if re.fullmatch(r"\d+\*?", word)]
    if len(numbers) < 6:  # graces are "-" or times and drop out
        return []
    return _left(numbers[:3], numbers[3:6], "your Lustre quota")


def parse_quota(text: str, device: str) -> list[Limit]:
    """`quota -w -p`: a line per device; used, soft, hard, grace of KiB blocks, then of files."""
    for line in text.splitlines():
        words = line.split()
        if words and words[0] == device:
            numbers = [int(word.rstrip("*")) for word in words[1:] if re.fullmatch(r"\d+\*?", word)]
            if len(numbers) >= 8:
                return _left(numbers[:3], numbers[4:7], f"your quota on {device}")
    return []


def _left(blocks: list[int], files: list[int], source: str) -> list[Limit]:
    found = []
    for kind, (used, soft, hard), unit in (("bytes", blocks, 1024), ("files", files, 1)):
        bound = hard or soft  # the soft one can be exceeded for days
        if bound > 0:
            found.append(Limit(kind, max(0, bound - used) * unit, source))
    return found


def filesystem(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the filesystem that `folder` lies on; "" where the system does not say."""
    return _mount(folder, mounts)[1]


def device_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    return _mount(folder, mounts)[0]


def _mount(folder: Path, mounts: Path) -> tuple[str, str]:
    best, found = -1, ("", "")
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    real = folder.resolve()
    for line in lines:
        words = line.split()
        point = words[1].replace("\\040", " ") if len(words) > 2 else ""
        if point and real.is_relative_to(point) and len(point) >= best:  # the later one of equals lies on top
            best, found = len(point), (words[0], words[2])
    return found


def _existing(folder: Path) -> Path:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _ask(command: list[str]) -> str:
    """What the program says; nothing if it fails, hangs (a server that is away) or is not there."""
    environ: Mapping[str, str] = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_LIMIT_S, env=environ)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"
