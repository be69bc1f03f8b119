"""Parses the command line of every job, `[SPEC.yaml] [--section.key value …]`, into a spec.

A flat spec may name one setting in the class variable `POSITIONAL`; its value is then also accepted
without the flag: `inspect PREPARED`.
"""

import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar

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
    """Parse the command line, then print the help or run the job, with the exit status of `run`."""
    arguments = sys.argv[1:]
    module = getattr(sys.modules["__main__"].__spec__, "name", "ray_jobs")
    prog = f"python -m {module.removesuffix('.__main__')}"
    if is_help_request(arguments):
        print(help_text(spec_class, prog, doc or ""))
        return
    run(prog, lambda: parse(spec_class, arguments), job)


def is_help_request(arguments: Sequence[str]) -> bool:
    """Return whether -h or --help is among the arguments."""
    return bool({"-h", "--help"} & set(arguments))


def run(prog: str, parse_arguments: Callable[[], T], job: Callable[[T], Any]) -> None:
    """Run a job with the result of `parse_arguments`.

    Returns only on success. Exits with status 2 on a usage error, 130 on an interrupt and 1 on any
    other failure. Errors that users can fix are printed without a traceback, unless
    $RAY_JOBS_TRACEBACK is set.
    """
    try:
        arguments = parse_arguments()
    except UsageError as error:
        _exit(f"{error}\nSee {prog} --help.", 2)
    try:
        job(arguments)
    except Interrupted as error:
        _exit(str(error), 130)
    except (JobError, OSError, ValueError) as error:
        if os.environ.get("RAY_JOBS_TRACEBACK"):
            raise
        _exit(str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def parse(spec_class: type[S], arguments: Sequence[str]) -> S:
    """Return the spec that the arguments define: defaults, overridden by YAML, then by flags.

    Raises:
        UsageError: If a key or value is invalid; the message names each one, what is accepted, and
            the nearest match.
    """
    fields = flatten(spec_class)
    nested = any("." in path for path in fields)
    positional = _positional(spec_class)
    tree: dict[str, Any] = {}
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if positional and positional not in flags:
                flags[positional] = argument
            elif nested and not tree and not flags:
                tree = _with_empty_sections(spec_class, read_yaml(argument))
            else:
                order = "one YAML file first, then settings" if nested else "settings"
                raise UsageError(f"unexpected argument {argument!r}; give {order} as flags")
            continue
        path, equals, value = argument[2:].partition("=")
        if path not in fields:
            raise UsageError(
                f"unknown flag --{path}{did_you_mean(path, list(fields))} "
                f"({_accepted_flags(path, list(fields))})"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{path} needs a value ({_type_text(fields[path].annotation)})")
            value = rest.pop(0)
        if path in flags and path == positional:
            raise UsageError(
                f"{path} is given twice: {flags[path]!r} and {value!r}; give only one of them"
            )
        if path in flags and _is_list(fields[path].annotation):
            raise UsageError(f"--{path} is given twice; give all values at once: --{path} A,B")
        flags[path] = value
    for path, text in flags.items():
        tree = with_value(tree, path, _parse_value(path, text, fields[path].annotation))
    return validate_spec(spec_class, tree)


def validate_spec(spec_class: type[S], tree: Mapping[str, Any]) -> S:
    """Return the spec with the values of a nested mapping.

    Raises:
        UsageError: If a key or value is invalid; the message has one line for each.
    """
    if path := next(_paths_with_password(tree, ""), None):
        raise UsageError(
            f"{path} contains a password, which would appear in run folders and logs; set "
            "environment variables instead, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    try:
        return spec_class.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n".join(_error_lines(spec_class, error.errors()))) from None


def _paths_with_password(value: Any, path: str) -> Iterator[str]:
    """Yield the path of every setting whose value is a URI with a password."""
    if isinstance(value, str) and _PASSWORD.search(value):
        yield path
    elif isinstance(value, Mapping):
        for name, child in value.items():
            yield from _paths_with_password(child, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _paths_with_password(child, path)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UsageError: If the file cannot be read or contains no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"could not read {path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must contain a mapping, not a {type(tree).__name__}")
    return tree


def with_value(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of a nested mapping with the value at a dotted path replaced."""
    name, _, rest = path.partition(".")
    if rest:
        child = tree.get(name)
        value = with_value(child if isinstance(child, Mapping) else {}, rest, value)
    return {**tree, name: value}


def flatten(spec_class: type[Spec], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every setting of a spec by its dotted path, in order."""
    fields: dict[str, FieldInfo] = {}
    for name, field in spec_class.model_fields.items():
        if _is_spec(field.annotation):
            fields.update(flatten(field.annotation, f"{prefix}{name}."))
        else:
            fields[prefix + name] = field
    return fields


def help_text(spec_class: type[Spec], prog: str, doc: str) -> str:
    """Return the help of a job: its description, then each flag with type, default and help."""
    fields = flatten(spec_class)
    nested = any("." in path for path in fields)
    positional = _positional(spec_class)
    usage = "[SPEC.yaml] [--section.key value …]" if nested else "[--key value …]"
    if positional:
        usage = f"{positional.upper()} {usage}"
    lines = [f"usage: {prog} {usage}", "", doc.strip(), ""]
    previous = ""
    for path, field in fields.items():
        section = path.rpartition(".")[0]
        if section != previous:
            lines += ["", f"{section}: {_section_doc(spec_class, section)}"] if section else []
            previous = section
        default = _default_text(field.get_default(call_default_factory=True))
        default = "required" if field.is_required() else f"default {default}"
        name = f"{path.upper()} or --{path}" if path == positional else f"--{path}"
        lines.append(f"  {name} {_type_text(field.annotation)}  ({default})")
        description = " ".join((field.description or "").split())
        lines.append(fill(description, 92, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def _type_text(annotation: Any) -> str:
    """Return the accepted values of a setting as a type name or a list of choices."""
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
    """Return a mapping from YAML with empty sections in place of null.

    A section is null if all of its settings are commented out.
    """
    copy = dict(tree)
    for name, field in spec_class.model_fields.items():
        if name in copy and _is_spec(field.annotation):
            section = {} if copy[name] is None else copy[name]
            if isinstance(section, Mapping):
                section = _with_empty_sections(field.annotation, section)
            copy[name] = section
    return copy


def _positional(spec_class: type[Spec]) -> str | None:
    return getattr(spec_class, "POSITIONAL", None)


def _is_spec(annotation: Any) -> TypeGuard[type[Spec]]:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def _default_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = ",".join(map(str, value)) if isinstance(value, tuple | dict) else str(value)
    return text or "empty"


def _section_doc(spec_class: type[Spec], path: str) -> str:
    for name in path.split("."):
        spec_class = typing.cast(type[Spec], spec_class.model_fields[name].annotation)
    return (spec_class.__doc__ or "").strip()


def _union_members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_list(annotation: Any) -> bool:
    """Return whether a setting accepts any number of values."""
    return any(
        typing.get_origin(member) is tuple and typing.get_args(member)[-1] is ...
        for member in _union_members(annotation)
    )


def _parse_value(path: str, text: str, annotation: Any) -> Any:
    """Convert the text of a flag to a value for pydantic, which parses scalars itself."""
    members = _union_members(annotation)
    origins = [typing.get_origin(member) for member in members]
    if text in ("none", "null") and _NONE in members:
        return None
    if (tuple in origins or dict in origins) and text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", error)
            raise UsageError(f"{path}={text!r} is not valid YAML: {problem}") from None
    accepts_scalar = any(m is not _NONE and typing.get_origin(m) is not tuple for m in members)
    if tuple in origins and ("," in text or not accepts_scalar):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _error_lines(spec_class: type[Spec], problems: Sequence[Any]) -> list[str]:
    """Return a line for each invalid key or value."""
    lines: dict[Any, str] = {}
    for problem in problems:
        setting, field, keys = _locate(spec_class, problem["loc"])
        is_bound = problem["type"].startswith(("greater_than", "less_than"))
        if field is not None and (_has_several_types(field) or _has_wrong_length(problem)):
            # An invalid value of a union has one problem per member; a bound is the clearest.
            if setting not in lines or is_bound:
                lines[setting] = _accepted_line(setting, field, problem, is_bound)
        else:
            lines[problem["loc"]] = _error_line(problem, keys, setting == _positional(spec_class))
    return list(dict.fromkeys(lines.values()))


def _locate(
    spec_class: type[Spec], location: Sequence[Any]
) -> tuple[str, FieldInfo | None, list[str]]:
    """Return the path and field of a setting, and the keys of the innermost section around it.

    The field of a section is None.
    """
    path, setting = "", None
    for part in location:
        field = spec_class.model_fields.get(str(part))
        if field is None:  # a list index, a name in a mapping, or an unknown key
            continue
        if setting is None:
            path = f"{path}.{part}".lstrip(".")
            setting = None if _is_spec(field.annotation) else field
        nested = [a for a in (field.annotation, *typing.get_args(field.annotation)) if _is_spec(a)]
        if not nested:
            break
        spec_class = nested[0]
    return path, setting, list(spec_class.model_fields)


def _has_several_types(field: FieldInfo) -> bool:
    return len([m for m in _union_members(field.annotation) if m is not _NONE]) > 1


def _has_wrong_length(problem: Any) -> bool:
    """Return whether a tuple has the wrong number of values."""
    kind, last = problem["type"], problem["loc"][-1]
    return kind in ("tuple_type", "too_long") or (kind == "missing" and isinstance(last, int))


def _accepted_line(path: str, field: FieldInfo, problem: Any, is_bound: bool) -> str:
    given, accepted = problem["input"], _type_text(field.annotation)
    text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    if is_bound:
        return f"{path}={text!r}: {problem['msg']} (accepted: {accepted})"
    nearest = did_you_mean(text, accepted.split("|"))
    return f"{path}={text!r} is invalid{nearest} (accepted: {accepted})"


def _error_line(problem: Any, keys: list[str], is_positional: bool) -> str:
    kind, given, location = problem["type"], problem["input"], [str(p) for p in problem["loc"]]
    path, accepted = ".".join(location), f"accepted: {', '.join(keys)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        key, section = location[-1], ".".join(location[:-1]) or "the spec"
        return f"{path}: {section} has no key {key!r}{did_you_mean(key, keys)} ({accepted})"
    if kind == "missing":
        if any(part.isdigit() for part in location):
            return f"{path} is required ({accepted})"
        flag = f"{path.upper()} or --{path}" if is_positional else f"--{path}"
        return f"{path} is required; set it with {flag}"
    if kind == "model_type":
        message = f"must be a section, not a value ({accepted})"
    if kind == "literal_error":
        choices = re.findall("'(.*?)'", problem["ctx"]["expected"])
        nearest = did_you_mean(str(given), choices)
        return f"{path}={given!r} is invalid{nearest} (accepted: {', '.join(choices)})"
    value = f"={given!r}" if isinstance(given, str | int | float | bool | None) else ""
    # Checks across sections have no path; their messages name the settings.
    return f"{path}{value}: {message}" if path else message


def _accepted_flags(path: str, paths: list[str]) -> str:
    """Describe the flags of the section in `path`, or list the sections if it does not exist."""
    section = path.rpartition(".")[0]
    names = [p.removeprefix(f"{section}.") for p in paths if p.rpartition(".")[0] == section]
    if section and names:
        return f"accepted in {section}: {', '.join(names)}"
    if sections := sorted({p.rpartition(".")[0] for p in paths if "." in p}):
        return f"sections: {', '.join(sections)}"
    return f"accepted: {', '.join(paths)}"


def _exit(text: str, status: int) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(status)
