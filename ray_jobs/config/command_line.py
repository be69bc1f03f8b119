"""Command line of every job: `[SPEC.yaml] [--section.key value …]` to a validated spec.

A flat spec may name one setting in a class variable `POSITIONAL`, which is then also taken without
its flag: `inspect PREPARED`.

One function serves all verbs, so that flags, YAML, help and error texts cannot drift apart.
Imports neither Ray nor TensorFlow: `--help` answers at once.
"""

import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mm_model.nearest_match import did_you_mean
from mm_model.spec import Spec
from ray_jobs.config.errors import Interrupted, JobError, UsageError

S = TypeVar("S", bound=Spec)
T = TypeVar("T")
_NONE = type(None)
_PASSWORD = re.compile(r"://[^/?#@\s]*:[^/?#@\s]+@")


def main(spec_class: type[S], job: Callable[[S], Any], doc: str | None) -> None:
    """Run one job from the command line.

    Exits as `run` does.
    """
    arguments = sys.argv[1:]
    module = getattr(sys.modules["__main__"].__spec__, "name", "ray_jobs")
    prog = f"python -m {module.removesuffix('.__main__')}"
    if asks_for_help(arguments):
        print(help_text(spec_class, prog, doc or ""))
        return
    run(prog, lambda: parse(spec_class, arguments), job)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the user wants to know how a job is called."""
    return bool({"-h", "--help"} & set(arguments))


def run(prog: str, parsed: Callable[[], T], job: Callable[[T], Any]) -> None:
    """Run one job on what the command line says.

    Exits with status 0 only when the work is done, 2 on wrong usage, 130 when it was interrupted, 1
    on any other failure.
    Errors that the user can mend are one line on stderr; others keep their traceback.
    """
    try:
        asked = parsed()
    except UsageError as error:
        _exit(f"{error}\nSee {prog} --help.", 2)
    try:
        job(asked)
    except Interrupted as error:
        _exit(str(error), 130)
    except (JobError, OSError, ValueError) as error:
        if os.environ.get("RAY_JOBS_TRACEBACK"):
            raise
        _exit(str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def parse(spec_class: type[S], arguments: Sequence[str]) -> S:
    """Return the spec that the arguments describe: defaults, then YAML, then flags.

    Raises:
        UsageError: naming every wrong key or value, what is accepted, and the nearest match.
    """
    fields = flatten(spec_class)
    nested = any("." in path for path in fields)
    positional = _positional(spec_class)
    tree: dict[str, Any] = {}
    flags: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if positional and positional not in tree:
                tree[positional] = argument
                continue
            if not nested or tree or flags:
                raise UsageError(f"unexpected argument {argument!r}")
            tree = _with_empty_sections(spec_class, read_yaml(argument))
            continue
        path, equals, value = argument[2:].partition("=")
        if path not in fields:
            raise UsageError(
                f"--{path} is no flag{did_you_mean(path, list(fields))}"
                f"{_siblings(path, list(fields))}"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{path} needs a value ({type_text(fields[path])})")
            value = rest.pop(0)
        if path in dict(flags) and _takes_several(fields[path].annotation):
            raise UsageError(f"--{path} is given twice; give all of it at once: --{path} A,B")
        flags.append((path, value))
    if positional in tree and positional in dict(flags):
        raise UsageError(
            f"{positional} is given twice: {tree[positional]!r} and --{positional} "
            f"{dict(flags)[positional]!r}"
        )
    for path, text in flags:
        tree = with_value(tree, path, _value(path, text, fields[path].annotation))
    return validate_spec(spec_class, tree)


def validate_spec(spec_class: type[S], tree: Mapping[str, Any]) -> S:
    """Return the spec of a tree of plain values.

    Raises:
        UsageError: one line for each wrong key or value.
    """
    if secret := next(_with_password(tree, ""), None):
        raise UsageError(
            f"{secret} holds a password, which would stand in run folders and logs; give it by the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    try:
        return spec_class.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n".join(_error_lines(spec_class, error.errors()))) from None


def _with_password(value: Any, path: str) -> Iterator[str]:
    """Yield the paths of the settings in a tree that are URIs with a password."""
    if isinstance(value, str) and _PASSWORD.search(value):
        yield path
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _with_password(below, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _with_password(below, path)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the tree of a YAML file.

    Raises:
        UsageError: if it is missing, is no YAML, or holds no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} could not be read: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path} holds no mapping of sections, but a {type(tree).__name__}")
    return tree


def with_value(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of a tree with the value at a dotted path replaced."""
    head, _, rest = path.partition(".")
    copy = dict(tree)
    if rest:
        below = copy.get(head)
        value = with_value(below if isinstance(below, Mapping) else {}, rest, value)
    copy[head] = value
    return copy


def flatten(spec_class: type[Spec], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every setting of a spec by its dotted path, in order."""
    found: dict[str, FieldInfo] = {}
    for name, field in spec_class.model_fields.items():
        if _is_spec(field.annotation):
            found.update(flatten(typing.cast(type[Spec], field.annotation), f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def help_text(spec_class: type[Spec], prog: str, doc: str) -> str:
    """Return the help of a job: its purpose, then every flag with type, default and meaning."""
    fields = flatten(spec_class)
    nested = any("." in path for path in fields)
    positional = _positional(spec_class)
    usage = "[SPEC.yaml] [--section.key value …]" if nested else "[--key value …]"
    if positional:
        usage = f"{positional.upper()} {usage}"
    lines = [f"usage: {prog} {usage}", "", doc.strip(), ""]
    section = None
    for path, field in fields.items():
        here = path.rpartition(".")[0]
        if here != section:
            lines += ["", f"{here}: {_section_doc(spec_class, here)}"] if here else []
            section = here
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"default {_shown(default)}"
        name = f"{path.upper()} or --{path}" if path == positional else f"--{path}"
        lines.append(f"  {name} {type_text(field)}  ({shown})")
        description = " ".join((field.description or "").split())
        lines.append(fill(description, 92, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def type_text(field: FieldInfo) -> str:
    """Return what a setting accepts, in a word or a list of choices."""
    return _type_text(field.annotation)


def _type_text(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(args[0])
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return "|".join("none" if a is _NONE else _type_text(a) for a in args)
    if origin is tuple:
        return f"{_type_text(args[0])},…" if args[-1] is ... else ",".join(map(_type_text, args))
    if _is_spec(annotation):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if origin is dict:
        return "{name: " + _type_text(args[1]) + "}"
    return {
        "str": "TEXT",
        "int": "INT",
        "float": "NUMBER",
        "bool": "true|false",
        "Any": "VALUE",
    }.get(getattr(annotation, "__name__", ""), str(annotation))


def _with_empty_sections(spec_class: type[Spec], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a YAML tree in which a section whose settings are all commented out is empty."""
    copy = dict(tree)
    for name, field in spec_class.model_fields.items():
        if name in copy and _is_spec(field.annotation):
            below = {} if copy[name] is None else copy[name]
            if isinstance(below, Mapping):
                below = _with_empty_sections(typing.cast(type[Spec], field.annotation), below)
            copy[name] = below
    return copy


def _positional(spec_class: type[Spec]) -> str | None:
    return getattr(spec_class, "POSITIONAL", None)


def _is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict):
        return ",".join(map(str, value)) or "empty"
    if value == "":
        return "empty"
    return str(value)


def _section_doc(spec_class: type[Spec], path: str) -> str:
    for name in path.split("."):
        spec_class = typing.cast(type[Spec], spec_class.model_fields[name].annotation)
    return (spec_class.__doc__ or "").strip()


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a setting accepts."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _takes_several(annotation: Any) -> bool:
    """Whether a setting is of any number of values."""
    return any(
        typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is ...
        for kind in _kinds(annotation)
    )


def _value(path: str, text: str, annotation: Any) -> Any:
    """Turn a flag's text into what pydantic can validate; scalars it converts by itself."""
    kinds = _kinds(annotation)
    origins = [typing.get_origin(kind) for kind in kinds]
    if text in ("none", "null") and _NONE in kinds:
        return None
    if (tuple in origins or dict in origins) and text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", error)
            raise UsageError(f"{path}={text!r} is no YAML: {problem}") from None
    takes_one = any(typing.get_origin(kind) is not tuple for kind in kinds if kind is not _NONE)
    if tuple in origins and ("," in text or not takes_one):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _error_lines(spec_class: type[Spec], problems: Sequence[Any]) -> list[str]:
    """Return a line for each wrong key or value."""
    lines: dict[Any, str] = {}
    for problem in problems:
        path, field = _setting(spec_class, problem["loc"])
        if field is None or not _has_several_types(field):
            lines[problem["loc"]] = _error_line(spec_class, problem)
        # A value that fits no member of a union has a problem for each; a bound says the most.
        elif path not in lines or problem["type"].startswith(("greater_than", "less_than")):
            lines[path] = _union_line(path, field, problem)
    return list(dict.fromkeys(lines.values()))


def _setting(spec_class: type[Spec], location: Sequence[Any]) -> tuple[str, FieldInfo | None]:
    """Return path and field of the setting that a problem is about; None where it is a section."""
    path = ""
    for part in location:
        field = spec_class.model_fields.get(str(part))
        if field is None:
            break
        path = f"{path}.{part}".lstrip(".")
        if not _is_spec(field.annotation):
            return path, field
        spec_class = typing.cast(type[Spec], field.annotation)
    return path, None


def _has_several_types(field: FieldInfo) -> bool:
    origin, args = typing.get_origin(field.annotation), typing.get_args(field.annotation)
    several = len([a for a in args if a is not _NONE]) > 1
    return several and origin in (typing.Union, types.UnionType)


def _is_of_wrong_length(problem: Any) -> bool:
    """Whether a problem is that of numbers separated by commas there are too few or too many."""
    kind, last = problem["type"], problem["loc"][-1]
    return kind in ("tuple_type", "too_long") or (kind == "missing" and isinstance(last, int))


def _union_line(path: str, field: FieldInfo, problem: Any) -> str:
    accepted, given = type_text(field), str(problem["input"])
    if problem["type"].startswith(("greater_than", "less_than")):
        return f"{path}={given!r}: {problem['msg']} (accepted: {accepted})"
    return f"{path}={given!r}: accepted: {accepted}{did_you_mean(given, accepted.split('|'))}"


def _error_line(spec_class: type[Spec], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    known = _known_keys(spec_class, location)
    if problem["type"] == "extra_forbidden":
        key, where = location[-1], ".".join(location[:-1]) or "the spec"
        return (
            f"{path}: {where} has no key {key!r}{did_you_mean(key, known)} "
            f"(accepted: {', '.join(known)})"
        )
    setting, field = _setting(spec_class, location)
    if field is not None and _is_of_wrong_length(problem):
        given = problem["input"]
        shown = ",".join(map(str, given)) if isinstance(given, list | tuple) else given
        return f"{setting}={str(shown)!r}: accepted: {type_text(field)}"
    if problem["type"] == "missing":
        if any(part.isdigit() for part in location):
            return f"{path}: is required (accepted: {', '.join(known)})"
        flag = f"{path.upper()} or --{path}" if path == _positional(spec_class) else f"--{path}"
        return f"{path}: is required; give it as {flag}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = f"is a section, not a value (accepted in it: {', '.join(known)})"
    if problem["type"] == "literal_error":
        choices = [
            c.strip().strip("'")
            for c in problem["ctx"]["expected"].replace(" or ", ", ").split(",")
        ]
        message = f"accepted: {', '.join(choices)}{did_you_mean(str(problem['input']), choices)}"
    given = problem["input"]
    shown = f"={given!r}" if isinstance(given, str | int | float | bool | None) else ""
    # What concerns several sections names them itself.
    return f"{path}{shown}: {message}" if path else message


def _known_keys(spec_class: type[Spec], location: list[str]) -> list[str]:
    for name in location:
        field = spec_class.model_fields.get(name)
        if field is None:
            # The place of an item in a list, or the key that is wrong.
            continue
        below = [a for a in (field.annotation, *typing.get_args(field.annotation)) if _is_spec(a)]
        if not below:
            break
        spec_class = typing.cast(type[Spec], below[0])
    return list(spec_class.model_fields)


def _siblings(path: str, paths: list[str]) -> str:
    section = path.rpartition(".")[0]
    same = [p for p in paths if p.rpartition(".")[0] == section]
    if not same or not section:
        same = sorted({p.rpartition(".")[0] for p in paths if "." in p}) or paths
        return (
            f" (sections: {', '.join(same)})"
            if "." in paths[0]
            else f" (accepted: {', '.join(same)})"
        )
    return f" (accepted in {section}: {', '.join(p.removeprefix(section + '.') for p in same)})"


def _exit(text: str, status: int) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(status)
