"""Parses the command line of every job, `[SPEC.yaml] [--section.key value …]`, into a spec.

tyro finds the flags and prints the help; pydantic converts and checks the values. The settings of a
YAML file are passed to tyro as flags that precede those of the command line; single values are
passed as written, so `name: 010` is the text `010`. A flat spec may name one setting in the class
variable `POSITIONAL`; its value is given without a flag: `inspect PREPARED`.
"""

import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn, TypeGuard, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mm_model.nearest_match import did_you_mean
from mm_model.spec import Spec
from ray_jobs.config.errors import Interrupted, JobError, UsageError

if TYPE_CHECKING:
    from tyro.constructors import StructConstructorSpec, StructTypeInfo

S = TypeVar("S", bound=Spec)
T = TypeVar("T")
HELP_FLAGS = frozenset({"-h", "--help", "--help_all"})
_NONE = type(None)
_DEFAULT = "Default: "
"""Starts the last sentence of a docstring; the help shows its text in place of the default value,
such as `none`."""
_PASSWORD = re.compile(r"://[^/?#@\s]*:[^/?#@\s]+@")


class _TextLoader(yaml.SafeLoader):
    """Loads scalars as they are written; unlike `yaml.BaseLoader`, supports merge keys."""

    yaml_implicit_resolvers: ClassVar = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


def main(
    spec_class: type[S], job: Callable[[S], Any], doc: str | None, sections: Sequence[str] = ()
) -> None:
    """Parse the command line and run the job, with the exit status of `run`.

    Args:
        spec_class: Class of the spec.
        job: Function of the spec.
        doc: Description of the job for `--help`.
        sections: Sections of the spec that `--help` shows, by default all; `--help_all` always
            shows all.
    """
    module = getattr(sys.modules["__main__"].__spec__, "name", "ray_jobs")
    prog = f"python -m {module.removesuffix('.__main__')}"
    run(prog, lambda: parse(spec_class, sys.argv[1:], prog, doc or "", sections), job)


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
    except BrokenPipeError:  # of the help, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
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


def parse(
    spec_class: type[S],
    arguments: Sequence[str],
    prog: str = "",
    doc: str = "",
    sections: Sequence[str] = (),
) -> S:
    """Return the spec that the arguments define: defaults, overridden by YAML, then by flags.

    Prints the help or an error and exits, with status 0 or 2, if the arguments ask for help or are
    invalid. See `main` for `sections`.

    Raises:
        UsageError: If the YAML file cannot be used, or a list is given twice.
    """
    import tyro
    from tyro.constructors import ConstructorRegistry

    flags, rest = [], list(arguments)
    shown: Sequence[str] = ()
    fields = flatten(spec_class)
    has_sections = any("." in path for path in fields)
    if HELP_FLAGS & set(rest):
        shown = () if "--help_all" in rest else sections
        rest = ["--help"]
        if has_sections:
            prog, doc = f"{prog} [SPEC.yaml]", f"{doc}\n{_sections_text(spec_class, shown)}"
    elif has_sections and rest and not rest[0].startswith("-"):
        values, written = _load_yaml(rest.pop(0), yaml.SafeLoader, _TextLoader)
        flags = list(_yaml_flags(spec_class, values, written))
    _require_each_list_once(rest, fields)
    registry = ConstructorRegistry()
    registry.struct_rule(partial(_section, root=spec_class, shown=shown))
    return tyro.cli(
        spec_class,
        prog=prog or None,
        description=doc,
        args=[*flags, *rest],
        use_underscores=True,
        registry=registry,
    )


def validate_spec(spec_class: type[S], tree: Mapping[str, Any]) -> S:
    """Return the spec with the values of a nested mapping.

    Raises:
        UsageError: If a key or value is invalid; the message has one line for each, but an unknown
            key hides the other problems of its section.
    """
    try:
        return spec_class.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_problems(error)) from None


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UsageError: If the file cannot be read or contains no mapping.
    """
    return _load_yaml(path, yaml.SafeLoader)[0]


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


def _is_spec(annotation: Any) -> TypeGuard[type[Spec]]:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def _load_yaml(path: str, *loaders: type[yaml.SafeLoader]) -> list[dict[str, Any]]:
    """Return the mapping in a YAML file by each loader; a file such as a pipe is read once."""
    try:
        with open(path, encoding="utf-8") as file:
            content = file.read()
        trees = [yaml.load(content, loader) for loader in loaders]
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = str(error).replace('in "<unicode string>", ', "")
        raise UsageError(f"could not read {path}: {problem}") from None
    if trees[0] is None:
        return [{} for _ in loaders]
    if not isinstance(trees[0], dict):
        raise UsageError(f"{path} must contain a mapping, not a {type(trees[0]).__name__}")
    return trees


def _yaml_flags(
    spec_class: type[Spec], tree: Mapping[str, Any], written: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Yield the settings of a YAML file as flags, given its values and how they are written."""
    for name, value in tree.items():
        path, field = f"{prefix}{name}", spec_class.model_fields.get(name)
        if field is None:
            known = list(spec_class.model_fields)
            raise UsageError(
                f"unknown setting {path}{did_you_mean(str(name), known)} (accepted: "
                f"{', '.join(known)})"
            )
        section, text = field.annotation, written.get(name)
        if _loader(field.annotation) is _TextLoader and value is not None:
            value = text
        if not _is_spec(section):
            is_text = isinstance(text, str) and value is not None
            yield f"--{path}={text if is_text else _flow_text(value)}"
        elif isinstance(value, Mapping):
            yield from _yaml_flags(section, value, text or {}, f"{path}.")
        elif value is not None:  # A section is null if all of its settings are commented out.
            keys = ", ".join(section.model_fields)
            raise UsageError(f"{path} must be a section, not a value (accepted: {keys})")


def _require_each_list_once(arguments: Sequence[str], fields: Mapping[str, FieldInfo]) -> None:
    """Raise a UsageError if a list is given twice, because only the last one would count."""
    flags = [word.partition("=")[0] for word in arguments]
    for path, field in fields.items():
        if flags.count(f"--{path}") > 1 and _is_list(field.annotation):
            raise UsageError(f"--{path} is given twice; give all values at once: --{path} A,B")


def _sections_text(spec_class: type[Spec], shown: Sequence[str]) -> str:
    """Return what the help says about SPEC.yaml and about the sections that it does not show."""
    fields = spec_class.model_fields.items()
    hidden = [name for name, f in fields if _is_spec(f.annotation) and name not in shown]
    more = f" --help_all also lists the other sections: {', '.join(hidden)}." if shown else ""
    return f"Settings come from SPEC.yaml; flags override them.{more}"


def _flow_text(value: Any) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


# -- how tyro reads a spec ------------------------------------------------------------------------


def _section(
    info: "StructTypeInfo", root: type[Spec], shown: Sequence[str]
) -> "StructConstructorSpec | None":
    """Return the fields of a section and the function that validates them together."""
    from tyro.constructors import MISSING_NONPROP, StructConstructorSpec, StructFieldSpec

    if not _is_spec(info.type):
        return None
    fields = []
    for name, field in info.type.model_fields.items():
        section = field.annotation
        if _is_spec(section):
            if shown and info.type is root and name not in shown:
                continue
            value, text = section, _one_line(section.__doc__)
        else:
            value = _value(field, name.upper() if name == _positional(info.type) else None)
            text = _help_text(field)
        default = (
            MISSING_NONPROP if field.is_required() else field.get_default(call_default_factory=True)
        )
        fields.append(StructFieldSpec(name, value, default, text))
    return StructConstructorSpec(partial(_construct, info.type), tuple(fields))


def _help_text(field: FieldInfo) -> str:
    """Return the docstring of a setting, without its default, and those of its keys."""
    lines = [_one_line(field.description).partition(_DEFAULT)[0].rstrip()]
    lines += [f"{name}: {_one_line(key.description)}" for name, key in _keys(field).items()]
    return "\n".join(lines)


def _default_hint(field: FieldInfo, value: str) -> str:
    """Return what follows the help text of a setting, given the text of its default value."""
    stated = _one_line(field.description).partition(_DEFAULT)[2].removesuffix(".")
    # On the line of the last key, it would appear to be the default of that key.
    return ("\n" if _keys(field) else "") + f"(default: {stated or value})"


def _keys(field: FieldInfo) -> dict[str, FieldInfo]:
    """Return the keys of a setting whose values are a list or a mapping of specs."""
    specs = filter(_is_spec, typing.get_args(field.annotation))
    return {name: key for spec in specs for name, key in spec.model_fields.items()}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _positional(spec_class: type[Spec]) -> str | None:
    return getattr(spec_class, "POSITIONAL", None)


def _construct(spec_class: type[Spec], **values: Any) -> Spec:
    try:
        return spec_class(**values)
    except ValidationError as error:
        raise ValueError(_problems(error)) from None


def _value(field: FieldInfo, positional: str | None) -> Any:
    """Return the type of a setting whose value is one word, which pydantic converts.

    Args:
        field: The setting.
        positional: Name in the help, if the value is given without a flag.
    """
    from tyro.conf import Positional, arg
    from tyro.constructors import PrimitiveConstructorSpec

    adapter = TypeAdapter(field.rebuild_annotation())

    def convert(words: list[str]) -> Any:
        if _PASSWORD.search(words[0]):
            raise ValueError(
                "the value contains a password, which would appear in run folders and logs; set "
                "environment variables instead, such as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        try:
            # An empty word is an empty list, or a list of one empty text if the default is empty.
            value = ("",) if (words[0], field.default) == ("", ()) else None
            return adapter.validate_python(value or _split(words[0], field.annotation))
        except ValidationError as error:
            raise ValueError(f"{words[0]!r} is invalid: {_problem(error, field)}") from None
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", error)
            raise ValueError(f"{words[0]!r} is not valid YAML: {problem}") from None

    constructor = PrimitiveConstructorSpec(
        nargs=1,
        metavar=positional or _type_text(field.annotation),
        instance_from_str=convert,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_default_text(value)],
    )
    hint = arg(help_behavior_hint=partial(_default_hint, field))
    return Annotated[Positional[Any] if positional else Any, constructor, hint]


def _problem(error: ValidationError, field: FieldInfo) -> str:
    """Return what is wrong with a value; of several accepted types, each has its own error."""
    if len([m for m in _union_members(field.annotation) if m is not _NONE]) == 1:
        return _problems(error)
    limits = (p["msg"] for p in error.errors() if p["type"].startswith(("greater", "less")))
    return next(limits, f"accepted: {_type_text(field.annotation)}")


def _split(text: str, annotation: Any) -> Any:
    """Convert `A,B`, YAML lists and YAML mappings; pydantic parses single values."""
    members = _union_members(annotation)
    origins = [typing.get_origin(member) for member in members]
    if text in ("none", "null") and _NONE in members:
        return None
    if (tuple in origins or dict in origins) and text.startswith(("[", "{")):
        return yaml.load(text, _loader(annotation))
    accepts_scalar = any(m is not _NONE and typing.get_origin(m) is not tuple for m in members)
    if tuple in origins and ("," in text or not accepts_scalar):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _loader(annotation: Any) -> type[yaml.SafeLoader]:
    """Return the YAML loader for a value: `no` and `1` stay texts where only texts are accepted."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        args = args[:1]
    is_text = annotation in (str, _NONE, ...) or typing.get_origin(annotation) is Literal
    if is_text or (args and all(_loader(arg) is _TextLoader for arg in args)):
        return _TextLoader
    return yaml.SafeLoader


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(member) is tuple for member in _union_members(annotation))


def _union_members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


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


def _default_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = ",".join(map(str, value)) if isinstance(value, tuple | dict) else str(value)
    return text or "empty"


def _problems(error: ValidationError) -> str:
    """Return one line for each invalid key or value."""
    lines = []
    for problem in error.errors():
        path = ".".join(map(str, problem["loc"]))
        given = problem["input"]
        value = f"={given!r}" if path and isinstance(given, str | int | float | bool | None) else ""
        message = problem["msg"].removeprefix("Value error, ")
        # Checks across settings have no path; their messages name the settings.
        lines.append(f"{path}{value}: {message}" if path else message)
    return "\n".join(dict.fromkeys(lines))


def _exit(text: str, status: int) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(status)
