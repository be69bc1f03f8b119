"""Generates the demo data: photos of parts, sensor readings, notes and a label for faulty parts.

Output: `images/{key}.jpg` (64 × 64) and `table.csv` (key, six numbers, note, label).

Three independent factors of mean 0 and variance 1 determine the label:

    tint    visible only in the image: the color of one disc from blue (low) to red (high), at a
            random position on a gray background with green and gray discs
    wear    visible only in the numbers: the sum of a part that increases vibration and (slightly)
            age, and the distance of the temperature from 60 °C in either direction
    damage  visible only in the note of an inspection: the summed severity of two damages, in
            varying words. The note also names two blemishes, which are harmless: "heavy dust, no
            crack at the flange, slight rust, stains ruled out". So single words tell little; what
            counts is which adjective belongs to which noun.

A part is faulty if tint + wear + damage + 0.3 × noise is in the top quarter. 8 % of the numbers and
notes are missing; load, pressure and speed carry no information.
"""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from pyarrow import csv

SIZE = 64
POSITIVE_FRACTION = 0.25
MISSING_FRACTION = 0.08
NUMERIC_COLUMNS = (
    "vibration_mm_s",
    "temperature_c",
    "age_days",
    "load_kn",
    "pressure_kpa",
    "speed_rpm",
)
TEXT_COLUMN = "note"

_DAMAGES = (("crack", "fracture"), ("corrosion", "rust"), ("leak", "seepage"))
_BLEMISHES = (("dust", "dirt"), ("scratches", "scuffs"), ("stains", "spots"))
_SEVERITIES = {
    0.0: ("no {}", "free of {}", "{} ruled out"),
    1.0: ("slight {}", "minor {}"),
    2.5: ("severe {}", "heavy {}"),
}
_SEVERITY_P = (0.55, 0.25, 0.2)
_PLACES = ("at the flange", "near the weld", "")
_NUM_DAMAGES = _NUM_BLEMISHES = 2

_NOISE = 0.3
_ROWS_AT_ONCE = 256


def write_demo_data(folder: str | Path, num_rows: int = 1200, seed: int = 0) -> None:
    """Write the images and the table to a folder; the same seed gives the same files."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tint, wear, numbers_RF = draw_factors(num_rows, rng)
    damage, notes = draw_notes(num_rows, rng)
    score = tint + wear + damage + _NOISE * rng.normal(size=num_rows)
    label = (score > np.quantile(score, 1 - POSITIVE_FRACTION)).astype(np.int8)
    keys = [f"part_{row:05d}" for row in range(num_rows)]
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        for key, image in zip(keys[part], draw_images(tint[part], rng), strict=True):
            content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (folder / "images" / f"{key}.jpg").write_bytes(content.tobytes())
    missing = rng.random(numbers_RF.shape) < MISSING_FRACTION
    columns = [
        pa.array(np.round(values, 3), mask=mask)
        for values, mask in zip(numbers_RF.T, missing.T, strict=True)
    ]
    columns.append(pa.array(notes, mask=rng.random(num_rows) < MISSING_FRACTION))
    names = ["key", *NUMERIC_COLUMNS, TEXT_COLUMN, "label"]
    table = pa.table([keys, *columns, label], names=names)
    csv.write_csv(table, folder / "table.csv")


def draw_factors(
    num_rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tint (R), wear (R) and the numbers (R, `NUMERIC_COLUMNS`), none missing."""
    tint, roughness, drift, *noise = rng.normal(size=(7, num_rows))
    # |drift| has mean √(2/π) and variance 1 - 2/π.
    heat = (np.abs(drift) - np.sqrt(2 / np.pi)) / np.sqrt(1 - 2 / np.pi)
    wear = (roughness + heat) / np.sqrt(2)
    numbers = (
        np.exp(1.0 + 0.4 * roughness),
        60.0 + 9.0 * drift,
        np.exp(6.0 + 0.5 * (0.6 * roughness + 0.8 * noise[0])),
        12.0 + 3.0 * noise[1],
        101.3 + 0.8 * noise[2],
        1500.0 + 120.0 * noise[3],
    )
    return tint, wear, np.stack(numbers, axis=1)


def draw_notes(num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Return damage (R) and the note of each row, none missing."""
    values = np.asarray([*_SEVERITIES])
    severity_RN = rng.choice(values, (num_rows, _NUM_DAMAGES + _NUM_BLEMISHES), p=_SEVERITY_P)

    def phrase(nouns: tuple[str, ...], severity: float) -> str:
        text = str(rng.choice(_SEVERITIES[severity])).format(rng.choice(nouns))
        return f"{text} {rng.choice(_PLACES)}".strip()

    notes = []
    for severity_N in severity_RN.tolist():
        nouns = [_DAMAGES[d] for d in rng.permutation(len(_DAMAGES))[:_NUM_DAMAGES]]
        nouns += [_BLEMISHES[b] for b in rng.permutation(len(_BLEMISHES))[:_NUM_BLEMISHES]]
        phrases = [phrase(*finding) for finding in zip(nouns, severity_N, strict=True)]
        notes.append(f"{', '.join(rng.permutation(phrases))}.".capitalize())
    mean = values @ _SEVERITY_P
    variance = (values - mean) ** 2 @ _SEVERITY_P
    damage = (severity_RN[:, :_NUM_DAMAGES] - mean).sum(axis=1) / np.sqrt(_NUM_DAMAGES * variance)
    return damage, notes


def draw_images(tint: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an RGB image, uint8 (B, H, W, 3), for each tint (B)."""
    rows = len(tint)
    y_HW, x_HW = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    slope_B2 = rng.uniform(-0.7, 0.7, (rows, 2, 1, 1)).astype(np.float32)
    background_BHW = rng.uniform(90, 165, (rows, 1, 1)) + slope_B2[:, 0] * (x_HW - SIZE / 2)
    background_BHW = background_BHW + slope_B2[:, 1] * (y_HW - SIZE / 2)
    images = np.repeat(background_BHW[..., None], 3, axis=3).astype(np.float32)

    def draw_disc(min_radius: float, max_radius: float, color_B3: np.ndarray) -> None:
        center = (max_radius, SIZE - max_radius)
        radius, x, y = (
            rng.uniform(low, high, (rows, 1, 1)).astype(np.float32)
            for low, high in ((min_radius, max_radius), center, center)
        )
        inside = (x_HW - x) ** 2 + (y_HW - y) ** 2 < radius**2
        images[inside] = np.broadcast_to(color_B3[:, None, None], images.shape)[inside]

    for _ in range(2):
        gray = rng.uniform(50, 210, (rows, 1))
        draw_disc(4, 8, np.repeat(gray, 3, axis=1))
        draw_disc(4, 8, gray * [0.5, 1.0, 0.5])
    redness = np.tanh(tint / 2)
    red, blue = 130 + 100 * redness, 130 - 100 * redness
    draw_disc(10, 13, np.stack([red, np.full(rows, 80), blue], axis=1))
    images += rng.normal(0, 8, images.shape)
    return np.clip(images, 0, 255).astype(np.uint8)
