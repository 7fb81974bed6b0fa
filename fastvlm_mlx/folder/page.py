"""A report as one HTML page to look through: figures, words, and thumbnails with what was said about them."""

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from html import escape

from PIL import Image

from ..errors import FastVLMError
from ..inputs.image import load_image
from .lines import Line, name_of
from .report import Report

THUMBNAIL = 176  # pixels of the longer side
QUALITY = 70  # of a thumbnail's JPEG
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere }
figure img { max-width: 100%; display: block; margin: 0 auto .5rem; border-radius: 3px }
figcaption small { color: #777; display: block } .doubt { border-color: #d90 } .failed { border-color: #c33 }
.words span { margin-right: .8rem; white-space: nowrap }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } figure { border-color: #444 } }
"""


def page(found: Report, summary: str, title: str, max_pixels: int) -> str:
    """A report as an HTML page that needs nothing beside it; pictures of more than `max_pixels` have no thumbnail."""
    words = "".join(f"<span>{escape(word)} {count}</span> " for word, count in found.words)
    doubtful = {id(line) for _, line in found.doubtful}
    sections = [
        _section("Failed", [("failed", line) for line in found.failures], max_pixels),
        _section("Doubtful", [(f"doubt: {why}", line) for why, line in found.doubtful], max_pixels),
        _section("Others", [("", line) for line in found.examples if id(line) not in doubtful], max_pixels),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1><p>{escape(summary.partition(chr(10))[0])}</p><p class=words>{words}</p>"
        f"{''.join(sections)}</html>\n"
    )


def _section(title: str, shown: list[tuple[str, Line]], max_pixels: int) -> str:
    if not shown:
        return ""
    with ThreadPoolExecutor(4) as threads:
        thumbnails = threads.map(lambda each: _thumbnails(each[1], max_pixels), shown)
        figures = [_figure(kind, line, images) for (kind, line), images in zip(shown, thumbnails, strict=True)]
    return f"<h2>{title}</h2><main>{''.join(figures)}</main>"


def _figure(kind: str, line: Line, images: Iterable[bytes]) -> str:
    data = "".join(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(image).decode()}">' for image in images)
    what = line.get("error") or line.get("text", "")
    why = kind.partition(": ")[2]
    name = name_of(line) + (f" ({why})" if why else "")
    question = f"<small>{escape(line['prompt'])}</small>" if "prompt" in line else ""
    return (
        f'<figure class="{kind.partition(":")[0]}">{data}<figcaption><small>{escape(name)}</small>{question}'
        f"{escape(str(what))}</figcaption></figure>"
    )


def _thumbnails(line: Line, max_pixels: int) -> list[bytes]:
    """Small JPEGs of a line's pictures; none of one that cannot be read, which its line says."""
    found = []
    for path in line["image"] if isinstance(line["image"], list) else [line["image"]]:
        try:
            image = load_image(path, max_pixels=max_pixels)
        except FastVLMError:
            continue
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        found.append(file.getvalue())
    return found
