"""Defines the endpoints: /predict, /explain, a page to try a row, the Open Inference Protocol.

Errors have the form `{"detail": …}`: 400 for an unreadable body, 401 without the token, 413 for a
large body, 422 for wrong columns. A row that cannot be used does not fail the others: its answer
has an `error`. Ray Serve itself answers in plain text: 503 if too many requests wait, 408 after
`timeout_s`.

Source of the protocol: Open Inference Protocol, version 2, REST.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ValidationError

from mm_model.nearest_match import did_you_mean
from ray_jobs.data.batch import IMAGE
from ray_jobs.pages.page_kit import render
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.serve.access_rules import AccessRules
from ray_jobs.serve.image_folders import ImageFolders
from ray_jobs.serve.request_rows import RequestError, Row, decode_image
from ray_jobs.serve.request_schema import MAX_ROWS, Answer, Maps, image_fields, request_model

Predict = Callable[[Sequence[Row]], Awaitable[Answer]]
Explain = Callable[[Row], Awaitable[Maps]]

_FORM = "multipart/form-data"


def make_app(
    run: TrainedRun,
    name: str,
    version: str,
    predict: Predict,
    explain: Explain,
    folders: ImageFolders,
    token: str | None,
    max_bytes: int,
    is_private: bool,
) -> FastAPI:
    """Return the application.

    Args:
        run: The run, whose manifest determines the columns of requests.
        name: Name of the model.
        version: Version of the model.
        predict: Predicts rows.
        explain: Draws maps of the images of a row.
        folders: Folders whose images requests may name.
        token: Bearer token that clients must send; None allows everybody.
        max_bytes: Maximum size of a request's body.
        is_private: Whether the server listens on loopback.
    """
    app = FastAPI(
        title=name,
        version=version,
        description="Probability of "
        f"{run.manifest.positive_label!r} from the columns that the model was trained on.",
    )
    rules = {"token": token, "max_bytes": max_bytes, "is_private": is_private}
    app.add_middleware(AccessRules, **rules)
    model = request_model(run)
    columns = [str(field.alias) for field in _row_model(model).model_fields.values()]
    numbers = run.decoder.manifest.numeric_columns
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    def describe(request: Request, error: Any) -> JSONResponse:
        problems = error.errors()
        status = 400 if problems[0]["type"] == "json_invalid" else 422
        return JSONResponse({"detail": _problems(problems, columns)}, status)

    @app.exception_handler(_UnreadableError)
    def reject(request: Request, error: _UnreadableError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(RequestError)
    def refuse(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    body = {"content": {"application/json": {"schema": schema}, _FORM: {"schema": _form(model)}}}

    @app.post("/predict", openapi_extra={"requestBody": {"required": True, **body}})
    async def predict_rows(request: Request) -> Answer:
        """Predict one row or many, as JSON, or one row as a form with image files."""
        return await predict(await read_rows(request))

    async def read_rows(request: Request) -> list[Row]:
        if request.headers.get("content-type", "").lower().startswith(_FORM):
            return [await _form_row(request, run, model, folders)]
        try:
            content = await request.json()
        except (ValueError, RecursionError) as error:
            raise _UnreadableError(f"the body is not JSON: {error}") from error
        return _rows(model.model_validate(content), run, folders)

    if IMAGE in run.input_shapes:

        @app.post("/explain", openapi_extra={"requestBody": {"required": True, **body}})
        async def explain_row(request: Request) -> Maps:
            """Draw maps of the images of one row, in the form of a request to /predict."""
            rows = await read_rows(request)
            if len(rows) > 1:
                raise RequestError("/explain takes one row")
            return await explain(rows[0])

    page = _page(run, name)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def try_row() -> str:
        return page

    @app.get("/v2/health/live")
    @app.get("/v2/health/ready")
    def health() -> dict[str, bool]:
        """Whether the server answers; a replica is reachable only after its model is warm."""
        return {"live": True, "ready": True}

    @app.get(f"/v2/models/{name}")
    def metadata() -> dict[str, Any]:
        """Return the inputs and outputs of the Open Inference Protocol."""
        return {
            "name": name,
            "versions": [version],
            "platform": "keras",
            "inputs": [
                _tensor(column, "FP64" if column in numbers else "BYTES") for column in columns
            ],
            "outputs": [_tensor("probability", "FP64"), _tensor("label", "BYTES")],
        }

    @app.get(f"/v2/models/{name}/ready")
    def is_model_ready() -> dict[str, Any]:
        """Whether the model answers."""
        return {"name": name, "ready": True}

    @app.post(f"/v2/models/{name}/infer")
    async def infer(request: _Inference) -> dict[str, Any]:
        """Predict rows given as one tensor per column: numbers, or BYTES for texts and images."""
        rows = model.model_validate({"rows": _tensor_rows(request.inputs)})
        answer = await predict(_rows(rows, run, folders))
        for prediction in answer.predictions:
            if prediction.error:
                raise RequestError(f"row {prediction.key}: {prediction.error}")
        outputs = {
            "probability": ("FP64", [p.probability for p in answer.predictions]),
            "label": ("BYTES", [p.label for p in answer.predictions]),
        }
        return {
            "model_name": name,
            "model_version": version,
            "id": request.id,
            "outputs": [
                {"name": name, "shape": [len(data)], "datatype": kind, "data": data}
                for name, (kind, data) in outputs.items()
            ],
        }

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = FastAPI.openapi(app)
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _page(run: TrainedRun, name: str) -> str:
    """Return the page on which a person tries a row."""
    manifest = run.decoder.manifest
    return render(
        "serve/try_page.html.j2",
        title=name,
        name=name,
        positive_label=manifest.positive_label,
        images=image_fields(run),
        image_required=not manifest.image.has_nulls,
        numbers=manifest.numeric_columns,
        words={vocabulary.column: vocabulary.words for vocabulary in manifest.vocabularies},
        texts=manifest.text_columns,
        can_explain=IMAGE in run.input_shapes,
    )


class _UnreadableError(Exception):
    """The body of a request is not JSON."""


class _InputTensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class _Inference(BaseModel):
    id: str | None = None
    inputs: list[_InputTensor]


def _row_model(model: type[BaseModel]) -> type[BaseModel]:
    annotation: Any = model.model_fields["rows"].annotation
    return annotation.__args__[0]


def _rows(request: BaseModel, run: TrainedRun, folders: ImageFolders) -> list[Row]:
    """Return the rows of a valid request by column."""
    rows: list[Row] = []
    images = image_fields(run)
    for position, row in enumerate(request.rows):  # type: ignore[attr-defined]
        cells = row.model_dump(by_alias=True)
        for name in images:
            if cells.get(name):
                try:
                    cells[name] = decode_image(cells[name], folders)
                except RequestError as error:
                    raise RequestError(f"row {position + 1}, {name}: {error}") from None
        rows.append(cells)
    return rows


async def _form_row(
    request: Request, run: TrainedRun, model: type[BaseModel], folders: ImageFolders
) -> Row:
    """Return the row of a form: cells as texts, images as files."""
    cells: dict[str, Any] = {}
    images: dict[str, bytes] = {}
    try:
        async with request.form() as form:
            for name, value in form.items():
                if isinstance(value, str):
                    cells[name] = value or None
                # A browser sends a field without a file as an empty file without a name.
                elif value.filename:
                    images[name] = await value.read()
    # The name of an encoding is unknown, or cannot decode the form.
    except (LookupError, UnicodeError) as error:
        raise _UnreadableError(f"the form cannot be read: {error}") from error
    names = image_fields(run)
    for name in images:
        if name not in names:
            raise RequestError(f"{name}: unknown column of images{did_you_mean(name, names)}")
    # A placeholder satisfies the schema, which expects base64.
    given = dict.fromkeys(images, "")
    (row,) = model.model_validate({"rows": [{**cells, **given}]}).rows  # type: ignore[attr-defined]
    found = row.model_dump(by_alias=True)
    for name in names:
        if found.get(name):
            found[name] = decode_image(found[name], folders)
    return {**found, **images}


def _form(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a form with the fields of one row."""
    properties = _row_model(model).model_json_schema()["properties"]
    fields = {
        name: {"type": "string", "description": field.get("description", "")}
        | ({"format": "binary"} if "image file" in field.get("description", "") else {})
        for name, field in properties.items()
    }
    return {"type": "object", "properties": fields}


def _tensor_rows(tensors: Sequence[_InputTensor]) -> list[dict[str, Any]]:
    """Return the rows of tensors of one value per row."""
    lengths = {len(tensor.data) for tensor in tensors}
    if len(lengths) != 1 or not 1 <= max(lengths) <= MAX_ROWS:
        raise RequestError(f"all inputs must have the same number of rows, 1 to {MAX_ROWS}")
    (count,) = lengths
    for tensor in tensors:
        if tensor.shape not in ([count], [count, 1]):
            raise RequestError(f"input {tensor.name!r} must have the shape [{count}]")
    return [{tensor.name: _cell(tensor.data[row]) for tensor in tensors} for row in range(count)]


def _cell(data: Any) -> Any:
    """Return the value of a row; the shape [rows, 1] may have nested data."""
    return data[0] if isinstance(data, list) and len(data) == 1 else data


def _tensor(name: str, datatype: str) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1]}


def _problems(errors: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Return one sentence for each problem of a request, without its values."""
    texts = []
    for error in errors[:10]:
        path = ".".join(str(part) for part in error["loc"] if part != "body")
        text = error["msg"]
        if error["type"] == "extra_forbidden":
            name = str(error["loc"][-1])
            text = f"unknown column{did_you_mean(name, columns)}"
        texts.append(f"{path}: {text}" if path else text)
    return list(dict.fromkeys(texts))
