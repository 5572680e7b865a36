"""Puts the figures of the run that is kept in bench/results into docs/performance.md:
``python -m pglimits_bench.document``."""

from __future__ import annotations

import json
from pathlib import Path

from ._report import as_markdown, lines_of
from ._results import Run, Skipped

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "bench.json"
DOCUMENT = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "images" / "growth.svg"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def with_figures(text: str) -> str:
    """The document, with the figures in place of those between the two marks."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{DOCUMENT} has no {BEGIN.strip()} with {END.strip()} after it")
    return f"{before}{BEGIN}\n{as_markdown(_kept())}\n{END}{after}"


def _kept() -> Run:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    skipped, failed = ([Skipped(**each) for each in found[name]] for name in ("skipped", "failed"))
    return Run(
        found["mode"],
        found["started_at"],
        found["setup"],
        found["seconds"],
        found["row_seconds"],
        lines_of(found),
        skipped=skipped,
        failed=failed,
    )


if __name__ == "__main__":
    CHART.write_bytes((RESULTS.parent / CHART.name).read_bytes())
    DOCUMENT.write_text(with_figures(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
