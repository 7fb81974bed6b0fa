"""Markdown while it comes: whatever the pieces it comes in, the screen ends up showing the whole, rendered."""

import random
from io import StringIO

import pytest
from rich.console import Console
from rich.markdown import Markdown

from fastvlm_mlx.cli.conversation.markdown import MarkdownWriter, block_end

TEXT = """# A title

Some **bold** text, and a [link](https://example.org).

- one
- two

  still two

1. first

2. second

```python
x = 1

y = 2
```

The end.
"""


def shown(text: str) -> list[str]:
    """The lines that rendering a whole text gives."""
    console = Console(file=StringIO(), width=60)
    console.print(Markdown(text, hyperlinks=False))
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(5))
def test_any_pieces_give_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    console = Console(file=StringIO(), width=60)
    with MarkdownWriter(console) as writer:
        rest = TEXT
        while rest:
            size = rng.randint(1, 12)
            writer.add(rest[:size])
            rest = rest[size:]
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in lines if line.strip()] == shown(TEXT)


def test_in_a_terminal_what_is_drawn_over_is_erased() -> None:
    console = Console(file=StringIO(), width=60, height=10, force_terminal=True)
    with MarkdownWriter(console) as writer:
        for number in range(40):
            writer.add(f"line {number}\n")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "line 39" in text and text.endswith("\n")
    assert text.rindex("\x1b[2K") < text.index("line 0 line 1", text.rindex("\x1b[2K"))


def test_an_interrupt_leaves_the_terminal_in_order() -> None:
    console = Console(file=StringIO(), width=60, force_terminal=True)
    with pytest.raises(KeyboardInterrupt), MarkdownWriter(console) as writer:
        writer.add("half an ans")
        raise KeyboardInterrupt
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "half an ans" in text and text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("one", 0), ("one\n", 0), ("one\n\n", 0), ("one\n\ntwo", 5), ("\n\none", 0), ("one\n\n\ntwo", 6),
        ("- a\n\n- b", 0),
        ("- a\n\n  b", 0), ("1. a\n\n2. b", 0), ("```\na\n\nb", 0), ("```\na\n\nb\n```\n\nc", 14),
        ("~~~\n```\n\na\n~~~\n\nb", 16),
    ],
)  # fmt: skip
def test_where_a_block_ends(text: str, end: int) -> None:
    assert block_end(text) == end
