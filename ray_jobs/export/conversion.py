"""Converts a model to ONNX and LiteRT files."""

import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ray_jobs.cluster.stderr_filter import drop_stderr_lines
from ray_jobs.config.errors import JobError
from ray_jobs.config.text import names_text
from ray_jobs.data.batch import INPUT_TYPES

_OPSET = 18  # the newest that tf2onnx writes
_FLOAT_CONVOLUTIONS = 3
"""The first convolutions stay in float32: they lose most and cost little."""
_MIN_WEIGHTS = 1024  # as in LiteRT's int8
_FAILED_OPERATION = re.compile(r'error: loc\(callsite\(fused\["(\w+):", "([^"@]+)@')
"""Name of an operation and its place in the model, in errors of the LiteRT converter."""


def write_onnx(model: Any, path: str, calibration: Iterable[Mapping[str, Any]] | None) -> None:
    """Write a model as an ONNX file whose inputs have the names of the model's inputs.

    Args:
        model: A `FusionModel` or `MeanModel`.
        path: The file.
        calibration: For int8, batches of inputs by which the ranges of activations are chosen. None
            for float32.

    Raises:
        JobError: If ONNX lacks an operation of the model; it names the operation and its layer.
    """
    import onnx
    import tensorflow as tf
    import tf2onnx

    signature = {
        name: tf.TensorSpec(tensor.shape, INPUT_TYPES[name], name=name)  # type: ignore[call-arg]
        for name, tensor in model.network.input.items()
    }
    function = tf.function(
        lambda inputs: {"probability": model(inputs, training=False)},
        input_signature=[signature],
        autograph=False,
    )
    with _unsupported_operations() as unsupported, _functions_inlined():
        converted, _ = tf2onnx.convert.from_function(
            function,
            input_signature=[signature],
            opset=_OPSET,
            custom_op_handlers={"Erfc": (_erfc, [])},
        )
    if unsupported:
        raise _lacking("ONNX", unsupported, "--format litert or saved_model")
    _store_constants(converted.graph, function.get_concrete_function().graph.captures)
    onnx.save(converted, path)
    if calibration is not None:
        _quantize_onnx(path, calibration)


def write_litert(saved_model: str, path: str, precision: str) -> None:
    """Write a SavedModel as a LiteRT file with the signature `serve`.

    With float16, large matrices of weights are stored in half precision. With int8, they are stored
    as int8, and activations are quantized when the model is called.

    Raises:
        JobError: If LiteRT lacks an operation of the model; it names the operation and its layer.
    """
    import tensorflow as tf

    converter: Any = tf.lite.TFLiteConverter.from_saved_model(saved_model, ["serve"])
    converter.experimental_enable_resource_variables = False
    if precision == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        with drop_stderr_lines("loc(", "error: failed"):
            content = converter.convert()
    # The converter raises an internal class.
    except Exception as error:
        found = _FAILED_OPERATION.findall(str(error))
        if not found:
            raise JobError(f"LiteRT cannot convert the model: {error}") from error
        raise _lacking("LiteRT", found, "--format onnx or saved_model") from error
    with open(path, "wb") as file:
        file.write(_halve_weights(content) if precision == "float16" else content)


def _lacking(runtime: str, operations: Iterable[tuple[str, str]], instead: str) -> JobError:
    """Return the error for operations (name and place in the model) that a runtime lacks."""
    first = {name: place for name, place in reversed(list(operations))}
    named = names_text(f"{name} (in {place})" for name, place in first.items())
    return JobError(f"{runtime} lacks operations of the model: {named}; use {instead}")


def _halve_weights(content: bytes) -> bytes:
    """Store the weights of a LiteRT model as float16; its runtime converts them to float32.

    TensorFlow's converter would also halve the means and bin edges of columns, in which half
    precision has too few digits, and which it cannot store at all beyond 65,504.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    code: Any = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    model.operatorCodes.append(code)
    halved: set[int] = set()
    for graph in model.subgraphs:
        replaced: dict[int, int] = {}
        for index, tensor in enumerate(list(graph.tensors)):
            if tensor.type != schema.TensorType.FLOAT32 or len(tensor.shape) < 2:
                continue
            buffer = model.buffers[tensor.buffer]
            if tensor.buffer not in halved:
                if buffer.data is None or np.prod(tensor.shape) < _MIN_WEIGHTS:
                    continue
                weights = np.frombuffer(buffer.data, np.float32).astype(np.float16)
                buffer.data = np.frombuffer(weights.tobytes(), np.uint8)
                halved.add(tensor.buffer)
            converted: Any = schema.TensorT()
            converted.name, converted.shape = tensor.name, tensor.shape
            converted.type, converted.buffer = tensor.type, 0
            tensor.name, tensor.type = tensor.name + b"/float16", schema.TensorType.FLOAT16
            replaced[index] = len(graph.tensors)
            graph.tensors.append(converted)
        for operator in graph.operators:
            operator.inputs = [replaced.get(index, index) for index in operator.inputs]
        for half, full in replaced.items():
            operator: Any = schema.OperatorT()
            operator.opcodeIndex = len(model.operatorCodes) - 1
            operator.inputs, operator.outputs = [half], [full]
            graph.operators.insert(0, operator)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _quantize_onnx(path: str, calibration: Iterable[Mapping[str, Any]]) -> None:
    """Quantize convolutions by calibrated ranges, and products of matrices by those of each call.

    Weights have 7 bits (`reduce_range`), because sums of 8-bit products overflow on CPUs without
    VNNI instructions.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Mapping[str, Any]] = iter(calibration)

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        # Merges batch norms into convolutions, whose ranges would be wide without them.
        merged, static = f"{folder}/merged.onnx", f"{folder}/static.onnx"
        quant_pre_process(path, merged, skip_symbolic_shape=True)
        nodes = onnx.load(merged, load_external_data=False).graph.node
        convolutions = [node.name for node in nodes if node.op_type == "Conv"]
        if len(convolutions) > _FLOAT_CONVOLUTIONS:
            quantize_static(
                merged,
                static,
                Batches(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Clip", "Relu"],
                nodes_to_exclude=convolutions[:_FLOAT_CONVOLUTIONS],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
            merged = static
        quantize_dynamic(
            merged, path, op_types_to_quantize=["MatMul"], reduce_range=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip


def _store_constants(graph: Any, captures: Iterable[tuple[Any, Any]]) -> None:
    """Store the tensors that a TensorFlow graph captures, which tf2onnx leaves as inputs.

    Args:
        graph: The ONNX graph.
        captures: The tensors, and their placeholders in the TensorFlow graph.
    """
    from onnx import numpy_helper

    captured = {placeholder.name: tensor for tensor, placeholder in captures}
    for value in [value for value in graph.input if value.name in captured]:
        constant = numpy_helper.from_array(captured[value.name].numpy(), value.name)
        graph.initializer.append(constant)
        graph.input.remove(value)


def _erfc(ctx: Any, node: Any, name: str, args: Any) -> None:
    """Express erfc(x), which ONNX lacks, as 1 - erf(x)."""
    (output,) = node.output
    source = list(node.input)
    ctx.remove_node(node.name)
    one = ctx.make_const(f"{name}/one", np.ones((), np.float32))
    erf = ctx.make_node("Erf", source, name=f"{name}/erf")
    ctx.make_node("Sub", [one.output[0], erf.output[0]], outputs=[output], name=name)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the advice that onnxruntime logs on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _functions_inlined() -> Iterator[None]:
    """Trace functions within functions as their operations.

    Keras compiles convolutions of groups with XLA, and tf2onnx cannot convert calls of functions
    that are compiled.
    """
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextmanager
def _unsupported_operations() -> Iterator[list[tuple[str, str]]]:
    """Collect the operations that tf2onnx reports as unsupported, instead of printing them.

    Each has a name, and a place in the model.
    """
    found: list[tuple[str, str]] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Tensorflow op ["):
                place, _, name = text.partition("[")[2].partition("]")[0].partition(": ")
                found.append((name, place))

    root = logging.getLogger("tf2onnx")
    handler, propagate, level = Collector(), root.propagate, root.level
    root.addHandler(handler)
    root.propagate = False
    root.setLevel(logging.ERROR)
    try:
        yield found
    finally:
        root.removeHandler(handler)
        root.propagate = propagate
        root.setLevel(level)
