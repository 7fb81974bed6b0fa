"""A folder under attack, and the attempt to convert it: refused in one sentence without a trace, or converted whole."""

from pathlib import Path

from .forkserver import Run


class Folder:
    """A folder of some layout, the test's own to change, and the attempt to convert it."""

    def __init__(self, run: Run, path: Path, apple: Path, layout: str):
        self.run, self.path, self.layout = run, path, layout
        self.out = path.parent / "out"
        self.options = ["--vision-from", str(apple)] if layout == "apple-mlx" else []

    def refused(self, *says: str, after: tuple[str, ...] = ()) -> None:
        before = sorted(self.path.parent.iterdir())
        self.run("convert", self.path, "--out", self.out, *self.options).refused(*says, after=after)
        assert sorted(self.path.parent.iterdir()) == before

    def refused_or_converted(self) -> None:
        result = self.run("convert", self.path, "--out", self.out, *self.options)
        result.cheap()
        left = {path.name for path in self.path.parent.iterdir()} - {self.path.name}
        if result.code == 0:
            assert left == {"out"} and "Traceback" not in result.err
            self.run("generate", "-m", self.out, "-p", "Hi", "--max-tokens", 1).answered()
        else:
            result.refused(after=("",) * (result.err.count("\n") - 1))
            assert not left
