import io
import os
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.config.command_line import flatten, parse, with_value
from ray_jobs.config.errors import UsageError
from ray_jobs.config.inference_spec import EvaluateSpec, PredictSpec
from ray_jobs.config.spec import DemoSpec, InspectSpec, RunSpec
from tests.ray_jobs.config.usage import unframed, usage_error

SPECS = (RunSpec, InspectSpec, EvaluateSpec, PredictSpec, DemoSpec)


def setting(spec: Any, path: str) -> Any:
    for name in path.split("."):
        spec = getattr(spec, name)
    return spec


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that returns the error for some arguments."""

    def error_of(*arguments: str, spec_class: Any = RunSpec) -> str:
        return usage_error(capsys, partial(parse, spec_class), arguments)

    return error_of


@cache
def help_text(spec_class: Any, *sections: str, flag: str = "--help") -> str:
    """Return the help for a spec."""
    with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as stop:
        parse(spec_class, [flag], "python -m ray_jobs.verb", "What it does.", sections)
    assert stop.value.code == 0
    return unframed(output.getvalue())


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "spec.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# -- precedence -----------------------------------------------------------------------------------


def test_the_last_flag_overrides_yaml_and_yaml_overrides_defaults(yaml_file):
    path = yaml_file(
        "train: {epochs: 7, patience: 4, num_workers: 3}\n"
        "model:\n  image: {kind: tiny, weights: null, units: 8}\n  l2: 0.5\n"
    )
    flags = ["--train.epochs", "3", "--train.epochs=9", "--model.image.units", "16"]
    # Without this flag, three workers could not share a batch.
    spec = parse(RunSpec, [path, *flags, "--train.global_batch_size", "33"])
    assert (spec.train.epochs, spec.train.patience, spec.train.num_workers) == (9, 4, 3)
    assert (spec.model.image.kind, spec.model.image.units, spec.model.l2) == ("tiny", 16, 0.5)
    assert spec.train.learning_rate == RunSpec().train.learning_rate


@pytest.mark.parametrize("text", [None, "# nothing yet\n", "train:\n  # epochs: 3\nmodel:\n"])
def test_settings_that_are_not_given_have_their_defaults(yaml_file, text):
    assert parse(RunSpec, [yaml_file(text)] if text else []) == RunSpec()


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {
            "train.epochs": ("3", 3),
            "train.learning_rate": ("1e-3", 1e-3),
            "train.max_failures": ("-1", -1),
            "train.use_gpu": ("true", True),
            "train.class_weight": ("none", "none"),
            "train.decision_threshold": ("0.4", 0.4),
            "train.num_workers": ("2", 2),
            "run.name": ("none", None),
            "run.storage_path": ("s3://bucket/a=b,c", "s3://bucket/a=b,c"),
            "model.numeric.units": ("64, 32", (64, 32)),
            "prepare.numeric_columns": ("none", None),
            "prepare.exclude_columns": ("", ("",)),
        },
        {
            "train.decision_threshold": ("f1", "f1"),
            "train.resources_per_worker": ("{type:A10G: 0.001}", {"type:A10G": 0.001}),
            "train.num_workers": ("1,4", (1, 4)),
            "run.name": ("2024", "2024"),
            "model.image.kind": ("tiny", "tiny"),
            "model.image.weights": ("none", None),
            "model.numeric.units": ("[64, 32]", (64, 32)),
            "prepare.numeric_columns": ("area", ("area",)),
        },
        {
            "train.num_workers": ("[1, 4]", (1, 4)),
            "prepare.numeric_columns": ('["a, b", c]', ("a, b", "c")),
        },
    ],
)
def test_a_value_follows_a_space_or_an_equals_sign_or_is_in_yaml(yaml_file, settings):
    tree: dict[str, Any] = {}
    for path, (text, _) in settings.items():
        tree = with_value(tree, path, yaml.safe_load(text) if text[:1] in ("[", "{") else text)
    texts = {path: text for path, (text, _) in settings.items()}
    for arguments in (
        [word for path, text in texts.items() for word in (f"--{path}", text)],
        [f"--{path}={text}" for path, text in texts.items()],
        [yaml_file(yaml.safe_dump(tree))],
    ):
        spec = parse(RunSpec, arguments)
        for path, (_, value) in settings.items():
            parsed = setting(spec, path)
            assert (parsed, type(parsed)) == (value, type(value))


def test_a_spec_may_come_from_a_pipe_and_have_merge_keys():
    reader, writer = os.pipe()
    os.write(writer, b"prepare: {<<: {table: 010.csv, positive_label: [010]}, key_column: k}")
    os.close(writer)
    prepare = parse(RunSpec, [f"/dev/fd/{reader}"]).prepare
    os.close(reader)
    assert (prepare.table, prepare.positive_label) == ("010.csv", ("010",))
    assert prepare.key_column == "k"


def test_yaml_gives_the_same_types_as_flags(yaml_file):
    path = yaml_file(
        "run: {name: 010}\n"
        "train: {learning_rate: 1e-3, use_gpu: yes, resources_per_worker: {a: 2},\n"
        "  stages: [{epochs: 1, backbone: 0}, {epochs: 2}]}\n"
        "prepare: {numeric_columns: [area, 'a, b'], number_rules: {age: date}, label_column: ä,\n"
        "  positive_label: yes, unlabelled: [no, 01, ~], exclude_columns: ''}\n"
    )
    spec = parse(RunSpec, [path])
    stages = ({"epochs": 1, "backbone": 0}, {"epochs": 2})
    train = {"learning_rate": 1e-3, "use_gpu": True, "resources_per_worker": {"a": 2.0}}
    prepare = {"numeric_columns": ("area", "a, b"), "number_rules": {"age": "date"}}
    assert spec == RunSpec.model_validate(
        {
            "run": {"name": "010"},
            "train": {**train, "stages": stages},
            "prepare": {
                **prepare,
                "label_column": "ä",
                "positive_label": ("yes",),
                "unlabelled": ("no", "01", "~"),
                "exclude_columns": ("",),
            },
        }
    )


def test_a_flat_spec_takes_flags_without_a_section():
    spec = parse(EvaluateSpec, ["--run", "r", "--data=d", "--output", "o", "--split", "train"])
    assert spec == EvaluateSpec(run="r", data="d", output="o", split="train")
    # One setting may be given without a flag, anywhere.
    for arguments in (["data"], ["data", "--max_rows", "9"], ["--max_rows=9", "data"]):
        assert parse(InspectSpec, arguments).prepared == "data"


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # unknown keys
        (["--train.epoch", "3"], "Unrecognized options: --train.epoch, 3 Perhaps you meant: "
         "--train.epochs INT"),
        ("train: {epoch: 3}", "unknown setting train.epoch; did you mean 'epochs'? (accepted: "),
        ("trian: {epochs: 3}", "unknown setting trian; did you mean 'train'? (accepted: run, "),
        ("model: {image: {knd: tiny}}", "unknown setting model.image.knd; did you mean 'kind'?"),
        ("1: 2", "unknown setting 1 (accepted: run, "),
        (["--train.epochs", "3", "more.yaml"], "Unrecognized options: more.yaml"),
        # invalid values
        (["--train.epochs=x"], "--train.epochs: 'x' is invalid: Input should be a valid integer"),
        (["--train.monitor=roc_auc"], "'roc_auc' is invalid: Input should be 'val/log_loss', "
         "'val/roc_auc' or 'val/pr_auc'"),
        (["--model.image.kind=efficientnet_b"], "unknown image branch 'efficientnet_b'; did you "
         "mean 'efficientnet_b"),
        (["--model.numeric.units=8,x"], "--model.numeric.units: '8,x' is invalid: 1='x': Input "
         "should be a valid integer"),
        (["--model.numeric.units=[8,"], "'[8,' is not valid YAML: "),
        (["--train.resources_per_worker={a: -1}"], "a=-1: Input should be greater than 0"),
        (["--train.decision_threshold=f2"], "'f2' is invalid: accepted: NUMBER|f1|"),
        (["--train.num_workers=0,x"], "'0,x' is invalid: Input should be greater than 0"),
        (["--prepare.exclude_columns=a", "--prepare.exclude_columns", "b"],
         "--prepare.exclude_columns is given twice; give all values at once: "),
        (["--train.stages", "[{epoch: 3}]"], "0: unknown setting 'epoch'; did "
         "you mean 'epochs'? (accepted: epochs, "),
        (["--run.profile_steps", "10"], "--run.profile_steps INT,INT|none"),
        (["--train.num_workers=3"], "global_batch_size=32 cannot be divided equally among "
         "num_workers=3; use num_workers=1, 2, 4, 8, 16 or 32"),
        ("model: {fusion: skip_concat}", "model.fusion must be a section, not a value (accepted: "
         "kind, units, "),
        # missing values
        (["--train.epochs", "--train.patience", "3"], "Missing value for argument '--train.ep"),
        (["--train.use_gpu"], "Missing value for argument '--train.use_gpu'"),
    ],
)  # fmt: skip
def test_an_error_contains_the_setting_what_is_wrong_and_what_is_accepted(
    error, yaml_file, arguments, message
):
    given = arguments if isinstance(arguments, list) else [yaml_file(arguments)]
    assert message in error(*given)


@pytest.mark.parametrize(
    ("spec_class", "arguments", "message"),
    [
        (EvaluateSpec, ["--splt", "test"], "Unrecognized options: --splt"),
        (InspectSpec, ["data", "more.yaml"], "Unrecognized options: more.yaml"),
        (PredictSpec, ["--run", "r", "--data", "d"], "--output TEXT"),
        (InspectSpec, ["--max_rows", "9"], "PREPARED"),
    ],
)
def test_an_error_of_a_flat_spec_names_the_setting(error, spec_class, arguments, message):
    assert message in error(*arguments, spec_class=spec_class)


@pytest.mark.parametrize(
    ("flag", "uri"),
    [
        ("data.prepared", "s3://key:hunter2@bucket/prepared"),
        ("model.image.weights", "https://:hunter2@host/x.weights.h5"),
    ],
)
def test_a_password_in_a_setting_is_refused_and_not_repeated(error, flag, uri):
    message = error(f"--{flag}", uri)
    assert f"--{flag}: the value contains a password" in message
    assert "AWS_ACCESS_KEY_ID" in message
    assert "hunter2" not in message
    parse(RunSpec, [f"--{flag}", "hdfs://me@host:8020/a:b@c"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "could not read {}: "),
        (b"\xff\xd8\xff\xe0\x00", "could not read {}: "),
        (b"run: {name: 2020-13-45}", "could not read {}: month must be in 1..12"),
        (None, "could not read {}: "),
        (b"- train\n", "{} must contain a mapping, not a list"),
    ],
)
def test_the_error_for_an_unusable_file_contains_its_name(tmp_path, content, message):
    path = tmp_path / "spec.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^{message.format(path)}"):
        parse(RunSpec, [str(path)])


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_class", SPECS)
def test_the_help_contains_every_setting_with_its_docstring_and_no_python_types(spec_class):
    text = help_text(spec_class)
    assert "What it does." in text
    for path, field in flatten(spec_class).items():
        assert field.description, f"{path} has no docstring"
        assert path.upper() in text or f"--{path} " in text
        docstring = "".join(field.description.partition("Default:")[0].split())
        assert docstring in "".join(text.split())
    for name in ("<class", "typing.", "Undefined"):
        assert name not in text


def test_the_help_contains_type_default_and_keys_of_each_kind_of_setting():
    text = help_text(RunSpec)
    for line in (
        "--train.epochs INT Maximum number of passes over the training rows. (default: 50)",
        "--train.use_gpu true|false ",
        "--train.resources_per_worker {name: NUMBER} ",
        "--train.decision_threshold NUMBER|f1|balanced_accuracy ",
        "--model.numeric.units INT,… ",
        "(default: 256,128)",
        "--run.tracking none|mlflow ",
        "which needs the extra `mlflow`. (default: none)",
        "train options The training loop and its workers.",
        # The default is the one that a docstring states.
        "--prepare.numeric_columns TEXT,…|none Numeric input columns. (default: every numeric "
        "column without another role, except for row numbers, ids, constants and copies of the "
        "label) --",
        "--tune.budget.hours NUMBER|none Maximum wall-clock hours. (default: no limit) --",
        # Values that are mappings have keys.
        "layer_decay: Additional learning-rate multiplier",
        "when: Search this setting only if",
    ):
        assert line in text
    assert "Default:" not in text
    assert "--run TEXT Run folder" in help_text(EvaluateSpec)


@pytest.mark.parametrize(("spec_class", "is_yaml_accepted"), [(RunSpec, True), (DemoSpec, False)])
def test_the_usage_contains_the_yaml_file_if_the_spec_has_sections(spec_class, is_yaml_accepted):
    text = help_text(spec_class)
    file = " [SPEC.yaml]" if is_yaml_accepted else ""
    assert text.startswith(f"usage: python -m ray_jobs.verb{file} [-h] ")
    assert ("Settings come from SPEC.yaml" in text) == is_yaml_accepted


def test_help_shows_the_sections_of_the_verb_and_help_all_shows_the_others():
    text = help_text(RunSpec, "run", "model", "train")
    assert "--train.epochs" in text
    assert "--model.image.kind" in text
    assert "--prepare.images" not in text
    assert "--help_all also lists the other sections: prepare, data, tune, cv." in text
    assert "--prepare.images" in help_text(RunSpec, "train", flag="--help_all")
