"""Turns raw images and a table into a trained, calibrated and explained model.

Each verb is a package that `python -m ray_jobs.VERB` runs. The data flows through these verbs:

    prepare    images + table → shards + manifest
    inspect    shards → data-quality report
    train      shards → run folder with the model: N workers, checkpoints, calibration
    tune       shards + search space → many trials → the best run
    cross_validate
               shards → folds → metrics with intervals, the mean of the folds' models
    evaluate   run + split → metrics, plots
    predict    run + rows → Parquet with a probability per row
    serve      run + requests over HTTP → answers

In addition, plan estimates memory, time and cost before you rent machines, doctor finds problems
before a job starts, submit runs the verbs as jobs on a cluster, and demo runs the pipeline on
generated data.

Shared packages, each of which imports only packages above it:

    config     settings, command line, errors
    storage    local folders and object stores, atomic writes
    cluster    connection to Ray, capacity, groups of TensorFlow workers
    data       manifest and shards → the batches of a worker
    pages      template and charts of HTML pages
    checks     checks of nodes, storage and data, for train, tune and doctor
"""
