import re
from collections.abc import Callable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from ray_jobs.tune.results import tune_page
from ray_jobs.tune.results.search_state import PARTS, Comparison, Search
from tests.ray_jobs.tune.rows import AUC, LOSS, ROW_S, records, search, trial

SECTIONS = ["Leaderboard", "History", "Settings", "Importance", "Learning curves", "Cost"]


def main(search: Search) -> Element:
    """Return the page's content, which has to be XML throughout."""
    found = tune_page.html(search)
    shown = found[found.index("<main>") : found.index("</main>") + len("</main>")]
    assert re.findall(r"\bnan\b|\bNaN\b|\binf\b|\bNone\b", shown) == []
    return ElementTree.fromstring(shown)


def of_class(root: Element, kind: str) -> list[Element]:
    return [node for node in root.iter() if kind in node.get("class", "").split()]


def chart(root: Element, label: str) -> Element:
    """Return the drawing of a label."""
    (found,) = (node for node in root.iter("svg") if label in node.get("aria-label", ""))
    return found


def place(node: Element, axis: str = "cx") -> float:
    return float(node.attrib[axis].rstrip("%"))


def points(node: Element) -> list[tuple[float, float]]:
    """Return the places that a line goes through."""
    steps = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", node.attrib["d"])
    return [(float(across), float(down)) for across, down in steps]


def texts(root: Element) -> str:
    return " ".join(" ".join(root.itertext()).split())


def downs(svg: Element) -> Callable[[float], float]:
    """Return where a value lies, as a reader takes it from the numbers at the grid's lines."""
    found = [node for node in svg if node.get("text-anchor") == "end"]
    (low, at_low), (high, at_high) = (
        (float(node.text or ""), float(node.attrib["y"]) - 4) for node in (found[0], found[-1])
    )
    assert at_low > at_high
    return lambda value: at_low + (value - low) * (at_high - at_low) / (high - low)


def test_the_page_loads_no_resources_and_runs_no_code():
    found = tune_page.html(search(*(trial(i, i / 10, history=records(1, 0.5)) for i in range(6))))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in found
    assert re.findall(r"<script|https?://|@import|url\(|src=|href=| on\w+=", found) == []
    assert found.count("<style>") == 1
    assert "prefers-color-scheme:dark" in found


def test_sections_are_in_order():
    found = search(
        *(trial(i, {LOSS: i / 10, AUC: i / 10}) for i in range(6)),
        trial(6, None, state="failed"),
        metrics=(LOSS, AUC),
    )
    found.comparison = Comparison("roc_auc", 0.8, 0.9, 0.05, 0.15, 100)
    heads = [node.text for node in main(found).iter("h2")]
    assert heads == [
        "Comparison with the untuned model", "Leaderboard", "Failed trials", "History", "Settings",
        "Importance", "Learning curves", "Cost", "Trade-off",
    ]  # fmt: skip


def test_text_from_the_data_is_escaped():
    nasty = "<script>alert(1)</script>'\"&\x00"
    values = [{nasty: i, f"{nasty}.b": f"{nasty}{i}", "c": [nasty]} for i in range(6)]
    rows = [trial(i, {nasty: i / 10, LOSS: 1.0}, v) for i, v in enumerate(values)]
    failed = trial(6, None, {nasty: 3}, state="failed", error=f"{nasty}\nmore")
    for row in (*rows, failed):
        row.name += nasty
        row.history = [{"epoch": 0, nasty: 0.5}, {"epoch": 1, nasty: nasty}]
        row.seconds = {"compute": 1.0}
    found = search(*rows, failed, metrics=(nasty, LOSS))
    found.name, found.comparison = nasty, Comparison(nasty, 0.1, 0.2, -0.1, 0.3, 5)
    assert "<script" not in tune_page.html(found)
    assert "\x00" not in tune_page.html(found)
    assert texts(of_class(main(found), "failures")[0]).endswith("'\"&�")


def test_the_header_shows_states_the_best_trial_and_the_budget():
    found = search(
        trial(0, 0.52), trial(1, 0.31234, best_epoch=4), trial(2, 0.9, state="stopped"),
        trial(3, None, state="failed"), trial(4, None, state="running"),
    )  # fmt: skip
    found.spent = {"hours": 1.5, "gpu_hours": 3.0, "trials": 5}
    found.budget = {"hours": 6.0, "trials": 5}
    root = main(found)
    assert texts(root[1]) == "5 trials: 2 finished, 1 stopped early, 1 failed, 1 running."
    best = texts(of_class(root, "best")[0])
    assert best == f"Best: trial t001, after epoch 5 0.3123 {LOSS}"
    tiles = of_class(root, "tiles")[0]
    assert texts(tiles) == "5 of 5 trials 1.50 of 6 hours 3 GPU hours no limit"
    assert [node.get("style") for node in tiles.iter("i")] == ["width:100.0%", "width:25.0%"]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((0.02, 0.001, 0.039), "Tuning made the model better, with a difference of +0.0200"),
        ((-0.02, -0.039, -0.001), "Tuning made the model worse, with a difference of -0.0200"),
        ((0.02, -0.001, 0.041), "contains 0, so the difference is within the noise"),
        ((0.02, 0.0, 0.04), "contains 0, so the difference is within the noise"),
    ],
)
def test_the_comparison_explains_the_interval(difference, words):
    gain, low, high = difference
    found = search(trial(0, 0.5))
    found.comparison = Comparison("roc_auc", 0.8, 0.8 + gain, low, high, 1234)
    shown = texts(main(found)).replace(" ,", ",")
    assert words in shown
    assert ("within the noise" in shown) == (low <= 0 <= high)
    assert f"{low:+.4f} to {high:+.4f}" in shown
    assert "on 1,234 test rows" in shown


def test_an_untuned_model_that_is_the_best_is_not_compared_with_itself():
    found = search(trial(0, 0.5))
    found.comparison = Comparison("roc_auc", 0.8, 0.8, 0.0, 0.0, 1234, same=True)
    shown = texts(main(found))
    assert "no trial was better than the untuned model, which has roc_auc 0.8000" in shown
    assert "noise" not in shown


def test_the_leaderboard_shows_the_best_and_counts_the_others():
    rows = [
        trial(i, 1 - i / 100, epochs=9, best_epoch=6, began_s=5.0, ended_s=i + 5.0)
        for i in range(30)
    ]
    rows[29].values = {"model.head.units": [64, 32], "train.augment": None}
    rows[28].scores_in_full = {"val/log_loss": 0.3}
    root = main(search(*rows, trial(30, None), trial(31, float("nan"))))
    table = of_class(root, "leaders")[0]
    cells = [[texts(cell) for cell in row] for row in table.iter("tr")]
    head = [
        "",
        "trial",
        "state",
        LOSS,
        "best epoch",
        "seconds",
        "learning_rate",
        "units",
        "augment",
    ]
    assert cells[0] == head
    first = ["1", "t029", "finished", "0.7100", "7 of 9", "29", "–", "[64, 32]", "none"]
    assert cells[1] == first
    assert cells[2][2] == "finished, then in full"
    assert len(cells) == 1 + 25
    assert "Not shown: 5 trials with a score, 2 trials without a score." in texts(root)


def test_failed_trials_have_a_table_of_the_first_lines_of_their_errors():
    root = main(
        search(
            trial(0, 0.5),
            trial(1, 0.6, state="failed", epochs=3, error="ValueError: no\n  at line 3"),
            trial(2, None, state="failed"),
        )
    )
    rows = [[texts(cell) for cell in row] for row in of_class(root, "failures")[0].iter("tr")]
    assert rows[1:] == [["t001", "3", "ValueError: no"], ["t002", "0", "no error was recorded"]]


def test_the_history_plots_each_score():
    scores = [0.52, 0.71, 0.44, None, 0.60, 0.31]
    rows = [trial(i, score) for i, score in enumerate(scores)]
    rows[1].state, rows[3].state = "stopped", "failed"
    svg = chart(main(search(*rows)), "in order of suggestion")
    down = downs(svg)
    dots = list(svg.iter("circle"))
    there = [(i, score) for i, score in enumerate(scores) if score is not None]
    for dot, (i, score) in zip(dots, there, strict=True):
        assert place(dot) == pytest.approx(100 * (i + 0.5) / 6, abs=0.01)
        assert place(dot, "cy") == pytest.approx(down(score), abs=0.15)
        assert f"{LOSS} {score:.4f}" in texts(dot)
    assert [dot.get("class") for dot in dots] == ["dot-done", "dot-open", *["dot-done"] * 3]
    assert [texts(node).split()[0] for node in of_class(svg, "lost")] == ["×"]
    line = points(of_class(svg, "best-line")[0])
    steps = [down for (_, down), (_, before) in zip(line[1:], line, strict=False) if down != before]
    assert [line[0][1], *steps] == pytest.approx([down(0.52), down(0.44), down(0.31)], abs=0.15)
    assert line[-1][0] == 100


@pytest.mark.parametrize(("metric", "far", "sign"), [(LOSS, 1e7, "▴"), (AUC, -1e7, "▾")])
def test_a_diverged_trial_does_not_flatten_the_others(metric, far, sign):
    scores = [0.3, 0.35, 0.4, 0.42, 0.5, 0.55, 0.6, far]
    rows = [
        trial(i, {metric: score}, history=records(score, score, metric=metric))
        for i, score in enumerate(scores)
    ]
    root = main(search(*rows, metrics=(metric,)))
    svg = chart(root, "in order of suggestion")
    heights = [place(dot, "cy") for dot in svg.iter("circle")]
    assert len(heights) == 7
    assert max(heights) - min(heights) > 150
    assert [texts(node).split()[0] for node in of_class(svg, "out")] == [sign]
    notes = [texts(node) for node in of_class(root, "note")]
    way = "up to 1e+07" if metric == LOSS else "down to -1e+07"
    assert notes == [
        f"1 trial off the scale, with {metric} {way}, marked {sign}.",
        f"1 trial off the scale, with {metric} {way}, drawn at the end of the axis.",
        f"1 curve off the scale, with {metric} {way}.",
    ]
    best, worst = (0.3, 0.6) if metric == LOSS else (0.6, 0.3)
    ends = {texts(line).split()[0]: points(line)[-1][1] for line in of_class(root, "trial")}
    of = {score: f"t{i:03d}," for i, score in enumerate(scores)}
    assert ends[of[best]] == 0
    assert ends[of[worst]] == ends[of[far]] > 300


def test_parallel_coordinates_plot_each_value():
    values = [
        {"a.rate": 1e-5, "a.kind": "x", "a.size": 1},
        {"a.rate": 1e-3, "a.kind": "y", "a.size": 2},
        {"a.rate": 1e-1, "a.kind": "z"},
    ]
    root = main(search(*(trial(i, 0.5 - i / 8, v) for i, v in enumerate(values))))
    svg = chart(root, "Settings and score")
    names = [texts(node).split()[0] for node in of_class(svg, "name")]
    assert names == ["rate", "kind", "size", LOSS]
    lines = of_class(svg, "trial")
    assert [texts(line).split()[0] for line in lines] == ["t000,", "t001,", "t002,"]
    found = [points(line) for line in lines]
    assert [across for across, _ in found[0]] == pytest.approx([0, 33.33, 66.67, 100])
    bottom = max(down for line in found[:2] for _, down in line)
    for axis in (0, 1):
        heights = [line[axis][1] for line in found]
        assert heights == pytest.approx([bottom, bottom / 2, 0], abs=0.1)
    assert [line[2][1] for line in found[:2]] == [bottom, 0]
    absent = next(node for node in of_class(svg, "value") if (node.text or "") == "–")
    assert found[2][2][1] == pytest.approx(place(absent, "y") - 4)
    assert found[2][2][1] > bottom + 10
    assert [line[3][1] for line in found] == pytest.approx([bottom, bottom / 2, 0], abs=0.1)
    kinds = [line.attrib["class"].split() for line in lines]
    assert [kind[1] for kind in kinds] == ["q0", "q3", "q5"]
    assert ["winner" in kind for kind in kinds] == [False, False, True]


def test_importance_is_shown_in_shares_by_short_names():
    rows = [trial(i, (i * 7 % 20) / 20, {"train.a": i * 7 % 20, "b": i}) for i in range(20)]
    root = main(search(*rows))
    assert "by fANOVA (Optuna) over 20 trials" in texts(root)
    names = [texts(node) for node in of_class(root, "bars")[0] if node.get("class") == "name"]
    assert names == ["a", "b"]
    widths = [
        float(re.findall(r"[\d.]+", node.get("style", ""))[0])
        for node in of_class(root, "bars")[0].iter("i")
    ]
    assert widths[0] > 80
    assert sum(widths) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([trial(0, 0.5)], "Importance needs at least 4 trials with a score; this search has 1."),
        ([trial(i, i / 9, {"a": 1}) for i in range(5)], "No setting has two values"),
        ([trial(i, 0.5) for i in range(5)], "All scores are equal"),
    ],
)
def test_a_sentence_replaces_importance_that_cannot_be_computed(rows, words):
    root = main(search(*rows))
    assert words in texts(root)
    assert of_class(root, "bars") == []


def test_curves_show_the_best_in_colour_and_leave_gaps():
    rows = [trial(i, 0.5 + i / 100, history=records(0.9, 0.7, 0.5 + i / 100)) for i in range(7)]
    rows[3].history = records(0.9, None, 0.53, float("nan"))
    rows[4].history = []
    root = main(search(*rows))
    svg = chart(root, "over its epochs")
    curves = of_class(svg, "curve")
    assert [texts(curve).split()[0] for curve in curves] == [
        "t005,",
        "t003,",
        "t002,",
        "t001,",
        "t000,",
    ]
    assert [curve.attrib["class"] for curve in curves] == [f"curve c{i}" for i in (5, 4, 3, 2, 1)]
    assert [texts(curve).split()[0] for curve in of_class(svg, "faint")] == ["t006,"]
    assert curves[1].attrib["d"].count("M") == 2
    down = downs(svg)
    assert points(curves[4]) == [
        (pytest.approx(x, abs=0.01), pytest.approx(down(y), abs=0.15))
        for x, y in ((0, 0.9), (100 / 3, 0.7), (200 / 3, 0.5))
    ]
    legend = [texts(node) for node in of_class(root, "legend") if "t005" in texts(node)]
    assert legend == ["t000 0.5000 t001 0.5100 t002 0.5200 t003 0.5300 t005 0.5500 others"]


def test_cost_adds_up_to_the_time_of_the_slots():
    seconds = {"start": 10.0, "data": 5.0, "compute": 60.0, "validation": 4.0, "checkpoint": 1.0}
    rows = [
        trial(0, 0.5, seconds=seconds, began_s=0.0, ended_s=80.0),
        trial(1, 0.4, seconds={"start": 10.0, "compute": 10.0}, began_s=100.0, ended_s=140.0),
    ]
    found = search(*rows)
    found.slots = 2
    root = main(found)
    shown = texts(root)
    for words in (
        "start 20 s (7.1%)", "data 5.0 s (1.8%)", "compute 70 s (25.0%)", "validation 4.0 s (1.4%)",
        "checkpoint 1.0 s (0.4%)", "other 20 s (7.1%)", "search 2.7 min (57.1%)",
        "All trials: 4.7 min of 2 slots",
    ):  # fmt: skip
        assert words in shown
    bars = [node for node in of_class(root, "stack") if node.get("title")]
    widths = [[float(re.findall(r"[\d.]+", i.get("style", ""))[0]) for i in bar] for bar in bars]
    assert widths == [[12.5, 12.5], [12.5, 6.25, 75, 5, 1.25]]
    assert [i.get("class") for i in bars[1]] == [f"part-{part}" for part in PARTS]


def test_cost_has_at_most_forty_bars():
    root = main(search(*(trial(i, 0.5, seconds={"compute": 1.0}) for i in range(43))))
    assert len([node for node in of_class(root, "stack") if node.get("title")]) == 40
    assert "And 3 more trials." in texts(root)


def test_the_pareto_front_is_marked_and_listed():
    scores = [(0.9, 0.5), (0.8, 0.1), (0.8, 0.2), (0.95, 0.9), (0.7, 0.1), (None, 0.05)]
    rows = [trial(i, {AUC: auc, ROW_S: s}) for i, (auc, s) in enumerate(scores)]
    root = main(search(*rows, metrics=(AUC, ROW_S)))
    svg = chart(root, f"{AUC} against {ROW_S}")
    marked = of_class(svg, "dot-front")
    assert [texts(dot).split(",")[0] for dot in marked] == ["t000", "t001", "t003"]
    assert [texts(dot).split(",")[0] for dot in of_class(svg, "dot-open")] == ["t002", "t004"]
    down = downs(svg)
    assert [place(dot, "cy") for dot in marked] == pytest.approx(
        [down(0.9), down(0.8), down(0.95)], abs=0.15
    )
    assert place(marked[1]) < place(marked[0]) < place(marked[2])
    # From the quickest on, the line rises only where a better one is reached.
    line = points(of_class(svg, "best-line")[0])
    assert [y for _, y in line] == pytest.approx(
        [down(v) for v in (0.8, 0.8, 0.9, 0.9, 0.95)], abs=0.15
    )
    table = list(root.iter("table"))[-1]
    assert [texts(row) for row in table.iter("tr")][1:] == [
        "t003 0.9500 0.9000", "t000 0.9000 0.5000", "t001 0.8000 0.1000",
    ]  # fmt: skip


def test_one_objective_has_no_trade_off():
    assert "Trade-off" not in tune_page.html(search(trial(0, 0.5), trial(1, 0.4)))


NAN, INF = float("nan"), float("inf")
ODD = [
    {"a": value, "b": other}
    for value, other in zip(
        [None, True, "word" * 30, [1, [2, None]], NAN, INF, 10**400, {"x": 1}, -0.0, ()],
        [1e-300, 1e300, 5e-324, 0, -5, 1, 2.5, 10**18, 10**400, 3],
        strict=True,
    )
]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [trial(0, None, state="pending", values={})],
        [trial(i, None, state="failed", error="") for i in range(3)],
        [trial(0, 0.5)],
        [trial(0, 0.5, {})],
        [trial(0, 0.5, history=records(0.5), seconds={"compute": 1.0}, ended_s=1.0)],
        [trial(i, value) for i, value in enumerate([NAN, INF, -INF, None, "x"])],
        [trial(i, 0.5, history=records(NAN, None, INF)) for i in range(5)],
        [trial(i, 0.5 + i, {"a": 3}) for i in range(5)],
        [trial(i, value) for i, value in enumerate([1e299, -1e299, 0.0, 5e-324, 1.0])],
        [trial(i, 1.0 + i * 2e-16) for i in range(6)],
        [trial(i, i / 7, values) for i, values in enumerate(ODD)],
        [trial(i, i / 7, {"a": 1e-320 * (i + 1), "b": 1 + i * 1e-16}) for i in range(6)],
        [trial(i, i / 7, {"a": i % 2, "b": f"word {i}"}) for i in range(60)],
        [
            trial(0, 0.5, history=[{"epoch": 0}], epochs=0),
            trial(1, 0.4, history=[{"epoch": 0, LOSS: 1}], began_s=9.0, ended_s=3.0),
        ],
    ],
)
@pytest.mark.parametrize("metrics", [(LOSS,), (LOSS, AUC)])
def test_odd_searches_have_a_sensible_page(rows, metrics):
    for row in rows:
        row.scores = {metric: row.scores[LOSS] for metric in metrics if row.scores}
    found = search(*rows, metrics=metrics)
    found.spent, found.budget = {"hours": NAN, "trials": 0}, {"hours": 0.0, "gpu_hours": INF}
    root = main(found)
    heads = [node.text for node in root.iter("h2")]
    assert [head for head in heads if head not in ("Failed trials", "Trade-off")] == SECTIONS
    for node in root.iter("circle"):
        assert 0 <= place(node) <= 100
        assert -5 <= place(node, "cy") <= 325


def test_a_page_without_scores_says_so():
    shown = texts(main(search(trial(0, None, state="running"))))
    assert shown.count("No trial has a score yet.") == 4
    assert f"No epoch with {LOSS} yet." in shown
    assert "No time has been spent yet." in shown
