"""Plain data between a confined process and the one that calls it, as JSON and without losing its types.

Stand-alone (standard library only): the confined process imports it by path. Lists, tuples, sets, mappings,
bytes and complex numbers are `[tag, content]`; anything else is what `other` makes of it, a number by which
the other side may name the object. Nothing that is read can become more than plain data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SEQUENCES: dict[str, type] = {"l": list, "t": tuple, "s": set, "f": frozenset}


def encode(value: Any, other: Callable[[Any], int]) -> Any:
    """`value` for `json.dumps`. A subclass of a plain type counts as that type, as it does for `==`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["b", value.hex()]
    if isinstance(value, dict):
        return ["d", [[encode(key, other), encode(item, other)] for key, item in value.items()]]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, [encode(item, other) for item in value]]
    return ["o", other(value)]


def decode(item: Any, other: Callable[[int], Any]) -> Any:
    """The value of what `encode` made. Raises ValueError or TypeError for anything else."""
    if not isinstance(item, list):
        if isinstance(item, dict):
            raise ValueError("no value that encode makes")
        return item
    tag, content = item
    if tag == "o":
        return other(int(content))
    if tag == "c":
        return complex(float(content[0]), float(content[1]))
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "d":
        return {decode(key, other): decode(value, other) for key, value in content}
    if tag not in _SEQUENCES:
        raise ValueError(f"no value has the tag {tag!r}")
    return _SEQUENCES[tag](decode(value, other) for value in content)
