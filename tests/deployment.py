"""The deployment files, and a check of their fields against a schema."""

import copy
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
FILES = [ROOT / "cluster.yaml", *(p for p in sorted((ROOT / "deploy").rglob("*")) if p.is_file())]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in FILES if path.suffix != ".pyc"}
LOCKED = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
BASIC = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "any": object}


def load(name: str) -> Any:
    return yaml.safe_load(TEXTS[name])


def changed(config: Any, path: str, value: Any) -> Any:
    """Return a copy with another value at a path of keys, such as `a/0/b`."""
    config = copy.deepcopy(config)
    *way, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    at = config
    for key in way:
        at = at[key]
    at[last] = value
    return config


def starts(commands: list[str]) -> list[str]:
    return [command for command in commands if "ray start" in command]


def wrong_fields(value: Any, kind: str, types: dict[str, Any], at: str) -> list[str]:
    """Return the fields that violate a type `T`, `[T]` or `{T}` of a schema in tests/data."""
    expected = list if kind.startswith("[") else BASIC.get(kind, dict)
    truth_for_number = isinstance(value, bool) and kind in ("integer", "number")
    if truth_for_number or not isinstance(value, expected):
        return [f"{at} is not of type {'list' if expected is list else kind}"]
    if kind in BASIC:
        return []
    if expected is list:
        each = [(f"{at}[{i}]", item, kind[1:-1]) for i, item in enumerate(value)]
    elif kind.startswith("{"):
        each = [(f"{at}.{key}", item, kind[1:-1]) for key, item in value.items()]
    elif unknown := sorted(set(value) - set(types[kind])):
        return [f"{at} has no {key}" for key in unknown]
    else:
        each = [(f"{at}.{key}", item, types[kind][key]) for key, item in value.items()]
    return [found for where, item, of in each for found in wrong_fields(item, of, types, where)]
