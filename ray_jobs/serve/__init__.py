"""Answers requests over HTTP with a trained run, as a Ray Serve application.

Input: a trained run, and rows as JSON or forms. Output: labels and probabilities.

    request_schema   models of requests and answers, generated from the run's manifest
    request_rows     rows of a request → inputs of the model, by the code of `predict`
    access_rules     middleware: bearer token, size of requests
    http_api         the endpoints
    image_folders    images that requests name, in folders that the owner allows
    batcher          rows of concurrent requests → calls of the model
    replica_metrics  batches, outcomes of rows, drift, for Prometheus
    replica          the deployment: loads the model and predicts in batches
    job              starts the application on this machine or on a cluster
"""

from ray_jobs.serve.job import serve

__all__ = ["serve"]
