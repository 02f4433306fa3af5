"""Names of the parts of a module with PEFT adapters: which are factors, and what the plain model calls the
rest. No PEFT is imported here."""

from __future__ import annotations

ADAPTER = "default"
_INFIXES = (".base_layer", ".original_module", f".modules_to_save.{ADAPTER}")
_FACTORS = {f".lora_{which}.{ADAPTER}.weight" for which in "AB"}


def plain_name(name: str) -> str:
    """The name of the plain model for a base weight (or a saved copy), or a module, of the adapted one."""
    for infix in _INFIXES:
        while f"{infix}." in name:
            name = name.replace(f"{infix}.", ".")
        name = name.removesuffix(infix)
    return name


def is_factor(name: str) -> bool:
    """Whether `name` is an A or B."""
    return any(name.endswith(factor) for factor in _FACTORS)


def is_saved_whole(name: str) -> bool:
    """Whether `name` is in the trained copy of a module that is saved whole."""
    return f".modules_to_save.{ADAPTER}." in name


def is_original(name: str) -> bool:
    """Whether `name` is in the untrained original of a module that is saved whole."""
    return ".original_module." in name


def factor_module(name: str) -> tuple[str, str] | None:
    """`(the adapted layer, "lora_A" or "lora_B")` of the module that holds a factor; None for others."""
    layer, _, last = name.removesuffix(f".{ADAPTER}").rpartition(".")
    if name.endswith(f".{ADAPTER}") and last in ("lora_A", "lora_B"):
        return layer, last
    return None
