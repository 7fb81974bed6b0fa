"""The synthetic world: pictures of shapes and of printed text, drawn from a seed.

``draw(rng, options)`` gives a ``Scene``: the picture as a PIL RGB image, and what is on it. A picture shows one to four
shapes, or one line of text, or both. Positions and sizes are in pixels of the picture, x to the right, y down.

Random strings leave out O, I, 0 and 1, which several typefaces draw alike; numbers use all ten digits and words all
letters, because there the neighbours tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
RGB: dict[str, tuple[tuple[int, int, int], ...]] = {  # each colour lies between its two ends
    "red": ((225, 20, 25), (190, 25, 40)),
    "green": ((20, 150, 45), (50, 185, 70)),
    "blue": ((20, 60, 210), (45, 110, 235)),
    "yellow": ((250, 225, 20), (235, 215, 60)),
    "orange": ((250, 135, 10), (235, 120, 35)),
    "purple": ((125, 30, 160), (155, 60, 190)),
    "black": ((0, 0, 0), (35, 35, 35)),
    "white": ((255, 255, 255), (232, 232, 232)),
}
HELD_OUT_PAIRS = frozenset(  # (shape, colour) never drawn in training
    {
        ("circle", "orange"),
        ("square", "purple"),
        ("triangle", "white"),
        ("star", "blue"),
        ("ring", "green"),
        ("cross", "red"),
    }
)
UNNAMED = ""  # the name of a colour that is none of these; training shows such shapes and asks only what they are
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = "23456789"
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "STOP", "OPEN", "EXIT", "SALE", "FREE", "HOT", "COLD", "PUSH", "PULL", "TAXI", "BUS", "CAFE", "BANK",
    "FOOD", "SHOP", "HOTEL", "PARK", "ROAD", "NORTH", "SOUTH", "EAST", "WEST", "TEA", "MILK", "BREAD", "FISH",
    "BOOK", "MUSIC", "WATER", "FIRE", "HELP", "HELLO", "HOUSE", "TRAIN", "PLANE", "STREET", "SCHOOL", "MARKET",
    "PIZZA", "APPLE", "LEMON", "SUGAR", "SALT", "GOLD", "SILVER", "RIVER", "OCEAN", "BEACH", "MOUNT", "FOREST",
    "GARDEN", "WINTER", "SUMMER", "SPRING", "AUTUMN", "MONDAY", "FRIDAY", "SUNDAY", "JUNE", "JULY", "MAY",
    "MARCH", "DOG", "CAT", "BIRD", "HORSE", "TIGER", "MOUSE", "ZEBRA", "WHALE", "SNAKE", "SHEEP", "GOAT",
    "DUCK", "FROG", "BEAR", "WOLF", "LION", "TOP", "NEW", "OLD", "BIG", "YES", "LOVE", "PEACE", "HAPPY",
    "LUCKY", "QUIET", "JAZZ", "ROCK", "FILM", "VIDEO", "RADIO", "PHONE", "MOBILE", "LASER", "ROBOT", "PIXEL",
    "PYTHON", "DATA", "CODE", "LINUX", "QUEUE", "INDEX", "JOKER", "KING", "QUEEN", "KNIGHT", "CASTLE", "BRIDGE",
    "TOWER", "CHURCH", "MUSEUM", "POLICE", "DOCTOR", "NURSE", "PILOT", "ACTOR", "BAKER", "PAPER", "PENCIL",
    "TABLE", "CHAIR", "DOOR", "WINDOW", "MIRROR", "CLOCK", "WATCH", "WHEEL", "ENGINE", "ROCKET", "PLANET",
    "STARS", "MOON", "SUN", "CLOUD", "STORM", "WIND", "RAIN", "SNOW", "ICE", "FLOOD",
)  # fmt: skip
MIN_TEXT_CONTRAST = 150.0
MIN_SHAPE_CONTRAST = 100.0
SUPERSAMPLING = 3

Colour = tuple[int, int, int]
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """One shape: its kind, its colour's name, its centre and its diameter."""

    kind: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Text:
    """One line of text: what it says and the centre of every character."""

    string: str
    centres: tuple[tuple[float, float], ...]
    height: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it."""

    image: Image.Image
    shapes: tuple[Shape, ...]
    text: Text | None


@dataclass(frozen=True)
class Options:
    """What a world draws. ``held_out`` chooses the pairs and strings that training never sees."""

    image_size: int = 192
    held_out: bool = False
    text_share: float = 0.45  # pictures with text and nothing else
    both_share: float = 0.08  # pictures with text and shapes
    max_characters: int = 4
    other_size_share: float = 0.3  # pictures drawn at another size than the model's
    unnamed_share: float = 0.0  # of the pictures with shapes: all of them in colours without a name
    only: str | None = None  # "shapes" or "text": draw nothing else
    words_share: float = 0.3
    numbers_share: float = 0.12
    lower_case_share: float = 0.2  # of the words


def is_held_out_string(string: str) -> bool:
    """Whether a random string belongs to the held-out tenth: a fixed property of its characters."""
    return sum((index + 3) * ord(character) for index, character in enumerate(string)) % 10 == 0


@lru_cache(maxsize=1)
def typefaces() -> tuple[str, ...]:
    """Typefaces at hand: "" is Pillow's own, the others are DejaVu's files where installed."""
    found = [""]
    names = (
        "Sans",
        "Sans-Bold",
        "Sans-Oblique",
        "Sans-BoldOblique",
        "Serif",
        "Serif-Bold",
        "SansMono",
        "SansMono-Bold",
    )
    for name in (*names, "SansCondensed", "SansCondensed-Bold", "Serif-Italic", "SansMono-Oblique"):
        try:
            found.append(str(ImageFont.truetype(f"DejaVu{name}.ttf", 20).path))
        except OSError:
            continue
    return tuple(found)


@lru_cache(maxsize=2048)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    if face and Path(face).exists():
        return ImageFont.truetype(face, size)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; install a wheel that has it")
    return font


def _unnamed(rng: np.random.Generator, kind: str) -> Colour:
    """Any colour whose nearest name does not make a pair with ``kind`` that training must not see."""
    middles = {name: ((np.array(low) + np.array(high)) / 2).astype(np.float32) for name, (low, high) in RGB.items()}
    while True:
        values = rng.integers(0, 256, 3)
        nearest = min(middles, key=lambda name: _distance(values.astype(np.float32), middles[name]))
        if (kind, nearest) not in HELD_OUT_PAIRS:
            return int(values[0]), int(values[1]), int(values[2])


def _mix(rng: np.random.Generator, name: str) -> Colour:
    low, high = RGB[name]
    share = rng.random()
    jitter = rng.integers(-8, 9, 3)
    values = [int(min(255, max(0, a + (b - a) * share + j))) for a, b, j in zip(low, high, jitter, strict=True)]
    return values[0], values[1], values[2]


def _distance(a: Array, b: Array) -> float:
    """Colour difference weighted for the eye ("redmean"), 0 to about 765."""
    mean = float(a[0] + b[0]) / 2
    d = (a - b) ** 2
    return math.sqrt((2 + mean / 256) * d[0] + 4 * d[1] + (2 + (255 - mean) / 256) * d[2])


def _background_colour(rng: np.random.Generator, avoid: list[Colour], contrast: float) -> Array | None:
    """A random colour that stands out from every colour in ``avoid``; None where none was found."""
    best, best_distance = np.zeros(3, np.float32), -1.0
    for _ in range(40):
        if rng.random() < 0.5:
            grey = rng.uniform(0, 255)
            colour = np.clip(grey + rng.normal(0, 12, 3), 0, 255).astype(np.float32)
        else:
            colour = rng.uniform(0, 255, 3).astype(np.float32)
        distance = min((_distance(colour, np.array(c, np.float32)) for c in avoid), default=1e9)
        if distance >= contrast * 1.3:
            return colour
        if distance > best_distance:
            best, best_distance = colour, distance
    return best if best_distance >= contrast else None


def _background(
    rng: np.random.Generator, height: int, width: int, avoid: list[Colour], contrast: float
) -> Array | None:
    """A plain or textured background, (H, W, 3) float32, 0-255, whose colours all keep the contrast."""
    first = _background_colour(rng, avoid, contrast)
    if first is None:
        return None
    kind = rng.choice(5, p=(0.4, 0.2, 0.14, 0.13, 0.13))
    if kind == 0:
        return np.broadcast_to(first, (height, width, 3)).astype(np.float32)
    second = first
    for _ in range(30):
        reach = rng.uniform(15, 110)
        candidate = np.clip(first + rng.normal(0, 1, 3) * reach / 1.7, 0, 255).astype(np.float32)
        steps = [first + (candidate - first) * t for t in (0.25, 0.5, 0.75, 1.0)]
        if all(_distance(s.astype(np.float32), np.array(c, np.float32)) >= contrast for c in avoid for s in steps):
            second = candidate
            break
    angle = rng.uniform(0, 2 * math.pi)
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == 1:
        share = (along - along.min()) / (np.ptp(along) + 1e-6)
    elif kind == 2:
        period = rng.uniform(0.05, 0.25) * width
        share = (np.floor(along / period) % 2).astype(np.float32)
    elif kind == 3:
        period = rng.uniform(0.06, 0.25) * width
        across = y * math.cos(angle) - x * math.sin(angle)
        share = ((np.floor(along / period) + np.floor(across / period)) % 2).astype(np.float32)
    else:
        cells = int(rng.integers(3, 24))
        coarse = (rng.random((cells, cells)) * 255).astype(np.uint8)
        share = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    return np.asarray(first + (second - first) * share[..., None], np.float32)


def _outline(kind: str, radius: float, centre: float, angle: float) -> list[tuple[float, float]]:
    """The polygon of a shape around (centre, centre)."""
    points: list[tuple[float, float]] = []
    if kind == "square":
        points = [(radius, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif kind == "triangle":
        points = [(radius, -math.pi / 2 + k * 2 * math.pi / 3) for k in range(3)]
    elif kind == "star":
        points = [(radius if k % 2 == 0 else radius * 0.42, -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    elif kind == "cross":
        arm = 0.3
        corners = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
        corners += [(-a, -b) for a, b in corners]
        scale = radius / math.hypot(1, arm)
        points = [(math.hypot(a, b) * scale, math.atan2(b, a)) for a, b in corners]
    return [(centre + r * math.cos(t + angle), centre + r * math.sin(t + angle)) for r, t in points]


def _paste_shape(canvas: Array, shape: Shape, colour: Colour, rng: np.random.Generator) -> None:
    """Draw one shape, supersampled on its own patch, into ``canvas``."""
    radius = shape.size / 2
    side = math.ceil(shape.size) + 4
    left, top = math.floor(shape.x - side / 2), math.floor(shape.y - side / 2)
    patch = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    pen = ImageDraw.Draw(patch)
    centre_x, centre_y = (shape.x - left) * SUPERSAMPLING, (shape.y - top) * SUPERSAMPLING
    r = radius * SUPERSAMPLING
    if shape.kind in ("circle", "ring"):
        pen.ellipse((centre_x - r, centre_y - r, centre_x + r, centre_y + r), fill=255)
        if shape.kind == "ring":
            inner = r * rng.uniform(0.5, 0.68)
            pen.ellipse((centre_x - inner, centre_y - inner, centre_x + inner, centre_y + inner), fill=0)
    else:
        spread = math.pi if rng.random() < 0.5 else 0.25
        angle = float(rng.uniform(-spread, spread))
        points = [(px + centre_x, py + centre_y) for px, py in _outline(shape.kind, r, 0.0, angle)]
        pen.polygon(points, fill=255)
    mask = np.asarray(patch.reduce(SUPERSAMPLING), np.float32)[..., None] / 255
    height, width = canvas.shape[:2]
    y0, y1, x0, x1 = max(0, top), min(height, top + side), max(0, left), min(width, left + side)
    part = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[y0:y1, x0:x1] += part * (np.array(colour, np.float32) - canvas[y0:y1, x0:x1])


def random_string(rng: np.random.Generator, options: Options) -> str:
    """What a line of text says: a word, a number or a random string of three to ``max_characters``."""
    while True:
        share = rng.random()
        length = int(rng.integers(3, options.max_characters + 1))
        if share < options.words_share:
            fitting = [w for w in WORDS if len(w) <= max(4, options.max_characters)]
            word = fitting[int(rng.integers(len(fitting)))]
            return word.lower() if rng.random() < options.lower_case_share else word
        if share < options.words_share + options.numbers_share:
            alphabet = "0123456789"
        elif rng.random() < 0.3:
            alphabet = LETTERS
        else:
            alphabet = LETTERS + DIGITS * 2
        string = "".join(alphabet[int(i)] for i in rng.integers(0, len(alphabet), length))
        if is_held_out_string(string) == options.held_out:
            return string


def _paste_text(canvas: Array, string: str, colour: Colour, options: Options, rng: np.random.Generator) -> Text | None:
    """Draw one line of text; None where it does not fit."""
    height, width = canvas.shape[:2]
    side = min(height, width)
    faces = typefaces()
    face = faces[0] if rng.random() < 0.25 else faces[int(rng.integers(len(faces)))]
    target = rng.uniform(0.11, 0.26) * side  # a capital's height
    for _ in range(8):
        size = round(target / 0.72)
        font = _font(face, size)
        left, top, right, bottom = font.getbbox(string)
        if right - left <= width * 0.94 and bottom - top <= height * 0.94:
            break
        target *= 0.86
    else:
        return None
    capital = font.getbbox("H")
    if capital[3] - capital[1] < 0.095 * side:
        return None
    text_width, text_height = right - left, bottom - top
    x = rng.uniform(2, max(2.1, width - text_width - 2))
    y = rng.uniform(2, max(2.1, height - text_height - 2))
    patch = Image.new("L", (int(text_width) + 6, int(text_height) + 6))
    ImageDraw.Draw(patch).text((3 - left, 3 - top), string, fill=255, font=font)
    x0, y0 = int(x) - 3, int(y) - 3
    mask = np.asarray(patch, np.float32)[..., None] / 255
    y_from, x_from = max(0, -y0), max(0, -x0)
    y_to, x_to = min(mask.shape[0], height - y0), min(mask.shape[1], width - x0)
    view = canvas[y0 + y_from : y0 + y_to, x0 + x_from : x0 + x_to]
    view += mask[y_from:y_to, x_from:x_to] * (np.array(colour, np.float32) - view)
    centres: list[tuple[float, float]] = []
    middle = y0 + 3 - top + (capital[1] + capital[3]) / 2
    for index in range(len(string)):
        start, end = font.getlength(string[:index]), font.getlength(string[: index + 1])
        centres.append((x0 + 3 - left + (start + end) / 2, middle))
    box = (float(x0 + 3), float(y0 + 3), float(x0 + 3 + text_width), float(y0 + 3 + text_height))
    return Text(string, tuple(centres), float(capital[3] - capital[1]), box)


def _choose_shapes(
    rng: np.random.Generator,
    options: Options,
    count: int,
    height: int,
    width: int,
    blocked: list[tuple[float, float, float, float]],
) -> list[Shape]:
    """Kinds, colours and overlap-free places for ``count`` shapes (fewer where they do not fit)."""
    side = min(height, width)
    colours = [str(c) for c in rng.choice(COLOURS, size=int(rng.integers(2, 5)), replace=False)]
    kinds = [str(k) for k in rng.choice(SHAPES, size=int(rng.integers(2, 7)), replace=False)]
    chosen: list[Shape] = []
    for _ in range(count):
        for _ in range(50):
            kind, colour = kinds[int(rng.integers(len(kinds)))], colours[int(rng.integers(len(colours)))]
            held_out = (kind, colour) in HELD_OUT_PAIRS
            if held_out and not options.held_out:
                continue
            size = rng.uniform(0.12, 0.34) * side
            if kind in ("star", "cross", "ring"):
                size = max(size, 0.15 * side)
            reach = size / 2 + 1
            x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
            clear = all(math.hypot(x - o.x, y - o.y) > (size + o.size) / 2 + 3 for o in chosen)
            clear = clear and all(
                math.hypot(x - min(max(x, b[0]), b[2]), y - min(max(y, b[1]), b[3])) > reach + 3 for b in blocked
            )
            if clear:
                chosen.append(Shape(kind, colour, float(x), float(y), float(size)))
                break
    if options.unnamed_share and rng.random() < options.unnamed_share:
        chosen = [replace(shape, colour=UNNAMED) for shape in chosen]
    return chosen


def _plan_held_out(rng: np.random.Generator, shapes: list[Shape]) -> list[Shape]:
    """In about half of the held-out pictures, turn one shape into a pair that training never sees."""
    if not shapes or rng.random() < 0.5:
        return shapes
    pairs = sorted(HELD_OUT_PAIRS)
    kind, colour = pairs[int(rng.integers(len(pairs)))]
    index = int(rng.integers(len(shapes)))
    old = shapes[index]
    shapes[index] = Shape(kind, colour, old.x, old.y, old.size)
    return shapes


def draw(rng: np.random.Generator, options: Options) -> Scene:
    """One picture, at the size it is drawn (which need not be the model's)."""
    size = options.image_size
    height = width = size
    if rng.random() < options.other_size_share:
        side = int(rng.integers(int(size * 0.9), int(size * 2.4)))
        height = width = side
        if rng.random() < 0.5:
            shorter = int(side * rng.uniform(0.6, 1.0))
            height, width = (shorter, side) if rng.random() < 0.7 else (side, shorter)
    kind = options.only
    if kind is None:
        share = rng.random()
        kind = (
            "text"
            if share < options.text_share
            else "both"
            if share < options.text_share + options.both_share
            else "shapes"
        )
    while True:
        canvas_colours: list[Colour] = []
        string, text_colour, shape_count = "", (0, 0, 0), 0
        if kind != "shapes":
            string = random_string(rng, options)
            text_colour = _mix(rng, str(rng.choice(COLOURS)))
            canvas_colours.append(text_colour)
        if kind != "text":
            shape_count = (
                int(rng.integers(1, 3)) if kind == "both" else int(rng.choice(4, p=(0.25, 0.25, 0.25, 0.25))) + 1
            )
        probe = _choose_shapes(rng, options, shape_count, height, width, []) if shape_count else []
        if options.held_out:
            probe = _plan_held_out(rng, probe)
        paints = [_mix(rng, s.colour) if s.colour else _unnamed(rng, s.kind) for s in probe]
        contrast = MIN_TEXT_CONTRAST if kind == "text" else MIN_SHAPE_CONTRAST
        background = _background(rng, height, width, canvas_colours + paints, contrast)
        if background is None:
            continue
        canvas = background.copy()
        text: Text | None = None
        if string:
            text = _paste_text(canvas, string, text_colour, options, rng)
            if text is None:
                continue
            box = text.box
            probe_and_paints = [
                (s, p)
                for s, p in zip(probe, paints, strict=True)
                if math.hypot(s.x - min(max(s.x, box[0]), box[2]), s.y - min(max(s.y, box[1]), box[3])) > s.size / 2 + 4
            ]
            if kind == "both" and not probe_and_paints:
                continue
        else:
            probe_and_paints = list(zip(probe, paints, strict=True))
        for shape, paint in probe_and_paints:
            _paste_shape(canvas, shape, paint, rng)
        break
    noise = rng.uniform(0, 9) if rng.random() < 0.6 else 0.0
    if noise > 0.5:
        canvas += (rng.standard_normal((height, width, 1), np.float32) * noise).astype(np.float32)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return Scene(image, tuple(s for s, _ in probe_and_paints), text)


def to_model_pixels(scene: Scene, size: int) -> tuple[NDArray[np.uint8], float, float, float]:
    """The runtime's preprocessing: pad to a centred square with black, bicubic to ``size`` in uint8.

    :return: pixels (S, S, 3) uint8, then the scale and the x and y offsets that carry the scene's coordinates over.
    """
    image = scene.image
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    if width != height:
        square = Image.new("RGB", (side, side))
        square.paste(image, (left, top))
        image = square
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    scale = size / side
    return np.asarray(image), scale, left * scale, top * scale
