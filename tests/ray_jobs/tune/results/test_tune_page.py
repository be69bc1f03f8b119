import json
import re
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from plotly.offline import get_plotlyjs

from ray_jobs.tune.results import tune_page
from ray_jobs.tune.results.search_state import Comparison, Search
from tests.ray_jobs.tune.rows import AUC, LOSS, records, search, trial

SECTIONS = ["Leaderboard", "History", "Settings", "Importance", "Learning curves", "Cost"]
SCORES = [
    (0.52, 0.9), (0.71, 0.8), (0.44, 0.95), None, (0.6, 0.7), (0.31, 0.93), (0.65, 0.6), (0.8, 0.5),
]  # fmt: skip


def main(search: Search) -> Element:
    """Return the content of the page, which is valid XML."""
    page = tune_page.html(search)
    root = ElementTree.fromstring(page[page.index("<main>") : page.index("</main>") + 7])
    assert re.findall(r"\bnan\b|\bNaN\b|\binf\b|\bNone\b", texts(root)) == []
    return root


def of_class(root: Element, kind: str) -> list[Element]:
    return [node for node in root.iter() if kind in node.get("class", "").split()]


def rows_of(table: Element) -> list[list[str]]:
    return [[texts(cell) for cell in row] for row in table.iter("tr")]


def chart(root: Element, label: str) -> list[dict[str, Any]]:
    """Return the traces of a chart."""
    (found,) = (node for node in of_class(root, "chart") if label in node.get("aria-label", ""))
    return json.loads(found.attrib["data-figure"])["data"]


def texts(root: Element) -> str:
    return " ".join(" ".join(root.itertext()).split())


@pytest.fixture(scope="module")
def example() -> Element:
    """The page of a search with two objectives; its best trial is t005."""
    rows = [
        trial(i, score and dict(zip((LOSS, AUC), score, strict=True)), epochs=2, best_epoch=1)
        for i, score in enumerate(SCORES)
    ]
    for row, score in zip(rows, SCORES, strict=True):
        row.history = records(0.9, score[0] if score else None)
    rows[1].state, rows[1].history = "stopped", records(0.9, None, 0.71, float("nan"))
    rows[3].state, rows[3].error = "failed", "ValueError: no\n  at line 3"
    rows[4].history = []
    rows[5].values = {"model.head.units": [64, 32], "train.augment": None}
    rows[5].scores_in_full = {LOSS: 0.3}
    seconds = {"start": 10.0, "data": 5.0, "compute": 60.0, "validation": 4.0, "checkpoint": 1.0}
    rows[0].seconds, rows[0].ended_s = seconds, 80.0
    rows[1].seconds, rows[1].began_s, rows[1].ended_s = {"start": 10.0, "compute": 10.0}, 100, 140
    found = search(*rows, trial(8, None, state="failed"), metrics=(LOSS, AUC))
    found.spent = {"hours": 1.5, "gpu_hours": 3.0, "trials": 9}
    found.budget = {"hours": 6.0, "trials": 9}
    found.slots = 2
    found.comparison = Comparison("roc_auc", 0.8, 0.9, 0.05, 0.15, 100)
    return main(found)


def test_the_header_shows_states_the_best_trial_and_the_budget(example):
    assert texts(example[1]) == "9 trials: 6 finished, 1 stopped early, 2 failed."
    (best,), (tiles,) = of_class(example, "best"), of_class(example, "tiles")
    assert texts(best) == f"Best: trial t005, after epoch 2 0.3100 {LOSS} 0.9300 {AUC}"
    assert texts(tiles) == "9 of 9 trials 1.50 of 6 hours 3 GPU hours no limit"
    assert [node.get("style") for node in tiles.iter("i")] == ["width:100.0%", "width:25.0%"]


def test_tables_show_the_best_and_the_failed_trials(example):
    assert [node.text for node in example.iter("h2")] == [
        "Comparison with the untuned model", "Leaderboard", "Failed trials", *SECTIONS[1:],
        "Trade-off",
    ]  # fmt: skip
    head, first, *_ = rows_of(of_class(example, "leaders")[0])
    assert head == [
        *("", "trial", "state", LOSS, AUC, "best epoch", "seconds"),
        *("learning_rate", "units", "augment"),
    ]
    assert first == [
        *("1", "t005", "finished, then in full", "0.3100", "0.9300", "2 of 2", "0"),
        *("–", "[64, 32]", "none"),
    ]
    assert "Not shown: 2 trials without a score." in texts(example)
    failures = rows_of(of_class(example, "failures")[0])[1:]
    assert failures == [["t003", "2", "ValueError: no"], ["t008", "0", "no error was recorded"]]


def test_the_history_plots_each_score(example):
    best, dots = chart(example, f"{LOSS} of each")
    assert (dots["x"], dots["y"]) == ([0, 1, 2, 4, 5, 6, 7], [s[0] for s in SCORES if s])
    assert dots["marker"]["symbol"] == ["circle", "circle-open", *["circle"] * 5]
    assert dots["text"][1].startswith(f"t001, stopped early<br>{LOSS} 0.7100<br>{AUC} 0.8000<br>tr")
    assert best["y"][:6] == [0.52, 0.52, 0.44, 0.44, 0.44, 0.31]


def test_curves_show_the_best_in_color_and_leave_gaps(example):
    curves = chart(example, "over the epochs")
    assert [(curve["name"], curve["line"]["color"]) for curve in curves] == [
        ("t000 0.5200", "var(--c3)"), ("t001 0.7100", "var(--c5)"), ("t002 0.4400", "var(--c2)"),
        ("others", "var(--rest)"), ("t005 0.3100", "var(--c1)"), ("t006 0.6500", "var(--c4)"),
        ("others", "var(--rest)"),
    ]  # fmt: skip
    assert (curves[0]["x"], curves[0]["y"]) == ([1, 2], [0.9, 0.52])
    assert curves[1]["y"] == [0.9, None, 0.71, None]


def test_importance_is_shown_in_shares_by_short_names(example):
    assert "by fANOVA (Optuna) over 7 trials" in texts(example)
    (bars,) = chart(example, "Importances")
    assert set(bars["y"]) == {"learning_rate", "units", "augment"}
    assert bars["y"][-1] == "learning_rate"
    assert sum(bars["x"]) == pytest.approx(1)


def test_cost_adds_up_to_the_time_of_the_slots(example):
    shown = texts(example)
    for words in (
        "start 20 s 7.1%", "data 5.0 s 1.8%", "compute 70 s 25.0%", "validation 4.0 s 1.4%",
        "checkpoint 1.0 s 0.4%", "other 20 s 7.1%", "search 2.7 min 57.1%",
        "All trials: 4.7 min of 2 slots",
    ):  # fmt: skip
        assert words in shown
    parts = {part["name"]: part["x"] for part in chart(example, "Cost of each trial")}
    assert parts == {
        "start": [10, 10], "compute": [10, 60], "data": [0, 5], "validation": [0, 4],
        "checkpoint": [0, 1],
    }  # fmt: skip


def test_the_pareto_front_is_marked_and_listed(example):
    others, front = chart(example, "Trade-off")
    assert front["name"] == "Pareto front"
    assert (front["x"], front["y"]) == ([0.95, 0.93], [0.44, 0.31])
    assert (others["x"][0], others["y"][0]) == (0.9, 0.52)
    table = rows_of(list(example.iter("table"))[-1])
    assert table[1:] == [["t005", "0.3100", "0.9300"], ["t002", "0.4400", "0.9500"]]


def test_parallel_coordinates_plot_each_value():
    values = [
        {"a.rate": 1e-5, "a.kind": "x", "a.size": 1},
        {"a.rate": 1e-3, "a.kind": "y", "a.size": 2},
        {"a.rate": 1e-1, "a.kind": "z"},
    ]
    lines = chart(
        main(search(*(trial(i, 0.5 - i / 8, v) for i, v in enumerate(values)))), "Settings"
    )
    names = [name for name, _ in lines[0]["customdata"]]
    assert names == [LOSS, "kind", "rate", "size"]
    score, kind, rate, size = zip(*(line["y"] for line in lines), strict=True)
    assert score == pytest.approx((1, 0.5, 0))
    assert kind == rate == pytest.approx((0, 0.5, 1))
    assert size[2] < size[0] < size[1]
    assert [line["line"]["color"] for line in lines] == ["var(--q0)", "var(--q3)", "var(--c2)"]


def test_an_outlier_is_drawn_at_the_edge_with_its_true_score():
    scores = [0.3, 0.35, 0.4, 0.42, 0.5, 0.55, 0.6, 1e7]
    root = main(search(*(trial(i, s, history=records(s, s)) for i, s in enumerate(scores))))
    dots = chart(root, f"{LOSS} of each")[1]
    assert dots["y"] == [*scores[:-1], 0.6]
    assert f"{LOSS} 1e+07" in dots["text"][-1]
    assert chart(root, "over the epochs")[-1]["y"] == [0.6, 0.6]
    *_, edge, outlier = chart(root, "Settings and scores")
    assert outlier["y"][0] == edge["y"][0]


def test_long_tables_and_charts_count_what_they_leave_out():
    rows = [trial(i, i / 100, seconds={"compute": 1.0}) for i in range(43)]
    root = main(search(*rows, trial(43, float("nan"))))
    assert len(rows_of(of_class(root, "leaders")[0])) == 1 + 25
    assert len(chart(root, "Cost of each trial")[0]["x"]) == 40
    shown = texts(root)
    assert "Not shown: 18 trials with a score, 1 trial without a score." in shown
    assert "And 3 more trials." in shown


@pytest.mark.parametrize(
    ("best", "low", "high", "words"),
    [
        (0.82, 0.001, 0.039, "Tuning made the model better, with a difference of +0.0200"),
        (0.78, -0.039, -0.001, "Tuning made the model worse, with a difference of -0.0200"),
        (0.82, 0.0, 0.04, "contains 0, so the difference is within the noise"),
        (0.8, 0.0, 0.0, "no trial was better than the untuned model, which has roc_auc 0.8000"),
    ],
)
def test_the_comparison_explains_the_interval(best, low, high, words):
    found = search(trial(0, 0.5))
    found.comparison = Comparison("roc_auc", 0.8, best, low, high, 1234, same=best == 0.8)
    shown = texts(main(found)).replace(" ,", ",")
    assert words in shown
    assert "on 1,234 test rows" in shown
    assert ("within the noise" in shown) == ("within the noise" in words)
    assert (f"{low:+.4f} to {high:+.4f}" in shown) == (best != 0.8)


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
    assert not [node for node in of_class(root, "chart") if node.get("aria-label") == "Importances"]


def test_the_page_loads_no_resources_and_escapes_text_from_the_data():
    nasty = "<script>alert(1)</script>'\"&\ud800"
    values = [{nasty: i, f"{nasty}.b": f"{nasty}{i}", "c": [nasty]} for i in range(6)]
    rows = [trial(i, {nasty: i / 10, LOSS: 1.0}, v) for i, v in enumerate(values)]
    failed = trial(6, None, {nasty: 3}, state="failed", error=f"{nasty}\nmore")
    for row in (*rows, failed):
        row.name += nasty
        row.history = [{"epoch": 0, nasty: 0.5}, {"epoch": 1, nasty: nasty}]
        row.seconds = {"compute": 1.0}
    found = search(*rows, failed, metrics=(nasty, LOSS))
    found.name, found.comparison = nasty, Comparison(nasty, 0.1, 0.2, -0.1, 0.3, 5)
    page = tune_page.html(found)
    assert "default-src 'none'; img-src data:;" in page
    own = page.replace(get_plotlyjs(), "")
    assert re.findall(r"https?://|@import|url\(|src=|href=| on\w+=", own) == []
    assert own.count("<script>") == page.count("<script>") == 2
    assert "alert(1)" in page
    charts = re.findall('data-figure="(.*?)"', page)
    assert len(charts) == 7
    assert not [chart for chart in charts if "&lt;script" in chart]


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
        [trial(0, 0.5, {}, history=records(0.5), seconds={"compute": 1.0}, ended_s=1.0)],
        [trial(i, value) for i, value in enumerate([NAN, INF, -INF, None, "x"])],
        [trial(i, 0.5, history=records(NAN, None, INF)) for i in range(5)],
        [trial(i, value) for i, value in enumerate([1e299, -1e299, 0.0, 5e-324, 1.0])],
        [trial(i, 1 + i * 2e-16, {"a": 1e-320 * (i + 1), "b": 1 + i * 1e-16}) for i in range(6)],
        [trial(i, i / 7, values) for i, values in enumerate(ODD)],
        [trial(i, i / 7, {"a": i % 2, "b": f"word {i}"}) for i in range(30)],
        [
            trial(0, 0.5, history=[{"epoch": 0}], epochs=0),
            trial(1, 0.4, history=[{"epoch": 0, LOSS: 1}], began_s=9.0, ended_s=3.0),
        ],
    ],
)
def test_odd_searches_have_a_sensible_page(rows):
    for row in rows:
        row.scores = {metric: row.scores[LOSS] for metric in (LOSS, AUC) if row.scores}
    found = search(*rows, metrics=(LOSS, AUC))
    found.spent, found.budget = {"hours": NAN, "trials": 0}, {"hours": 0.0, "gpu_hours": INF}
    heads = [node.text for node in main(found).iter("h2")]
    assert [head for head in heads if head != "Failed trials"] == [*SECTIONS, "Trade-off"]


def test_a_page_without_scores_says_so():
    shown = texts(main(search(trial(0, None, state="running"))))
    assert shown.count("No trial has a score yet.") == 4
    assert f"No epoch with {LOSS} yet." in shown
    assert "No time has been spent yet." in shown
    # With one objective, there is no trade-off.
    assert "Trade-off" not in shown
