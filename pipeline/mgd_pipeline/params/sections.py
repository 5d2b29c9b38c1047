"""What all sections of params.yaml share. A section is a frozen typed model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """'; nearest is 'seed'' where a known name is like the given one, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; nearest is {near[0]!r}" if near else ""


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, no silent conversions, immutable once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )
