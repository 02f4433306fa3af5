"""Registries of what users may add: algorithms, rewards, engines, transports, trainers, ...

A member is a name with two references, `module:attribute`: its torch-free pydantic `Config` (what
the recipe may say) and its implementation. Built-ins are plain strings here, so that reading a
recipe imports one small config module and nothing else. Other members come from `plugins:` (a
plugin calls `register`) or from installed packages (entry-point group `hpc_rl.<kind>`, name ->
`module:attribute` of a `Member`), which are scanned only when a name is otherwise unknown.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from hpc_rl.recipe.schema import Section


class NoOptions(Section):
    """The config of a member without options."""


class Served(Section):
    """The config of a reward that a model gives, on GPUs of its own: it is made in the processes of the
    `reward` group and asked for there, and not made in the scorer processes beside the replicas."""


@dataclass(frozen=True)
class Member:
    """One extension. `config` is None when it has no options."""

    implementation: str
    config: str | None = None


class UnknownExtension(ValueError):
    """No member of that name. `known` lists the names there are."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        import difflib

        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        super().__init__(
            f"no {kind} extension is called {name!r}.{hint} Known: {', '.join(known) or 'none'}. "
            "Others are added by 'plugins:' or by installing the package that has them."
        )
        self.known = known


def _algorithm(implementation: str, config: str) -> Member:
    return Member(f"hpc_rl.algorithms.{implementation}", f"hpc_rl.algorithms.config:{config}")


REWARD_KEYS = ("weight", "limit_s", "memory_gb")
"""What every item of the recipe's `reward` list may have, beside its name and its own options."""

_BUILT_IN: dict[str, dict[str, Member]] = {
    "algorithms": {
        "grpo": _algorithm("grpo:Grpo", "GrpoConfig"),
        "dr_grpo": _algorithm("dr_grpo:DrGrpo", "DrGrpoConfig"),
        "dapo": _algorithm("dapo:Dapo", "DapoConfig"),
        "gspo": _algorithm("gspo:Gspo", "GspoConfig"),
        "cispo": _algorithm("cispo:Cispo", "CispoConfig"),
        "aipo": _algorithm("aipo:Aipo", "AipoConfig"),
        "rloo": _algorithm("rloo:Rloo", "RlooConfig"),
        "reinforce_pp": _algorithm("reinforce_pp:ReinforcePp", "ReinforcePpConfig"),
        "reinforce_pp_baseline": _algorithm("reinforce_pp:ReinforcePp", "ReinforcePpBaselineConfig"),
        "maxrl": _algorithm("maxrl:MaxRl", "MaxRlConfig"),
        "sft": _algorithm("sft:Sft", "SftConfig"),
        "dpo": _algorithm("dpo:Dpo", "DpoConfig"),
        "distill": _algorithm("distill:Distill", "DistillConfig"),
    },
    "rewards": {
        "gsm8k": Member("hpc_rl.rewards.gsm8k:Gsm8k", "hpc_rl.rewards.config:Gsm8kConfig"),
        "format": Member("hpc_rl.rewards.format:Format", "hpc_rl.rewards.config:FormatConfig"),
        "exact": Member("hpc_rl.rewards.exact:Exact", "hpc_rl.rewards.config:ExactConfig"),
        "contains": Member("hpc_rl.rewards.contains:Contains", "hpc_rl.rewards.config:ContainsConfig"),
        "math": Member("hpc_rl.rewards.math:Math", "hpc_rl.rewards.config:MathConfig"),
        "boxed": Member("hpc_rl.rewards.boxed:Boxed", "hpc_rl.rewards.config:BoxedConfig"),
        "single_choice": Member(
            "hpc_rl.rewards.single_choice:SingleChoice", "hpc_rl.rewards.config:SingleChoiceConfig"
        ),
        "overlong": Member("hpc_rl.rewards.overlong:Overlong", "hpc_rl.rewards.config:OverlongConfig"),
        "code": Member("hpc_rl.rewards.code:Code", "hpc_rl.rewards.config:CodeConfig"),
        "python": Member("hpc_rl.rewards.python:Python", "hpc_rl.rewards.config:PythonConfig"),
        "model": Member("hpc_rl.scoring.model:make", "hpc_rl.rewards.model:ModelConfig"),
    },
    "engines": {
        "vllm": Member("hpc_rl.rollout.engines.vllm:VllmEngine", "hpc_rl.rollout.engines.config:VllmOptions"),
        "hf": Member("hpc_rl.rollout.engines.hf:HfEngine", "hpc_rl.rollout.engines.config:HfOptions"),
    },
    "transports": {
        "nccl": Member("hpc_rl.weights.nccl:NcclTransport"),
        "gloo": Member("hpc_rl.weights.gloo:GlooTransport"),
    },
    "trainers": {"fsdp2": Member("hpc_rl.policy.fsdp2:Fsdp2Trainer")},
    "models": {},
    "data": {},
    "simulators": {
        "tools": Member("hpc_rl.simulators.tools.environment:Tools", "hpc_rl.simulators.config:ToolsConfig"),
    },
    "tools": {
        "calculator": Member(
            "hpc_rl.simulators.tools.calculator:Calculator", "hpc_rl.simulators.config:CalculatorConfig"
        ),
        "python": Member(
            "hpc_rl.simulators.tools.python:Python", "hpc_rl.simulators.config:PythonToolConfig"
        ),
        "function": Member(
            "hpc_rl.simulators.tools.function:Function", "hpc_rl.simulators.config:FunctionConfig"
        ),
    },
}


class Registry:
    """The members of one kind. Lookups go built-in, then registered, then entry points."""

    def __init__(self, kind: str, built_in: dict[str, Member]) -> None:
        self.kind = kind
        self._members = dict(built_in)
        self._scanned = False

    def register(self, name: str, member: Member) -> None:
        """Add `member`. A name that is taken by another member is an error."""
        present = self._members.get(name)
        if present is not None and present != member:
            taken = f"{self.kind} extension {name!r} is already {present.implementation}"
            raise ValueError(f"{taken}; choose another name")
        self._members[name] = member

    def names(self) -> list[str]:
        """All names, entry points included."""
        self._scan()
        return sorted(self._members)

    def member(self, name: str) -> Member:
        """The member called `name`. Raises UnknownExtension with the names there are."""
        if name not in self._members:
            self._scan()
        if name not in self._members:
            raise UnknownExtension(self.kind, name, sorted(self._members))
        return self._members[name]

    def config_class(self, name: str) -> type[BaseModel]:
        """The pydantic class of the member's options (imports that one module)."""
        reference = self.member(name).config
        if reference is None:
            return NoOptions
        found = _resolve(reference)
        if not (isinstance(found, type) and issubclass(found, BaseModel)):
            raise TypeError(f"config {reference!r} of {self.kind} extension {name!r} is not a pydantic model")
        return found

    def config(self, name: str, mapping: dict[str, Any]) -> Any:
        """The validated options of `name` (an instance of its config class).

        `mapping` holds the options alone or the whole recipe section (`name` and, where the config
        has no such field, `weight` are left out). Raises RecipeError naming every bad key.
        """
        from hpc_rl.recipe.messages import validate
        from hpc_rl.recipe.yaml_source import RecipeError, Source

        cls = self.config_class(name)
        options = options_of(cls, mapping)
        instance, problems = validate(cls, options, Source(options), ())
        if instance is None:
            raise RecipeError(problems)
        return instance

    def load(self, name: str) -> Any:
        """The implementation of `name`, imported now."""
        return _resolve(self.member(name).implementation)

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        from importlib.metadata import entry_points

        for point in entry_points(group=f"hpc_rl.{self.kind}"):
            if point.name not in self._members:
                found = point.load()
                if not isinstance(found, Member):
                    raise TypeError(f"entry point hpc_rl.{self.kind}: {point.name} is not a Member")
                self._members[point.name] = found


_REGISTRIES = {kind: Registry(kind, members) for kind, members in _BUILT_IN.items()}


def registry(kind: str) -> Registry:
    """The registry of `kind` (`algorithms`, `rewards`, `engines`, `transports`, `trainers`, ...)."""
    if kind not in _REGISTRIES:
        raise ValueError(f"no extensions of kind {kind!r}; kinds are {', '.join(sorted(_REGISTRIES))}")
    return _REGISTRIES[kind]


def is_served(item: dict[str, Any]) -> bool:
    """Whether this item of the recipe's `reward` list is served by the `reward` group.

    Raises UnknownExtension, ImportError or TypeError (a plugin's config)."""
    return issubclass(registry("rewards").config_class(str(item.get("name"))), Served)


def register(kind: str, name: str, *, implementation: str, config: str | None = None) -> None:
    """For plugins: make `name` usable in recipes. Both references are `module:attribute` strings."""
    for reference in (implementation, config):
        if reference is not None and reference.count(":") != 1:
            raise ValueError(f"{reference!r} must look like 'module:attribute'")
    registry(kind).register(name, Member(implementation, config))


def options_of(cls: type[BaseModel], mapping: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe section that is the extension's own."""
    kept = {key: value for key, value in mapping.items() if key != "name"}
    if "weight" not in cls.model_fields:
        kept.pop("weight", None)
    return kept


def _resolve(reference: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    module = importlib.import_module(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ImportError(f"module {module_name} has no {attribute!r} (from {reference!r})") from error
