import re

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from tests.ray_jobs.inspect.samples import SPLITS, look, rows, write
from tests.ray_jobs.tiny import COLUMNS


@pytest.mark.usefixtures("harmless_report")
def test_the_page_loads_no_resources(harmless):
    page = (harmless / "inspect.html").read_text()
    assert "default-src 'none'" in page
    assert page.count(get_plotlyjs()) == 1
    own = page.replace(get_plotlyjs(), "")
    assert re.findall(r"https?://|@import|url\(", own) == []
    assert set(re.findall(r'(?:src|href)="(.{22})', own)) == {"data:image/jpeg;base64"}
    assert own.count("data-figure=") == len(COLUMNS) + 2
    assert len(own) < 200_000


def test_categories_of_any_text_are_listed_with_their_fractions(tmp_path):
    words = ["98101", "St. John", "items", ""]
    data = {s: rows(s, 20, place=words * 5) for s in SPLITS}
    look(write(tmp_path, data, categorical=("place",)))
    page = (tmp_path / "inspect.html").read_text()
    table = re.search(r'<table class="small words">.*?</table>', page, re.DOTALL)
    assert table
    found = re.findall(r"<tr><td[^>]*>(.*?)</td>(.*?)</tr>", table[0], re.DOTALL)
    fractions = {word: re.findall(r">([\d.]+)\s?%<", cells) for word, cells in found}
    expected = dict.fromkeys(["98101", "St. John", "items", "(empty)"], ["25.0"] * 3)
    assert fractions == expected | dict.fromkeys(["unknown", "missing"], ["0.0"] * 3)


def test_text_from_the_data_is_shown_and_never_obeyed(tmp_path, capsys):
    nasty = "<script>alert(1)</script>[red]'\""
    data = {s: rows(s, 20) | {nasty: np.arange(20.0)} for s in SPLITS}
    for split in SPLITS:
        data[split]["key"] = [f"{nasty}{split if i else ''}{i}" for i in range(20)]
    bad: list[tuple[str | None, str, str]] = [(nasty, "missing_image", nasty)]
    folder = write(tmp_path, data, quarantine=bad, labels=(nasty, f"{nasty}!"))
    look(folder)
    page = (folder / "inspect.html").read_text()
    assert page.count("<script>") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[red]&#39;&#34;" in page
    assert "[red]" in capsys.readouterr().out
