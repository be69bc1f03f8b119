"""Builds the common parts of all HTML pages (page_kit.py) and styles the pages (page.css)."""
