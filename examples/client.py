"""Ask a server as every program does that speaks OpenAI's API: a picture, a question, and the answer as it comes.

Usage: python examples/client.py [--model MODEL] [--image PICTURE] [--server http://127.0.0.1:8080]

Without --server one is started for as long as this takes. It needs the extra `serve`, and the package openai.
"""

import argparse
import base64
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", type=Path, default=Path(__file__).parent / "shapes.png")
parser.add_argument("--server")
args = parser.parse_args()


@contextmanager
def server():
    """The address of a server of the model, which ends with the block."""
    command = [sys.executable, "-m", "fastvlm_mlx", "serve", "--model", args.model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield re.search(r"http://\S+", process.stdout.readline())[0]
        finally:
            process.terminate()


def ask(address):
    """Two questions about a picture; the second costs its own words only."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    model = client.models.list().data[0].id
    picture = f"data:image/png;base64,{base64.b64encode(args.image.read_bytes()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": picture}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": "Describe the image."}]}]
    said = ""
    for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=64, stream=True):
        if chunk.choices[0].delta.content:
            said += chunk.choices[0].delta.content
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "How many shapes are there?"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=64)
    known, every = answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens
    print(f"{answer.choices[0].message.content}  ({known} of {every} positions were there already)")


if args.server:
    ask(args.server)
else:
    with server() as address:
        ask(address)
