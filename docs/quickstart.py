# %% [markdown]
# # From photos and a table to probabilities
#
# Runs in one to two minutes on two cores: `python docs/quickstart.py`, or cell by cell in an editor
# that supports `# %%` cells. Everything is written to a temporary folder.

# %% The data: 120 parts, some of them faulty, each with a photo and two numbers
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
parts = pd.DataFrame({"part": [f"p{i:03}" for i in range(120)]})
parts["faulty"] = rng.random(120) < 0.4
parts["temperature"] = rng.normal(70, 5, 120) + 4 * parts["faulty"]
parts["pressure"] = rng.normal(1, 0.1, 120)
parts.loc[::10, "pressure"] = None  # sensors fail
(folder / "photos").mkdir()
for part, faulty in zip(parts["part"], parts["faulty"], strict=True):
    pixels = rng.integers(0, 120, (48, 48, 3), dtype=np.uint8)
    pixels[:, :, 0] += np.uint8(60 * faulty)  # faulty parts are a little redder
    Image.fromarray(pixels).save(folder / "photos" / f"{part}.jpg")
parts.to_csv(folder / "table.csv", index=False)

# %% The specification: what a YAML file would contain
from ray_jobs.config.spec import RunSpec

spec = RunSpec.model_validate(
    {
        "run": {"storage_path": str(folder / "runs"), "name": "first"},
        "prepare": {
            "images": str(folder / "photos"),
            "table": str(folder / "table.csv"),
            "output": str(folder / "prepared"),
            "key_column": "part",
            "label_column": "faulty",
            "image_size": 48,
        },
        "data": {"prepared": str(folder / "prepared")},
        "model": {"image": {"kind": "tiny", "weights": None, "units": 16}},
        "train": {"epochs": 5, "learning_rate": 0.003, "global_batch_size": 16},
    }
)

# %% Shards with a manifest
from ray_jobs.prepare import prepare

prepare(spec)

# %% A trained, calibrated model
from ray_jobs.train import fit

fit(spec)

# %% Metrics on rows that took no part in training
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.evaluate import evaluate

run, prepared = str(folder / "runs/first"), str(folder / "prepared")
evaluate(EvaluateSpec(run=run, data=prepared, split="test", output=str(folder / "evaluation")))

# %% Probabilities, with Keras alone: the model takes raw pixels and raw numbers
import mm_model

model = mm_model.load_model(f"{run}/model/model.keras")
few = parts[:3]
images = np.stack([Image.open(folder / "photos" / f"{part}.jpg") for part in few["part"]])
numbers = few[["temperature", "pressure"]].to_numpy()
print(model.predict({"image": images, "numeric": numbers}, verbose=0))
