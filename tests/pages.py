"""A page of HTML as its elements, for tests that read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

from mgd_stages.reports.page import report
from mgd_stages.run.project import Project

VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str, **wanted: str) -> list[Element]:
        """Elements of a tag below this one, in the order of the page; `class_` names one of several classes."""
        class_ = wanted.pop("class_", None)
        return [
            element
            for element in everything(self)
            if element.tag == tag and wanted.items() <= element.attributes.items()
            if class_ is None or class_ in element.attributes.get("class", "").split()
        ]

    @property
    def text(self) -> str:
        return " ".join("".join(child if isinstance(child, str) else f"{child.text} " for child in self.children).split())

    @property
    def number(self) -> float | None:
        """The exact value of the one number in it; None where it shows a dash."""
        numbers = self.all("data")
        assert len(numbers) == 1 or self.text == "–", self.text
        return float(numbers[0].attributes["value"]) if numbers else None


class Page(HTMLParser):
    """A parser that forgives nothing: every element is closed, in order, and no attribute is there twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"never closed: {self.open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag}: {attrs}"
        self.open.append(Element(tag, {key: value or "" for key, value in attrs}))
        self.open[-2].children.append(self.open[-1])
        if tag in VOID:
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def page_of(project: Project) -> Element:
    return Page(report(project).read_text(encoding="utf-8")).root


def section(page: Element, name: str) -> Element:
    (one,) = page.all("section", id=name)
    return one


def table(part: Element, label: str) -> dict[str, dict[str, Element]]:
    """The rows of a table by their first cell, and their cells by the text at the head of the column."""
    (region,) = part.all("div", **{"aria-label": label})
    heads = [head.text for head in region.all("thead")[0].all("th")]
    rows = {}
    for row in region.all("tbody")[0].all("tr"):
        cells = [cell for cell in everything(row) if cell.tag in ("th", "td")]
        rows[str(cells[0].children[0]).strip()] = dict(zip(heads, cells, strict=True))
    return rows


def everything(element: Element) -> list[Element]:
    """All elements below one, in the order of the page."""
    return [below for child in element.children if isinstance(child, Element) for below in (child, *everything(child))]


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
