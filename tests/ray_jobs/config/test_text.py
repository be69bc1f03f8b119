from ray_jobs.config.text import count_text


def test_counts_are_in_the_singular_or_the_plural():
    assert [count_text(n, "row") for n in (0, 1, 2, 1234)] == [
        "0 rows", "1 row", "2 rows", "1,234 rows",
    ]  # fmt: skip
