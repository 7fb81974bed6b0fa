"""Every chart of benchmarks/results/ drawn again from the figures recorded beside it; nothing is measured.

    python -m benchmarks.redraw

To be run where `benchmarks.charts` has changed. Needs the extra `benchmarks`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import compare, folder, quality, scaling, serve
from fastvlm_mlx.calibrate.quality import Quality
from fastvlm_mlx.diagnostics.machine import Machine

RESULTS = Path(__file__).parent / "results"


def charts_of(record: Path) -> Iterator[tuple[Path, str]]:
    """Each chart of a recorded measurement: the file it belongs into and its SVG; none for records without charts."""
    result: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    if "-serve-" in record.stem:
        yield record.with_suffix(".svg"), serve.chart(result)
    elif "medians" in result:
        yield record.with_suffix(".svg"), compare.chart(result)
    elif "folder_growth" in result:
        for suffix, drawn in folder.growth_charts(result).items():
            yield record.with_name(f"{record.stem}-{suffix}.svg"), drawn
    elif "resolutions" in result:
        for suffix, drawn in scaling.plots(result, Machine(**result["machine"])).items():
            yield record.with_name(f"{record.stem}-{suffix}.svg"), drawn
    elif "qualities" in result:
        yield record.with_suffix(".svg"), quality.chart([Quality(**each) for each in result["qualities"]])


def main() -> None:
    """Draw and write."""
    for record in sorted(RESULTS.glob("*.json")):
        for path, drawn in charts_of(record):
            path.write_text(drawn, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
