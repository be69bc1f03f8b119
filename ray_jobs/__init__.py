"""The service: raw images and a table in, a trained, calibrated, explained model out.

The data's way, in running order:

    prepare.py      raw images + table → shards + manifest.json
                    (sources/ table.py labels.py cells.py numbers.py splits.py plan.py
                     shards.py images.py progress.py do its parts)
    inspect.py      job: what is in prepared data, and what in it deserves a look (inspection/)
    manifest.py     what every later stage knows of the prepared data
    order.py        which rows each step takes, whatever the number of workers
    dataset.py      shards → the batches of one worker, by its threads or by Ray Data tasks
                    (rows.py cache.py ahead.py do its parts)
    batch.py        the contract of one batch
    loop.py         what one worker does: strategy, build, step, epoch
    checkpoint.py   what is saved, and how it is restored
    report.py       the keys of the history, progress on the terminal
    tracking.py     history files, TensorBoard, MLflow (mlflow_run.py; resources.py and profile.py
                    say what a worker uses and where its steps spend their time)
    train.py        job: the `TensorflowTrainer` around the loop, the run folder
    inference.py    run folder + rows → probabilities, exactly one a row
    evaluate.py     job: a split's metrics and plots      (metrics.py plots.py)
    predict.py      job: Parquet of probabilities
    demo.py         job: all of the above on generated data (demo_data.py)

    spec.py cli.py storage.py cluster.py tf_backend.py environment.py serve every job.
"""
