"""Settings and the command line; imports neither Ray nor TensorFlow.

Input: flags and YAML. Output: a validated `RunSpec`, or the spec of another verb.

    spec.py           settings of all sections but `model` (mm_model/spec.py), `prepare` and `tune`
    inference_spec.py settings of `evaluate`, `predict` and `serve`
    prepare_spec.py   settings of `prepare`
    tune_spec.py      settings of `tune`
    command_line.py   parses flags and YAML into a spec, prints the help, sets the exit status
    errors.py         errors that a job reports in one line
    text.py           formats counts and names
"""
