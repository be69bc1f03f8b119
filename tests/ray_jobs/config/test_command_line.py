from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config.command_line import flatten, parse
from ray_jobs.config.errors import UsageError
from ray_jobs.config.spec import DemoSpec, EvaluateSpec, InspectSpec, PredictSpec, RunSpec
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


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that returns the help for a spec."""

    def text(spec_class: Any, *sections: str, flag: str = "--help") -> str:
        with pytest.raises(SystemExit) as stop:
            parse(spec_class, [flag], "python -m ray_jobs.verb", "What it does.", sections)
        assert stop.value.code == 0
        return unframed(capsys.readouterr().out)

    return text


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "spec.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# -- precedence -----------------------------------------------------------------------------------


def test_flags_override_yaml_and_yaml_overrides_defaults(yaml_file):
    path = yaml_file("train: {epochs: 7, patience: 4}\n")
    spec = parse(RunSpec, [path, "--train.epochs", "9"])
    assert (spec.train.epochs, spec.train.patience) == (9, 4)
    assert spec.train.global_batch_size == RunSpec().train.global_batch_size


def test_settings_of_yaml_are_checked_together_with_the_flags(yaml_file):
    path = yaml_file("train: {num_workers: 3}\n")
    assert parse(RunSpec, [path, "--train.global_batch_size", "33"]).train.num_workers == 3


def test_a_flag_keeps_the_other_settings_of_a_yaml_section(yaml_file):
    path = yaml_file("model:\n  image: {kind: tiny, weights: null, units: 8}\n  l2: 0.5\n")
    spec = parse(RunSpec, [path, "--model.image.units", "16"])
    assert (spec.model.image.kind, spec.model.image.units, spec.model.l2) == ("tiny", 16, 0.5)


def test_no_arguments_give_the_defaults():
    assert parse(RunSpec, []) == RunSpec()


def test_the_last_of_two_equal_flags_wins():
    assert parse(RunSpec, ["--train.epochs", "3", "--train.epochs=4"]).train.epochs == 4


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.epochs", "3", 3),
        ("train.learning_rate", "1e-3", 1e-3),
        ("train.max_failures", "-1", -1),
        ("train.use_gpu", "true", True),
        ("train.calibrate", "false", False),
        ("train.class_weight", "none", "none"),
        ("train.decision_threshold", "0.4", 0.4),
        ("train.decision_threshold", "f1", "f1"),
        ("train.resources_per_worker", "{accelerator_type:A10G: 0.001}",
         {"accelerator_type:A10G": 0.001}),
        ("train.num_workers", "2", 2),
        ("train.num_workers", "1,4", (1, 4)),
        ("train.num_workers", "[1, 4]", (1, 4)),
        ("run.name", "none", None),
        ("run.name", "2024", "2024"),
        ("run.storage_path", "s3://bucket/a=b,c", "s3://bucket/a=b,c"),
        ("model.image.weights", "none", None),
        ("model.numeric.units", "64, 32", (64, 32)),
        ("model.numeric.units", "[64, 32]", (64, 32)),
        ("prepare.numeric_columns", "none", None),
        ("prepare.numeric_columns", "area", ("area",)),
        ("prepare.numeric_columns", '["a, b", c]', ("a, b", "c")),
        ("prepare.exclude_columns", "", ()),
    ],
)  # fmt: skip
def test_a_value_follows_a_space_or_an_equals_sign_or_is_in_yaml(yaml_file, path, text, value):
    extra = ["--model.image.kind", "tiny"] if path == "model.image.weights" else []
    section, _, name = path.rpartition(".")
    lines = [f"{'  ' * i}{key}:" for i, key in enumerate(section.split("."))]
    quoted = text if text[:1] in ("[", "{") else f"'{text}'"
    file = yaml_file("\n".join(lines) + f"\n{'  ' * len(lines)}{name}: {quoted}\n")
    for arguments in ([f"--{path}", text], [f"--{path}={text}"], [file]):
        parsed = setting(parse(RunSpec, [*arguments, *extra]), path)
        assert (parsed, type(parsed)) == (value, type(value))


def test_yaml_gives_the_same_types_as_flags(yaml_file):
    path = yaml_file(
        "run: {name: 2024}\n"
        "train: {learning_rate: 1e-3, use_gpu: yes, resources_per_worker: {a: 2},\n"
        "  stages: [{epochs: 1, backbone: 0}, {epochs: 2}]}\n"
        "prepare: {numeric_columns: [area, 'a, b'], number_rules: {age: date}, label_column: ä}\n"
    )
    spec = parse(RunSpec, [path])
    assert spec.run.name == "2024"
    assert spec.train.learning_rate == 1e-3
    assert spec.train.use_gpu is True
    assert spec.train.resources_per_worker == {"a": 2.0}
    assert [stage.epochs for stage in spec.train.stages] == [1, 2]
    assert spec.prepare.numeric_columns == ("area", "a, b")
    assert spec.prepare.number_rules == {"age": "date"}
    assert spec.prepare.label_column == "ä"


def test_a_section_with_all_lines_commented_out_keeps_its_defaults(yaml_file):
    path = yaml_file("train:\n  # epochs: 3\nmodel:\n  image:\n  l2: 0.5\n")
    spec = parse(RunSpec, [path])
    assert spec.train == RunSpec().train
    assert (spec.model.image, spec.model.l2) == (RunSpec().model.image, 0.5)


def test_an_empty_yaml_gives_the_defaults(yaml_file):
    assert parse(RunSpec, [yaml_file("# nothing yet\n")]) == RunSpec()


def test_a_flat_spec_takes_flags_without_a_section():
    spec = parse(EvaluateSpec, ["--run", "r", "--data=d", "--output", "o", "--split", "train"])
    assert spec == EvaluateSpec(run="r", data="d", output="o", split="train")


@pytest.mark.parametrize(
    "arguments", [["data"], ["data", "--max_rows", "9"], ["--max_rows=9", "data"]]
)
def test_the_positional_setting_of_a_flat_spec_can_be_anywhere(arguments):
    assert parse(InspectSpec, arguments).prepared == "data"


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # unknown keys
        (["--train.epoch", "3"], "Unrecognized options: --train.epoch, 3 Perhaps you meant: "
         "--train.epochs INT"),
        (["--trian.epochs", "3"], "Perhaps you meant: --train.epochs INT"),
        (["--epochs", "3"], "Perhaps you meant: --train.epochs INT"),
        ("train: {epoch: 3}", "Perhaps you meant: --train.epochs INT"),
        ("trian: {epochs: 3}", "Unrecognized options: --trian={epochs: 3}"),
        ("model: {image: {knd: tiny}}", "Perhaps you meant: --model.image.kind TEXT"),
        ("1: 2", "Unrecognized options: --1=2"),
        (["--train.epochs", "3", "more.yaml"], "Unrecognized options: more.yaml"),
        # invalid values
        (["--train.epochs=x"], "--train.epochs: 'x' is invalid: Input should be a valid integer"),
        ("train: {epochs: x}", "--train.epochs: 'x' is invalid: Input should be a valid integer"),
        (["--train.epochs=0"], "--train.epochs: '0' is invalid: Input should be greater than 0"),
        (["--train.use_gpu=maybe"], "'maybe' is invalid: Input should be a valid boolean"),
        (["--train.learning_rate=nan"], "'nan' is invalid: Input should be "),
        (["--train.monitor=roc_auc"], "'roc_auc' is invalid: Input should be 'val/log_loss', "
         "'val/roc_auc' or 'val/pr_auc'"),
        (["--model.image.kind=efficientnet_b"], "unknown image branch 'efficientnet_b'; did you "
         "mean 'efficientnet_b"),
        (["--model.numeric.units=8,x"], "--model.numeric.units: '8,x' is invalid: 1='x': Input "
         "should be a valid integer"),
        (["--model.numeric.units=[8,"], "'[8,' is not valid YAML: "),
        (["--train.resources_per_worker={a: -1}"], "a=-1: Input should be greater than 0"),
        (["--train.decision_threshold=f2"], "--train.decision_threshold NUMBER|f1|"),
        (["--train.stages", "[{epoch: 3}]"], "0: unknown setting 'epoch'; did "
         "you mean 'epochs'? (accepted: epochs, "),
        (["--run.profile_steps", "10"], "--run.profile_steps INT,INT|none"),
        (["--run.name=a/b"], "name='a/b': must be one folder name"),
        (["--train.num_workers=3"], "global_batch_size=32 cannot be divided equally among "
         "num_workers=3; use num_workers=1, 2, 4, 8, 16 or 32"),
        ("model: {fusion: skip_concat}", "model.fusion must be a section, not a value (accepted: "
         "kind, units, "),
        # missing values
        (["--train.epochs"], "Missing value for argument '--train.epochs'"),
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
        (EvaluateSpec, ["more.yaml"], "Unrecognized options: more.yaml"),
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
        ("run.tracking_uri", "https://me:hunter2@host/mlflow"),
        ("model.image.weights", "https://:hunter2@host/x.weights.h5"),
    ],
)
def test_a_password_in_a_setting_is_refused_and_not_repeated(error, flag, uri):
    message = error(f"--{flag}", uri)
    assert f"--{flag}: the value contains a password" in message
    assert "AWS_ACCESS_KEY_ID" in message
    assert "hunter2" not in message
    parse(RunSpec, [f"--{flag}", "hdfs://me@host:8020/a:b@c"])


@pytest.mark.parametrize("text", ["train: [", "train: {epochs: 3", "\tx: 1"])
def test_the_error_for_invalid_yaml_contains_the_file(yaml_file, text):
    path = yaml_file(text)
    with pytest.raises(UsageError, match=f"^could not read {path}: "):
        parse(RunSpec, [path])


def test_the_error_for_a_missing_or_binary_file_contains_its_name(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00")
    for name in ("nowhere.yaml", str(path)):
        with pytest.raises(UsageError, match=f"^could not read {name}: "):
            parse(RunSpec, [name])


@pytest.mark.parametrize(("text", "kind"), [("- train\n", "list"), ("train\n", "str")])
def test_the_error_for_yaml_without_a_mapping_contains_its_type(yaml_file, text, kind):
    path = yaml_file(text)
    with pytest.raises(UsageError, match=f"^{path} must contain a mapping, not a {kind}$"):
        parse(RunSpec, [path])


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_class", SPECS)
def test_the_help_contains_every_setting_with_its_docstring_and_no_python_types(
    spec_class, help_text
):
    text = help_text(spec_class)
    assert text.startswith("usage: python -m ray_jobs.verb [-h] ")
    assert "What it does." in text
    for path, field in flatten(spec_class).items():
        assert field.description, f"{path} has no docstring"
        assert path.upper() in text or f"--{path} " in text
        assert "".join(field.description.split()) in "".join(text.split())
    for name in ("<class", "typing.", "Undefined"):
        assert name not in text


def test_the_help_contains_type_and_default_of_each_kind_of_setting(help_text):
    text = help_text(RunSpec)
    for line in (
        "--train.epochs INT Maximum number of passes over the training rows. (default: 50)",
        "--train.use_gpu true|false ",
        "--train.resources_per_worker {name: NUMBER} ",
        "--train.decision_threshold NUMBER|f1|balanced_accuracy ",
        "--model.numeric.units INT,… ",
        "(default: 256,128)",
        "--prepare.numeric_columns TEXT,…|none ",
        "train options The training loop and its workers.",
    ):
        assert line in text
    assert "--run TEXT Run folder" in help_text(EvaluateSpec)


def test_help_shows_the_sections_of_the_verb_and_help_all_shows_the_others(help_text):
    text = help_text(RunSpec, "run", "model", "train")
    assert "--train.epochs" in text
    assert "--model.image.kind" in text
    assert "--prepare.images" not in text
    assert "--help_all" in text
    assert "--prepare.images" in help_text(RunSpec, "train", flag="--help_all")
