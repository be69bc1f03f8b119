"""The service: raw images and a table in, a trained, calibrated, explained model out.

The data's way, in running order:

    prepare.py      raw images + table → shards + manifest.json
                    (sources/ table.py labels.py cells.py numbers.py splits.py shard_plan.py
                     shards.py images.py progress.py do its parts)
    inspect.py      job: what is in prepared data, and what in it deserves a look (inspection/)
    manifest.py     what every later stage knows of the prepared data
    order.py        which rows each step takes, whatever the number of workers
    dataset.py      shards → the batches of one worker, by its threads or by Ray Data tasks
                    (rows.py cache.py ahead.py do its parts)
    batch.py        the contract of one batch
    loop.py         what one worker does: build, epochs, validation (new_model.py
                    builds; callbacks.py: what it calls)
    step.py         one optimizer step on all replicas (replicas.py tensors.py do its parts)
    checkpoint.py   what is saved (checkpoint_store.py: where, and when; snapshot.py: how it is
                    taken out of a model and put back)
    report.py       the keys of the history, progress on the terminal
    tracking.py     history files, TensorBoard, MLflow (mlflow_run.py; resources.py and profile.py
                    say what a worker uses and where its steps spend their time)
    worker.py       a Ray worker around the loop: start, checkpoints, reports (watchdog.py)
    attempts.py     what fails, and whether it is tried again (board.py: driver ↔ workers)
    room.py         how many workers there is room for (nodes.py: on what)
    finish.py       best epoch → the model that people use, blended and calibrated
    train.py        job: the run folder, and attempts at a `TensorflowTrainer` until one ends
    tune.py         job: a search over settings of all that (tuning/; turning.py: trials whose
                    graph is the same)
    trained_run.py  what those who use a finished run need to know of it
    inference.py    trained run + rows → probabilities, exactly one a row
    evaluate.py     job: a split's metrics and plots      (metrics.py plots.py)
    predict.py      job: Parquet of probabilities
    demo.py         job: all of the above on generated data (demo_data.py)
    plan.py         what a run takes on machines that are not rented yet (planning/)
    doctor.py       finds what would stop a job, before it starts (checks/)
    submit.py       sends jobs to a cluster, follows and stops them (submission/)

    spec.py cli.py storage.py cluster.py tf_backend.py environment.py serve every job.
"""
