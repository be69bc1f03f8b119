"""Holds what the HTML pages share: page_kit.py builds their parts, page.css styles them."""
