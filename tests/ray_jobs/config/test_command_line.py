from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config.command_line import flatten, help_text, parse
from ray_jobs.config.errors import UsageError
from ray_jobs.config.spec import DemoSpec, EvaluateSpec, InspectSpec, PredictSpec, RunSpec

SPECS = (RunSpec, InspectSpec, EvaluateSpec, PredictSpec, DemoSpec)


def setting(spec: Any, path: str) -> Any:
    for name in path.split("."):
        spec = getattr(spec, name)
    return spec


def usage_error(*arguments: str, spec_class: Any = RunSpec) -> str:
    with pytest.raises(UsageError) as caught:
        parse(spec_class, arguments)
    return str(caught.value)


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


def test_a_flag_keeps_the_other_settings_of_a_yaml_section(yaml_file):
    path = yaml_file("model:\n  image: {kind: tiny, weights: null, units: 8}\n  l2: 0.5\n")
    spec = parse(RunSpec, [path, "--model.image.units", "16"])
    assert (spec.model.image.kind, spec.model.image.units, spec.model.l2) == ("tiny", 16, 0.5)


def test_no_arguments_give_the_defaults():
    assert parse(RunSpec, []) == RunSpec()


def test_the_last_of_two_equal_flags_wins():
    assert parse(RunSpec, ["--train.epochs", "3", "--train.epochs=4"]).train.epochs == 4


def test_a_list_flag_that_is_given_twice_is_refused():
    error = usage_error("--data.categorical", "a", "--data.categorical", "b")
    assert error.startswith("--data.categorical is given twice; give all values at once")


@pytest.mark.parametrize(
    "arguments",
    [["data"], ["--prepared", "data"], ["data", "--max_rows", "9"], ["--max_rows=9", "data"]],
)
def test_the_positional_setting_of_a_flat_spec_can_be_anywhere_or_a_flag(arguments):
    assert parse(InspectSpec, arguments).prepared == "data"


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
def test_a_flag_takes_its_value_after_a_space_or_an_equals_sign(path, text, value):
    extra = ["--model.image.kind", "tiny"] if path == "model.image.weights" else []
    for arguments in ([f"--{path}", text], [f"--{path}={text}"]):
        parsed = setting(parse(RunSpec, [*extra, *arguments]), path)
        assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(("text", "workers"), [("2", 2), ("1,4", (1, 4)), ("[1, 4]", (1, 4))])
def test_a_flag_takes_one_number_or_a_pair(text, workers):
    assert parse(RunSpec, ["--train.num_workers", text]).train.num_workers == workers


def test_the_error_for_a_wrong_number_of_values_contains_what_is_accepted():
    for value in ("10", "1,2,3", "[]"):
        with pytest.raises(UsageError) as error:
            parse(RunSpec, ["--run.profile_steps", value])
        setting = f"run.profile_steps='{value.strip('[]')}'"
        assert str(error.value) == f"{setting} is invalid (accepted: INT,INT|none)"


def test_yaml_gives_the_same_types_as_flags(yaml_file):
    path = yaml_file(
        "train: {learning_rate: 1e-3, decision_threshold: f1, resources_per_worker: {a: 2}}\n"
        "prepare: {numeric_columns: [area, rooms]}\n"
    )
    spec = parse(RunSpec, [path])
    assert spec.train.learning_rate == 1e-3
    assert spec.train.decision_threshold == "f1"
    assert spec.train.resources_per_worker == {"a": 2.0}
    assert spec.prepare.numeric_columns == ("area", "rooms")


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


# -- unknown keys ---------------------------------------------------------------------------------


def test_the_error_for_an_unknown_flag_contains_the_nearest_and_the_accepted_ones():
    message = usage_error("--train.epoch", "3")
    assert message.startswith("unknown flag --train.epoch; did you mean 'train.epochs'? ")
    assert "(accepted in train: optimizer, learning_rate, " in message
    assert ", epochs, " in message


def test_the_error_for_an_unknown_section_contains_the_sections():
    message = usage_error("--trian.epochs", "3")
    assert message.startswith("unknown flag --trian.epochs; did you mean 'train.epochs'? ")
    assert "(sections: data, model, model.augmentation, " in message


def test_the_error_for_a_flag_without_its_section_suggests_the_section():
    assert "did you mean 'train.epochs'?" in usage_error("--epochs", "3")


def test_the_error_for_an_unknown_flag_of_a_flat_spec_contains_all_flags():
    message = usage_error("--splt", "test", spec_class=EvaluateSpec)
    assert message.startswith("unknown flag --splt; did you mean 'split'? (accepted: run, data, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 3}",
         "train.epoch: train has no key 'epoch'; did you mean 'epochs'? (accepted: optimizer,"),
        ("trian: {epochs: 3}",
         "trian: the spec has no key 'trian'; did you mean 'train'? (accepted: run, prepare,"),
        ("model: {image: {knd: tiny}}",
         "model.image.knd: model.image has no key 'knd'; did you mean 'kind'? (accepted: kind,"),
        ("1: 2", "1=1: Keys should be strings"),
    ],
)  # fmt: skip
def test_the_error_for_an_unknown_yaml_key_contains_the_nearest_and_the_accepted_ones(
    yaml_file, text, message
):
    assert usage_error(yaml_file(text)).startswith(message)


def test_the_error_for_an_unknown_key_in_a_list_contains_its_index_and_the_accepted_ones():
    message = r"train.stages.0.epochs is required .*\n.*no key 'epoch'; did you mean 'epochs'\?"
    with pytest.raises(UsageError, match=message):
        parse(RunSpec, ["--train.stages", "[{epoch: 3}]"])


def test_every_invalid_key_or_value_has_its_own_line(yaml_file):
    message = usage_error(yaml_file("train: {epoch: 3, patience: x}\nmodel: {l2: -1}\n"))
    assert [line.split(":")[0] for line in message.splitlines()] == [
        "model.l2=-1", "train.patience='x'", "train.epoch",
    ]  # fmt: skip


# -- invalid values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "uri"),
    [
        ("data.prepared", "s3://key:hunter2@bucket/prepared"),
        ("run.tracking_uri", "https://me:hunter2@host/mlflow"),
        ("model.image.weights", "https://:hunter2@host/x.weights.h5"),
    ],
)
def test_a_password_in_a_setting_is_refused_and_not_repeated(flag, uri):
    with pytest.raises(
        UsageError, match=rf"{flag} contains a password.*AWS_ACCESS_KEY_ID"
    ) as error:
        parse(RunSpec, [f"--{flag}", uri])
    assert "hunter2" not in str(error.value)
    parse(RunSpec, [f"--{flag}", "hdfs://me@host:8020/a:b@c"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("train.epochs=x", "train.epochs='x': Input should be a valid integer"),
        ("train.epochs=0", "train.epochs='0': Input should be greater than 0"),
        ("train.max_failures=-2", "train.max_failures='-2': Input should be greater than or equal"),
        ("train.use_gpu=maybe", "train.use_gpu='maybe': Input should be a valid boolean"),
        ("train.learning_rate=inf", "train.learning_rate='inf': Input should be a finite number"),
        ("train.learning_rate=nan", "train.learning_rate='nan': Input should be a finite number"),
        ("train.monitor=roc_auc", "train.monitor='roc_auc' is invalid; did you mean "
         "'val/roc_auc'? (accepted: val/log_loss, val/roc_auc, val/pr_auc)"),
        ("model.image.kind=efficientnet_b", "model.image.kind='efficientnet_b': unknown "
         "image branch 'efficientnet_b'; did you mean 'efficientnet_b"),
        ("model.numeric.units=8,x", "model.numeric.units.1='x': Input should be a valid integer"),
        ("model.numeric.units=[8,", "model.numeric.units='[8,' is not valid YAML: "),
        ("train.resources_per_worker=a", "train.resources_per_worker='a': Input should be a valid "
         "dictionary"),
        ("train.resources_per_worker={a: -1}", "train.resources_per_worker.a=-1: Input should be "
         "greater than 0"),
        ("train.decision_threshold=f2", "train.decision_threshold='f2' is invalid; did you mean "
         "'f1'? (accepted: NUMBER|f1|balanced_accuracy)"),
        ("train.decision_threshold=1.4", "train.decision_threshold='1.4': Input should be less "
         "than 1 (accepted: NUMBER|f1|balanced_accuracy)"),
        ("train.decision_threshold=", "train.decision_threshold='' is invalid (accepted: NUMBER|"),
        ("run.name=a/b", "run.name='a/b': must be one folder name"),
        ("train.num_workers=3", "train: global_batch_size=32 cannot be divided equally among "
         "num_workers=3; use num_workers=1, 2, 4, 8, 16 or 32"),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_value_is_one_line_with_path_value_and_what_is_accepted(
    flag, message
):
    error = usage_error(f"--{flag}")
    assert error.startswith(message)
    assert "\n" not in error


def test_the_error_for_an_invalid_type_in_yaml_is_one_line(yaml_file):
    message = usage_error(yaml_file("train: {decision_threshold: [1, 2]}"))
    accepted = "NUMBER|f1|balanced_accuracy"
    assert message == f"train.decision_threshold='1,2' is invalid (accepted: {accepted})"


def test_the_error_for_a_value_in_place_of_a_section_contains_its_keys(yaml_file):
    message = usage_error(yaml_file("model: {fusion: skip_concat}"))
    assert message.startswith(
        "model.fusion='skip_concat': must be a section, not a value (accepted: kind, units, "
    )


@pytest.mark.parametrize("rest", [[], ["--train.patience", "3"]])
def test_the_error_for_a_flag_without_a_value_contains_its_type(rest):
    assert usage_error("--train.epochs", *rest) == "--train.epochs needs a value (INT)"


def test_a_boolean_flag_needs_a_value():
    assert usage_error("--train.use_gpu") == "--train.use_gpu needs a value (true|false)"


def test_the_error_for_a_missing_required_setting_contains_its_flag():
    message = usage_error("--run", "r", "--data", "d", spec_class=PredictSpec)
    assert message == "output is required; set it with --output"


def test_a_missing_or_repeated_positional_setting_is_an_error():
    missing = usage_error("--max_rows", "9", spec_class=InspectSpec)
    assert missing == "prepared is required; set it with PREPARED or --prepared"
    twice = usage_error("a", "--prepared", "b", spec_class=InspectSpec)
    assert twice == "prepared is given twice: 'a' and 'b'; give only one of them"


@pytest.mark.parametrize(
    ("spec_class", "arguments"),
    [
        (RunSpec, ["{yaml}", "more.yaml"]),
        (RunSpec, ["--train.epochs", "3", "more.yaml"]),
        (EvaluateSpec, ["more.yaml"]),
        (InspectSpec, ["data", "more.yaml"]),
    ],
)
def test_an_extra_argument_is_an_error(yaml_file, spec_class, arguments):
    path = yaml_file("train: {epochs: 3}")
    given = [path if a == "{yaml}" else a for a in arguments]
    message = usage_error(*given, spec_class=spec_class)
    assert message.startswith("unexpected argument 'more.yaml'; give ")


# -- invalid YAML ---------------------------------------------------------------------------------


def test_the_error_for_a_missing_yaml_file_contains_its_name():
    assert "could not read nowhere.yaml: " in usage_error("nowhere.yaml")


@pytest.mark.parametrize("text", ["train: [", "train: {epochs: 3", "\tx: 1"])
def test_the_error_for_invalid_yaml_contains_the_file(yaml_file, text):
    path = yaml_file(text)
    assert usage_error(path).startswith(f"could not read {path}: ")


def test_the_error_for_a_binary_file_in_place_of_yaml_contains_its_name(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00")
    assert usage_error(str(path)).startswith(f"could not read {path}: ")


@pytest.mark.parametrize(("text", "kind"), [("- train\n", "list"), ("train\n", "str")])
def test_the_error_for_yaml_without_a_mapping_contains_its_type(yaml_file, text, kind):
    path = yaml_file(text)
    assert usage_error(path) == f"{path} must contain a mapping, not a {kind}"


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_class", SPECS)
def test_the_help_contains_every_setting_with_its_docstring(spec_class):
    text = help_text(spec_class, "python -m ray_jobs.verb", "What it does.")
    words = " ".join(text.split())
    for path, field in flatten(spec_class).items():
        assert field.description, f"{path} has no docstring"
        assert f"--{path} " in words
        assert " ".join(field.description.split()) in words


@pytest.mark.parametrize("spec_class", SPECS)
def test_the_help_contains_no_python_types(spec_class):
    text = help_text(spec_class, "python -m ray_jobs.verb", "")
    assert "<class" not in text
    assert "typing." not in text
    assert "Undefined" not in text


def test_the_help_contains_type_and_default_of_each_kind_of_setting():
    lines = help_text(RunSpec, "python -m ray_jobs.train", "Train.").splitlines()
    assert lines[0] == "usage: python -m ray_jobs.train [SPEC.yaml] [--section.key value …]"
    for line in (
        "  --train.epochs INT  (default 50)",
        "  --train.use_gpu true|false  (default false)",
        "  --train.resources_per_worker {name: NUMBER}  (default empty)",
        "  --train.decision_threshold NUMBER|f1|balanced_accuracy  (default 0.5)",
        "  --model.numeric.units INT,…  (default 256,128)",
        "  --prepare.numeric_columns TEXT,…|none  (default none)",
        "train: The training loop and its workers.",
    ):
        assert line in lines


def test_the_help_of_a_flat_spec_marks_required_settings():
    lines = help_text(EvaluateSpec, "python -m ray_jobs.evaluate", "").splitlines()
    assert lines[0] == "usage: python -m ray_jobs.evaluate [--key value …]"
    assert "  --run TEXT  (required)" in lines


def test_the_help_contains_the_positional_setting_in_the_usage_and_among_the_flags():
    lines = help_text(InspectSpec, "python -m ray_jobs.inspect", "").splitlines()
    assert lines[0] == "usage: python -m ray_jobs.inspect PREPARED [--key value …]"
    assert "  PREPARED or --prepared TEXT  (required)" in lines
