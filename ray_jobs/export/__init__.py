"""Converts the model of a trained run for other runtimes, and measures what the conversion costs.

Input: a trained run, and rows of prepared data. Output: the converted model and export.json.

    conversion   SavedModel, ONNX and LiteRT files
    runners      calls them in their own runtimes
    photo_check  compares image files in the SavedModel with `predict`
    job          converts, compares with the model of the run, and writes the result
"""

from ray_jobs.export.job import export

__all__ = ["export"]
