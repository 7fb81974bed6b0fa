"""One digest of the pixels of many pictures and one of the token ids of the answers about them: equal before and after
a change, the change has touched neither.

    python -m benchmarks.digests tiny --pictures 300

Pictures are those that `training.evaluate` asks about, and each comes in one of the forms that people's files have: as
drawn, stretched long and narrow, with transparency, grey in 16 bits, with a palette, turned by its EXIF orientation.
Questions are asked alone, drawn with a seed, in batches, and one after another in a conversation. Token ids depend on
the machine's rounding, so digests of two machines may differ.
"""

import argparse
import hashlib
import io
import json
import sys

import numpy as np
from PIL import ExifTags, Image

import fastvlm_mlx  # before torch, which training imports, so that OpenBLAS is in place
from training.data import fixed_items
from training.world import Options

FORMS = ("drawn", "long", "narrow", "transparent", "grey", "palette", "turned")
MAX_TOKENS = 48


def in_form(image: Image.Image, form: str) -> bytes:
    """A picture as the bytes of a file of this form."""
    options: dict[str, object] = {}
    width, height = image.size
    if form == "long":
        image = image.resize((5 * width, height // 2))
    elif form == "narrow":
        image = image.resize((max(1, width // 3), 2 * height))
    elif form == "transparent":
        image = image.convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif form == "grey":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif form == "palette":
        image = image.convert("P")
    elif form == "turned":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def main() -> None:
    """Draw, ask, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what fastvlm_mlx.load takes")
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--bits", type=int, help="quantise while loading")
    args = parser.parse_args()
    vlm = fastvlm_mlx.load(args.model, bits=args.bits)
    pixels, ids = hashlib.sha256(), hashlib.sha256()
    asked = 0

    def count(answers: list[fastvlm_mlx.Answer]) -> None:
        nonlocal asked
        asked += len(answers)
        for answer in answers:
            ids.update(json.dumps([answer.token_ids, answer.text, answer.finish_reason]).encode())

    for number, (scene, questions) in enumerate(fixed_items(Options(), args.pictures, seed=11, held_out=True)):
        file = in_form(scene.image, FORMS[number % len(FORMS)])
        chat = vlm.chat()
        pixels.update(chat.look(file).digest)
        texts = [question.question for question in questions[:3]]
        way = number % 4
        if way == 0:
            count([vlm.generate(file, text, max_tokens=MAX_TOKENS) for text in texts])
        elif way == 1:
            count(
                [
                    vlm.generate(file, text, max_tokens=MAX_TOKENS, temperature=1.0, top_p=0.9, seed=number)
                    for text in texts
                ]
            )
        elif way == 2:
            count(vlm.batch([(file, text) for text in texts], max_tokens=MAX_TOKENS))
        else:
            count(
                [
                    chat.ask(text, image=None if place else file, max_tokens=MAX_TOKENS)
                    for place, text in enumerate(texts)
                ]
            )
    json.dump(
        {"pictures": args.pictures, "answers": asked, "pixels": pixels.hexdigest(), "ids": ids.hexdigest()}, sys.stdout
    )
    print()


if __name__ == "__main__":
    main()
