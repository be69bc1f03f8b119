"""Calls exported models in their own runtimes, without Keras."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Runner = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Returns the probabilities (B,) of inputs by name."""


def open_saved_model(path: str, signature: str = "serve") -> Runner:
    """Return a function that calls a signature of a SavedModel."""
    import tensorflow as tf

    loaded: Any = tf.saved_model.load(path)
    call = loaded.signatures[signature]

    def run(inputs: Mapping[str, Any]) -> np.ndarray:
        tensors = {name: tf.constant(values) for name, values in inputs.items()}
        return call(**tensors)["probability"].numpy()[:, 0]

    run.loaded = loaded  # type: ignore[attr-defined]  # the signature does not keep its variables
    return run


def open_onnx(path: str) -> Runner:
    """Return a function that calls an ONNX file on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        (probability_B1,) = session.run(None, {name: inputs[name] for name in names})
        return np.asarray(probability_B1)[:, 0]

    return run


def open_litert(path: str) -> Runner:
    """Return a function that calls a LiteRT file on one thread."""
    from ai_edge_litert.interpreter import Interpreter

    signature: Any = Interpreter(path, num_threads=1).get_signature_runner("serve")
    names = list(signature.get_input_details())

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return signature(**{name: inputs[name] for name in names})["probability"][:, 0]

    return run
