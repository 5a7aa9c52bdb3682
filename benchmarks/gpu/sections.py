"""All sections, by name."""

from __future__ import annotations

from collections.abc import Mapping

from . import ceilings, correctness, decode, prefill, rows
from .runner import Section

SECTIONS: Mapping[str, Section] = {
    section.name: section
    for section in (
        ceilings.SECTION,
        correctness.SECTION,
        prefill.SECTION,
        decode.SECTION,
        rows.SECTION,
    )
}
