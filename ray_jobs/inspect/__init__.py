"""What `inspect` looks at, part by part.

scan.py        shards → keys, labels, hashes and brightness of images, columns
columns.py     a column's values by split → distribution, drift, leakage
duplicates.py  hashes by split → the same and nearly the same images, the same keys
facts.py       the report as data: what inspect.json holds
gather.py      all of these → the report
findings.py    the report → what in it deserves a look
page.py        the report and some images → inspect.html
"""

from ray_jobs.inspect.job import inspect

__all__ = ["inspect"]
