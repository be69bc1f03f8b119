"""Builds HTML pages: jinja2 templates, one style sheet and plotly charts.

page_kit.py      renders a page from the template of its package; turns a figure into a chart
base.html.j2     the frame of all pages
macros.html.j2   tables and other parts that pages share
page.css         the style of all pages, light and dark
charts.js        draws the charts in the colors of the style sheet
"""
