"""The text of the job script: components through submitit's own checks, the rest through Jinja templates.

`templates/job.sbatch.j2` is the shipped template. A site and a recipe may each have one that extends
it and changes blocks; `job.sbatch.j2` and `site.sbatch.j2` are the names to extend.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.cluster.environment import is_secret_name
from hpc_rl.cluster.slurm.components import Component, build_components
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.share import share_dir

SHIPPED = "job.sbatch.j2"
OF_SITE = "site.sbatch.j2"
ENTRY = "hpc_rl.cluster.slurm.batch"


@dataclass(frozen=True)
class JobScript:
    """Everything that decides the text of a job script, except where submitit keeps its files.

    `log` is the batch step's log; its folder must exist when the job starts. `templates` maps the names
    `site` and `recipe` to Jinja files that extend the shipped one.
    """

    plan: Plan
    site: Site
    run_dir: Path
    log: Path
    components: tuple[Component, ...]
    templates: Mapping[str, Path]
    secrets: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, plan: Plan, site: Site, *, run_dir: Path, log: Path) -> JobScript:
        """The script of a run. Raises ValueError for options that Slurm would not apply as meant."""
        components = build_components(
            plan,
            site,
            log=log,
            work_dir=run_dir,
            signal_seconds=recipe.cluster.signal_seconds,
            comment=f"hpc-rl {plan.name}",
        )
        templates: dict[str, Path] = {}
        if site.template:
            templates["site"] = Path(site.template).expanduser()
        if recipe.cluster.template and recipe.cluster.template != site.template:
            templates["recipe"] = Path(recipe.cluster.template).expanduser()
        return cls(plan, site, run_dir, log, tuple(components), templates, tuple(recipe.cluster.secrets))

    @property
    def python(self) -> str:
        """The interpreter of supervisor and controller, for the shell."""
        return shlex.quote(self.site.python or sys.executable)

    def render(self, folder: Path, *, environ: Mapping[str, str] | None = None) -> str:
        """The script; `folder` is where submitit puts the job's files.

        Raises ValueError for a template that is broken or loses what the job needs, and for a script that
        would carry the value of a secret found in `environ`.
        """
        context = {
            "name": self.plan.name,
            "run_dir": str(self.run_dir),
            "components": [
                {"role": c.role, "lines": sbatch_lines(c, folder), "parameters": c.parameters}
                for c in self.components
            ],
            "setup": self.site.setup,
            "python": self.python,
            "folder": shlex.quote(str(folder)),
            "site": self.site,
            "plan": self.plan,
        }
        text = _render(self.templates, context)
        _check_text(text, len(self.components))
        _check_secrets(text, os.environ if environ is None else environ, self.secrets)
        return text


def sbatch_lines(component: Component, folder: Path) -> list[str]:
    """The `#SBATCH` lines of one component, written and checked by submitit. Raises ValueError."""
    # submitit takes 0.2 s to import: only those who render pay for it.
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    unknown = sorted(set(component.parameters) - SlurmExecutor._valid_parameters())
    if unknown:
        raise ValueError(f"{component.role}: submitit knows no Slurm parameter {', '.join(unknown)}")
    text = _make_sbatch_string(
        command="true",
        folder=folder,
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        **component.parameters,
    )
    return [line for line in text.splitlines() if line.startswith("#SBATCH ")]


def _render(templates: Mapping[str, Path], context: Mapping[str, Any]) -> str:
    from jinja2 import DictLoader, Environment, StrictUndefined, TemplateError

    shipped = (share_dir("templates") / SHIPPED).read_text(encoding="utf-8")
    sources = {SHIPPED: shipped, OF_SITE: shipped}
    name = SHIPPED
    for who, key in (("site", OF_SITE), ("recipe", "recipe.sbatch.j2")):
        if who in templates:
            sources[key] = _read(templates[who], who)
            name = key
    environment = Environment(
        loader=DictLoader(sources),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is a shell script, not HTML
    )
    try:
        return environment.get_template(name).render(context)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        files = ", ".join(str(path) for path in templates.values()) or SHIPPED
        where = f", line {line}" if line else ""
        raise ValueError(f"the job template ({files}{where}) cannot be rendered: {error}") from error
    except RecursionError as error:
        files = ", ".join(str(path) for path in templates.values())
        raise ValueError(f"{files} extends itself; extend {SHIPPED!r}") from error


def _read(path: Path, who: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the {who}'s job template {path} cannot be read: {error.strerror}") from error


def _check_text(text: str, components: int) -> None:
    """A template may change anything but this: one header per component, in Slurm's place, and the exec."""
    lines = [line.strip() for line in text.splitlines()]
    if not text.startswith("#!"):
        raise ValueError("the job script must start with #!; the template prints something before its header")
    first_command = next(
        (number for number, line in enumerate(lines) if line and not line.startswith("#")), len(lines)
    )
    late = [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    if late:
        raise ValueError(
            f"Slurm ignores {late[0]!r} after the first command; put it into block component_extra"
        )
    if lines.count("#SBATCH hetjob") != components - 1:
        raise ValueError(f"the template must keep the {components} components of the job in its header")
    if not any(line.startswith("exec ") and ENTRY in line for line in lines):
        raise ValueError(f"the template must keep `exec ... -m {ENTRY}` in block exec")


def _check_secrets(text: str, environ: Mapping[str, str], secrets: tuple[str, ...]) -> None:
    for name, value in environ.items():
        if (name in secrets or is_secret_name(name)) and len(value) >= 8 and value in text:
            raise ValueError(
                f"the job script would hold the value of {name}, and Slurm keeps scripts; name it in "
                f"`cluster.secrets: [{name}]` instead"
            )
