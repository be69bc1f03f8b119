import re

import numpy as np

from tests.ray_jobs.inspect.samples import SPLITS, look, rows, write
from tests.ray_jobs.tiny import COLUMNS


def test_the_page_loads_and_runs_nothing(harmless, tmp_path):
    look(harmless, output=str(tmp_path))
    page = (tmp_path / "inspect.html").read_text()
    assert "default-src 'none'" in page
    assert re.findall(r"<script|https?://|@import|url\(", page) == []
    assert set(re.findall(r"(?:src|href)='(.{22})", page)) == {"data:image/jpeg;base64"}
    assert page.count("<svg") == len(COLUMNS) + 2


def test_text_from_the_data_is_shown_and_never_obeyed(tmp_path, capsys):
    nasty = "<script>alert(1)</script>[red]'\""
    data = {s: rows(s, 20) | {nasty: np.arange(20.0)} for s in SPLITS}
    for split in SPLITS:
        data[split]["key"] = [f"{nasty}{split if i else ''}{i}" for i in range(20)]
    bad: list[tuple[str | None, str, str]] = [(nasty, "missing_image", nasty)]
    folder = write(tmp_path, data, quarantine=bad, labels=(nasty, f"{nasty}!"))
    look(folder)
    page = (folder / "inspect.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[red]&#x27;&quot;" in page
    assert "[red]" in capsys.readouterr().out
