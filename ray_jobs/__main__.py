"""Lists the verbs or runs one: `ray-jobs VERB …` is equivalent to `python -m ray_jobs.VERB …`."""

import runpy
import sys

from mm_model.nearest_match import did_you_mean

VERBS = {
    "prepare": "turn images and a table into shards with a manifest",
    "inspect": "report on the quality of prepared data",
    "train": "train the fusion model on prepared data",
    "tune": "search for the best hyperparameters",
    "cross_validate": "estimate how good a model is on few rows",
    "evaluate": "compute metrics and plots of a trained run on one split",
    "predict": "write the probability of each row to Parquet",
    "export": "convert the model of a run to SavedModel, ONNX or LiteRT",
    "serve": "answer requests over HTTP with a trained run",
    "plan": "estimate memory, time and cost before you rent machines",
    "doctor": "find problems before a job starts",
    "submit": "submit, follow and stop jobs on a cluster",
    "demo": "run the whole pipeline on generated data",
}


def main() -> None:
    """Run the verb that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ray-jobs VERB …, or python -m ray_jobs.VERB …\n")
        print(*(f"  {verb:<16}{text}" for verb, text in VERBS.items()), sep="\n")
        print("\nray-jobs VERB --help lists the settings of a verb.")
        return
    verb = arguments[0]
    if verb not in VERBS:
        print(
            f"error: unknown verb {verb!r}{did_you_mean(verb, list(VERBS))} "
            f"(accepted: {', '.join(VERBS)})",
            file=sys.stderr,
        )
        raise SystemExit(2)
    sys.argv[1:] = arguments[1:]
    runpy.run_module(f"ray_jobs.{verb}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
