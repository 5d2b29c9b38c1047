"""Docstrings on the API page: `<teacher>` is a word to replace, and Markdown would take it for HTML and drop it."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PlainBrackets(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", obj.docstring.value)
