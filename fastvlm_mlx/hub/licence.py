"""The terms of Apple's weights, pointed out once before they are first used, and never on stdout.

Apple's FastVLM weights are under the Apple Machine Learning Research Model licence, for research purposes only. A file
in our cache notes that this has been said; where it cannot be written, the notice comes once per process.
"""

from ..errors import FastVLMError, warn
from . import caches

APPLE = "apple-amlr"  # the Hub's name of the licence
FILES = ("LICENSE_MODEL", "LICENSE", "LICENSE.txt", "LICENSE.md")  # in a checkpoint's folder, the most specific first
AGREEMENT = "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL"
ATTRIBUTION = (
    "Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model License "
    "Agreement."
)
NOTICE = (
    f"These weights are Apple's, for research purposes only (licence {APPLE}); the agreement: {AGREEMENT}. "
    "This note appears once."
)

announced = False  # whether this process has begun to warn


def announce(licence: str) -> None:
    """Warn (FastVLMWarning) of Apple's terms where `licence` is Apple's and this has not been said before."""
    global announced
    if licence != APPLE or announced:
        return
    announced = True
    try:
        mark = caches.root() / "notices" / APPLE
        if mark.exists():
            return
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(NOTICE + "\n", encoding="utf-8")
    except (OSError, FastVLMError):  # no home, or one that cannot be written: said every time, then
        pass
    warn(NOTICE)
