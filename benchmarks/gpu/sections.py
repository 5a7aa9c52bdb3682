"""All sections, by name."""

from __future__ import annotations

from collections.abc import Mapping

from . import calibrate, ceilings, compiling, correctness, decode, prefill, rows, stage, tiles
from .runner import Section

SECTIONS: Mapping[str, Section] = {
    section.name: section
    for section in (
        ceilings.SECTION,
        compiling.SECTION,
        correctness.SECTION,
        prefill.SECTION,
        decode.SECTION,
        rows.SECTION,
        calibrate.SECTION,
        stage.SECTION,
        tiles.SECTION,
    )
}
