"""A page in Chromium that answers by transformers.js, offline, as `tiny` answers here.

Needs a folder of node modules, in which `npm install --ignore-scripts --omit=optional @huggingface/transformers` has
been run, and a Chromium:

FASTVLM_NODE_MODULES=.../node_modules FASTVLM_CHROMIUM=.../chromium python -m pytest -m large
tests/export/test_browser.py

Pictures are square and of the model's size, so that nothing is resized: a browser's bicubic is not Pillow's.
"""

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
playwright = pytest.importorskip("playwright.sync_api")

import fastvlm_mlx  # noqa: E402
from fastvlm_mlx.calibrate.examples import read_questions  # noqa: E402
from fastvlm_mlx.decoding.loading import open_model  # noqa: E402
from fastvlm_mlx.export import onnx_folder  # noqa: E402
from fastvlm_mlx.hub.find import find  # noqa: E402

CALIBRATION = Path(fastvlm_mlx.__file__).parent / "tiny" / "calibration"
MODULES, CHROMIUM = os.environ.get("FASTVLM_NODE_MODULES"), os.environ.get("FASTVLM_CHROMIUM")
SIDE = 192

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(
        MODULES is None or CHROMIUM is None, reason="FASTVLM_NODE_MODULES or FASTVLM_CHROMIUM is not set"
    ),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a server on this machine: the page, transformers.js, the model and pictures."""
    assert MODULES is not None
    root = tmp_path / "site"
    root.mkdir()
    (root / "index.html").symlink_to(Path(__file__).parent / "page" / "index.html")
    (root / "modules").symlink_to(MODULES)
    found = find("tiny")
    onnx_folder.write(open_model(found), found.folder, root / "models" / "tiny")
    (root / "pictures").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers_in_a_browser(site: str, tmp_path: Path) -> None:
    vlm = fastvlm_mlx.load("tiny", dtype="float32")
    asked, ours = [], []
    for number, question in enumerate(read_questions(CALIBRATION)[:12]):
        path = tmp_path / "site" / "pictures" / f"{number}.png"
        assert isinstance(question.image, Path)
        with Image.open(question.image) as image:
            image.convert("RGB").resize((SIDE, SIDE)).save(path)
        asked.append((f"pictures/{path.name}", question.text))
        ours.append(vlm.generate(path, question.text, max_tokens=48).text.strip())
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(site) else route.abort())
        page.goto(site)
        page.wait_for_function("window.ready === true")
        page.evaluate("load('tiny', 'fp32')")
        theirs = [
            page.evaluate("([address, text]) => answer(address, text)", [address, text]) for address, text in asked
        ]
        browser.close()
    assert [text.strip() for text in theirs] == ours
