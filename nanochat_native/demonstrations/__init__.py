"""Small seeded demonstrations of the statements that the guide makes, each a function that returns its numbers.

It may depend on `ops`, `runtime`, `model`, `optim`, `data`, `runs`, `inference`, `evaluation`, `training`, `interop`,
`lab` and `bench`.

A module of this package is a topic. Its DEMONSTRATIONS maps the names that `python -m nanochat_native.demonstrate`
takes to functions. All arguments of such a function are optional, and it returns a dictionary of JSON values.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

Demonstration = Callable[..., dict[str, Any]]


def topics() -> dict[str, dict[str, Demonstration]]:
    """Return the demonstrations by topic and by name."""
    found = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        found[module.name] = dict(importlib.import_module(f"{__name__}.{module.name}").DEMONSTRATIONS)
    return found


def demonstrations() -> dict[str, Demonstration]:
    """Return the demonstrations of all topics by name. Raises ValueError if two have one name."""
    found: dict[str, Demonstration] = {}
    for topic, functions in topics().items():
        for name, function in functions.items():
            if name in found:
                raise ValueError(f"the demonstration {name!r} is in two topics, {topic} is one of them")
            found[name] = function
    return found


def find(name: str) -> Demonstration:
    """Return the demonstration of this name. Raises ValueError for an unknown one."""
    known = demonstrations()
    if name not in known:
        raise ValueError(f"the demonstration must be one of {', '.join(sorted(known))}, got {name!r}")
    return known[name]
