"""Reports what prepared data contains and which problems it has.

Input: a folder from `prepare`. Output: inspect.html and inspect.json.

job.py                runs the steps below, writes the report and prints a summary
shard_scan.py         shards → keys, labels, image hashes and brightness, columns, thumbnails
duplicates.py         hashes → duplicate images and keys
column_statistics.py  values of one column → distribution, drift, leakage
report_schema.py      the report as data, as stored in inspect.json
build_report.py       the three analyses → report
data_findings.py      report → findings
inspect_page.py       report and thumbnails → inspect.html, with its template
"""

from ray_jobs.inspect.job import inspect

__all__ = ["inspect"]
