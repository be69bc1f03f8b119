"""Defines the deployment: each replica loads the model of a run and predicts rows in batches."""

import asyncio
import hashlib
import logging
import os
import random
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.inference_spec import ServeSpec
from ray_jobs.data.batch import IMAGE
from ray_jobs.explain.map_overlay import overlay_map
from ray_jobs.predict.predictor import PROBABILITY, Predictor
from ray_jobs.predict.row_sources import ERROR
from ray_jobs.predict.trained_run import open_run
from ray_jobs.serve.access_rules import LOOPBACK
from ray_jobs.serve.batcher import Batcher
from ray_jobs.serve.http_api import make_app
from ray_jobs.serve.image_folders import ImageFolders
from ray_jobs.serve.replica_metrics import ReplicaMetrics
from ray_jobs.serve.request_rows import RequestError, RequestReader, Row, without_advice
from ray_jobs.serve.request_schema import Answer, Maps, Prediction, image_fields
from ray_jobs.storage.folder import split_file
from ray_jobs.train.finalize import MODEL

_VERSION_CHARACTERS = 12
_Outcome = tuple[float | None, str | None]
"""Probability of a row, or why there is none."""


class Replica:
    """Serves the model of a run; created by Ray Serve in a process of its own.

    Args:
        spec: Settings of the job.
        token: Bearer token that clients must send; None allows everybody.
        second: Handle of a replica of `second_run`, which answers some of the requests.
    """

    def __init__(self, spec: ServeSpec, token: str | None, second: Any = None) -> None:
        self.run, self.second = open_run(spec.run), second
        content = self.run.folder.read_bytes(MODEL)
        self.version = hashlib.sha256(content).hexdigest()[:_VERSION_CHARACTERS]
        self.name = split_file(str(self.run.folder))[1]
        self.folders = ImageFolders(spec.image_folders, int(spec.max_request_mb * 2**20))
        self.reader = RequestReader(self.run, self.folders)
        self.metrics = ReplicaMetrics(self.run)
        self.predictor = Predictor(
            self.run, spec.max_batch_size, spec.cpus_per_replica, spec.gpus_per_replica > 0,
            pad=False,
        )  # fmt: skip
        if self.predictor.failure:
            raise RuntimeError(self.predictor.failure)
        self.spec, self.token = spec, token
        # One call of the model at a time; images are decoded meanwhile.
        self.model_thread = ThreadPoolExecutor(1, "model")
        self.decode_threads = ThreadPoolExecutor(max(os.cpu_count() or 1, 2), "decode")
        self.explain_thread = ThreadPoolExecutor(1, "explain")
        self.batched = Batcher(self._predict_parts, self.model_thread, spec.max_batch_size)
        self._warm_up()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; called by Ray Serve after the constructor."""
        max_bytes = int(self.spec.max_request_mb * 2**20)
        return make_app(
            self.run, self.name, self.version, self._answer, self.explain, self.folders,
            self.token, max_bytes, self.spec.host in LOOPBACK,
        )  # fmt: skip

    async def _answer(self, rows: Sequence[Row]) -> Answer:
        """Answer a request with this model or the second one, whose failures fail no request."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        if self.second is not None and random.random() < self.spec.second_share:
            try:
                response = self.second.predict.remote(rows)
                return await asyncio.wait_for(response, self.spec.timeout_s / 2)
            except (RayError, RayServeException, TimeoutError) as error:
                reason = str(error) or "it does not answer"
                logging.getLogger("ray.serve").warning(f"the second model failed: {reason}")
        return await self.predict(rows)

    async def predict(self, rows: Sequence[Row]) -> Answer:
        """Return the answer for the rows of a request."""
        loop = asyncio.get_running_loop()
        prepare = self.reader.prepare_images
        prepared = await asyncio.gather(
            *(loop.run_in_executor(self.decode_threads, prepare, row) for row in rows)
        )
        size = self.spec.max_batch_size
        parts = [prepared[start : start + size] for start in range(0, len(rows), size)]
        names = (self.run.manifest.negative_label, self.run.manifest.positive_label)
        predictions: list[Prediction] = []
        for found in await asyncio.gather(*map(self.batched, parts)):
            if isinstance(found, str):
                raise RequestError(found)
            for probability, error in found:
                label = None if probability is None else names[probability >= self.run.threshold]
                key = self.reader.key(rows[len(predictions)], len(predictions))
                reason = error and without_advice(error)
                predictions.append(
                    Prediction(key=key, label=label, probability=probability, error=reason)
                )
        return Answer(
            predictions=predictions,
            positive_label=names[1],
            threshold=self.run.threshold,
            model=self.name,
            version=self.version,
        )

    async def explain(self, row: Row) -> Maps:
        """Return maps of the images of a row.

        Raises:
            RequestError: If the row cannot be used.
        """
        loop = asyncio.get_running_loop()
        table = await loop.run_in_executor(
            self.decode_threads, lambda: self.reader.read([self.reader.prepare_images(row)])
        )
        if error := table[ERROR][0].as_py():
            raise RequestError(without_advice(error))
        return await loop.run_in_executor(self.explain_thread, self._maps, table)

    def _maps(self, table: pa.Table) -> Maps:
        from mm_model.mean_model import own_codes
        from ray_jobs.explain.row_maps import image_maps

        model: Any = self.predictor.model
        inputs = self.predictor.inputs(table)
        is_positive = np.asarray(model(inputs))[:, 0] >= self.run.threshold
        models = zip(getattr(model, "models", [model]), getattr(model, "codes", [()]), strict=True)
        maps = [image_maps(one, own_codes(inputs, codes), is_positive) for one, codes in models]
        pixels = inputs[IMAGE].reshape(-1, *inputs[IMAGE].shape[-3:])
        drawn = {
            name: overlay_map(image, map_hw)
            for name, image, map_hw in zip(
                image_fields(self.run), pixels, np.mean(maps, axis=0), strict=True
            )
        }
        uris = {n: f"data:image/jpeg;base64,{b64encode(c).decode()}" for n, c in drawn.items()}
        return Maps(maps=uris)

    def _predict_parts(self, parts: list[list[Row]]) -> list[list[_Outcome] | str]:
        """Predict rows of several requests; return their outcomes, or why there are none."""
        tables = self._read_parts(parts)
        good = [table for table in tables if not isinstance(table, str)]
        outcomes: list[_Outcome] = []
        if good:
            rows = pa.concat_tables(good)
            predicted = pa.concat_tables(self.predictor(rows))
            if self.metrics.count(rows, predicted):
                self.explain_thread.submit(self.metrics.compare)
            columns = (predicted[name].to_pylist() for name in (PROBABILITY, ERROR))
            outcomes = list(zip(*columns, strict=True))
        found: list[list[_Outcome] | str] = []
        for table in tables:
            if isinstance(table, str):
                found.append(table)
            else:
                found.append(outcomes[: table.num_rows])
                outcomes = outcomes[table.num_rows :]
        return found

    def _read_parts(self, parts: list[list[Row]]) -> list[pa.Table | str]:
        """Return the rows of each part as a table, or why they cannot be read."""
        tables: list[pa.Table | str] = [""] * len(parts)
        together = [i for i, rows in enumerate(parts) if all(map(self.reader.is_independent, rows))]
        start = 0
        table = self._read([row for i in together for row in parts[i]]) if together else ""
        for i, rows in enumerate(parts):
            if i in together and not isinstance(table, str):
                tables[i] = table.slice(start, len(rows))
                start += len(rows)
            else:
                tables[i] = self._read(rows)
        return tables

    def _read(self, rows: list[Row]) -> pa.Table | str:
        try:
            return self.reader.read(rows)
        except RequestError as error:
            return str(error)

    def _warm_up(self) -> None:
        """Trace the model, and call it with the sizes of a single row and of a full batch."""
        for num_rows in (1, self.spec.max_batch_size):
            self.predictor.warm_up(num_rows)
