"""Settings of `prepare`: where images and tables are, what the columns mean, and what is stored.

Imports neither Ray nor TensorFlow.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from mm_model.spec import Spec

Split = Literal["train", "validation", "test"]
NumberRule = (
    Literal[
        "range_low", "range_mean", "range_high", "decimal_comma", "thousands", "money", "unit",
        "boolean", "date", "year", "month", "weekday", "missing",
    ]
    | Annotated[
        str, Field(pattern="^(unit:.+|money:[.,]|(date|year|month|weekday):(dmy|mdy))$")
    ]
)  # fmt: skip
TextRule = Annotated[str, Field(pattern=r"^(text|number|boolean|digits_[1-9][0-9]?)$")]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class PrepareSpec(Spec):
    """Conversion of images and a table into shards with a manifest."""

    dry_run: bool = False
    """Print what the columns are, how the rows would be split, and the first problems, from the
    table and a sample of the images, and write nothing."""
    source: Literal["auto", "folder", "parquet", "webdataset", "tfrecord", "imagefolder"] = "auto"
    """Format of `images`: image files, Parquet with an image column, WebDataset tar files, TFRecord
    files of `tf.train.Example`, or a Hugging Face ImageFolder; `auto` detects it."""
    images: str = ""
    """Folder, glob or URI of the images, or of the files that contain them. For images in several
    folders, give a glob such as `'photos/*/*.jpg'`."""
    table: str = ""
    """CSV, Parquet, JSON or Excel file with the keys, labels and numbers, or a folder or glob of
    such files (path or URI); empty if `images` also contains these columns."""
    output: str = "prepared"
    """Folder or URI for the prepared data; every worker must be able to read from it."""
    key_column: str = "key"
    """Column with the unique key of each row. Default: `key`, or if there is none, the column that
    the images are named after, or the first id or text that is different in each row."""
    columns: Literal["confirm", "auto"] = "confirm"
    """What happens to columns without a setting. `confirm` uses those that are clearly numbers and
    prints proposals for the others, as flags to copy; `auto` follows these proposals."""
    label_column: str = "label"
    """Column with the label: 0/1, true/false, yes/no, or other words."""
    positive_label: tuple[str, ...] = ()
    """Labels of the positive class. Default: 1, true, yes and the like."""
    other_labels: Literal["negative", "quarantine"] | None = None
    """Whether rows with further labels, beyond the positive ones and the most frequent other one,
    are negative or go to quarantine. Default: negative if `positive_label` is set."""
    unlabelled: tuple[str, ...] = ()
    """Labels that mean unlabelled, such as `-1,unknown`; `''` is an empty cell. Their rows are
    skipped, and do not count as bad rows."""
    weight_column: str | None = None
    """Column with a positive weight for each row, used in training, validation, calibration and
    evaluation; class weights multiply it."""
    image_pattern: str = "{key}.jpg"
    """Image path relative to `images`, with column names in braces; `{key}` is the key column. A
    column can have a format, such as `{id:05d}.jpg`; the extension `.*` matches any image file.
    Default: `{key}.jpg`, or if no image has such a name, found by the names of the images."""
    image_column: str | None = None
    """Column with the image path relative to `images`, instead of the pattern; for Parquet and
    TFRecord files, the column with the image itself."""
    image_separator: str | None = None
    """Separator of several image paths in one cell of `image_column`, such as `;`. The row has as
    many images as the longest cell has paths."""
    image_columns: tuple[str, ...] = ()
    """Names of the images if each row has several. Each name is either a column, as in
    `image_column`, or a value to insert for `{image}` in `image_pattern`. The model uses all of
    them; some may be missing."""
    numeric_columns: tuple[str, ...] | None = None
    """Numeric input columns. Default: every numeric column without another role, except for row
    numbers, ids, constants and copies of the label."""
    number_rules: dict[str, NumberRule] = Field(default_factory=dict)
    """How to read text in a numeric column, such as {age: range_mean}. The range rules read `91-92`
    as its low end, mean or high end, and an open range such as `50+` as its only bound;
    `decimal_comma` reads `1.234,5`, `thousands` `1,234.5`, `money` `$1,234` and `unit` `12 kg`, in
    the most frequent unit or the one in `unit:kg`; `boolean` reads yes and no as 1 and 0; `date`
    converts dates to days since 1970-01-01, and `year`, `month` and `weekday` (0 is Monday) to
    these parts. The decimal mark of money and the order of day and month are found in the column,
    or set, as in `{price: "money:,", sold: date:dmy}`. `missing` treats any text that is not a
    number as missing. Without a rule, rows with such text go to quarantine."""
    text_rules: dict[str, TextRule] = Field(default_factory=dict)
    """How to read keys, groups and words, so that equal cells of CSV, Parquet and Excel files are
    equal: `number` reads 1.0 and 01 as 1, `digits_5` reads 1234 as 01234, `boolean` reads yes, True
    and 1 as true, and `text` changes no digits. Default: chosen for each column and stored."""
    exclude_columns: tuple[str, ...] = ()
    """Columns that are never inputs."""
    group_column: str | None = None
    """Rows with the same value in this column, such as a patient id, go to the same split."""
    split_column: str | None = None
    """Column that assigns each row to train, validation or test, also spelled `val`, `valid`, `dev`
    and so on. Without validation rows, they are cut from the training rows. Default: assigned by a
    hash of `group_column` if it is set, else of the key."""
    split_keys: dict[Split, str] = Field(default_factory=dict)
    """For each split, a text file (path or URI) with the keys of its rows, one per line, instead of
    `split_column`; other rows are training rows."""
    fold_column: str | None = None
    """Column with the fold of each row, stored for cross-validation; never an input."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of each class that goes to the validation split, which is used for early stopping,
    blending and calibration."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of each class that goes to the test split."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """Storage format of images: JPEG, or raw pixels, which are larger but need no decoding."""
    pixel_range: tuple[float, float] | None = None
    """Values of black and white in images with more than 8 bits, such as `0,4095`. Default: the
    range that a sample of the images uses."""
    missing_image: Literal["quarantine", "keep"] = "quarantine"
    """What happens to rows whose image is missing: `keep` predicts them from their numbers and
    words alone. Rows with a damaged image always go to quarantine."""
    image_size: PositiveInt = 456
    """Side length of stored images in pixels, and of the model's input unless `data.image_size` is
    set."""
    aspect: Literal["stretch", "crop", "pad"] = "stretch"
    """How images become square: stretched, cropped to the center, or padded with black."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality of stored images."""
    max_image_pixels: PositiveInt = 100_000_000
    """Images with more pixels are rejected before decoding."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The job fails if a larger fraction of the rows goes to quarantine."""
    rows_per_shard: PositiveInt = 1024
    """Maximum rows per Parquet file; reduced automatically for large raw images."""
    rows_per_group: PositiveInt = 64
    """Maximum rows per Parquet row group, the smallest unit that is read; reduced automatically for
    large raw images."""

    @field_validator("positive_label", "unlabelled", mode="before")
    @classmethod
    def _accept_one_label(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("pixel_range")
    @classmethod
    def _require_two_values(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < abs(value[1] - value[0]) < float("inf"):
            raise ValueError("black and white must be two different finite values, such as 0,4095")
        return value

    @model_validator(mode="after")
    def _require_training_rows(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction="
                f"{self.test_fraction} leave no rows for training; their sum must be below 1"
            )
        return self
