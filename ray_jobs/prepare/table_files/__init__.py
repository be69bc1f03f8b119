"""Reads the table at a location, in any common file format, with notes on how it was read.

`table_parts` finds the files, joins their rows and rewrites decimal commas; `file_format`
recognises a file by its first bytes and unpacks it; `csv_files` (with `text_encoding`) and
`record_files` read the rows; `record_table` builds tables from records.
"""

from ray_jobs.prepare.table_files.table_parts import TableFile, open_table

__all__ = ["TableFile", "open_table"]
