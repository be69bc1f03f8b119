from xml.etree import ElementTree

from ray_jobs.pages.page_kit import escape


def test_escaped_text_is_valid_xml():
    text = "<b>&'\"\x00\x1b\ud800é"
    element = ElementTree.fromstring(f"<a b='{escape(text)}'>{escape(text)}</a>")
    assert element.text == element.get("b") == "<b>&'\"���é"
