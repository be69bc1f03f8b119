"""Records and shows the progress of a run.

Inputs: a record per epoch and progress events of rank 0.  Outputs: files of the run folder, an
MLflow run and terminal output.

    history_keys     names of metrics and their ranking
    console          prints events to the terminal
    history          writes history files and TensorBoard logs
    mlflow_logger    logs the run to MLflow
    profiler         traces steps for TensorBoard
    system_metrics   measures memory, CPU and GPU use
"""
