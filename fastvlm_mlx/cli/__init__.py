"""The command line: one file per command, each of which parses, calls the library and prints.

Enters: the arguments of `fastvlm-mlx`, stdin.
Leaves: the answer on stdout, everything else on stderr, an exit code.
May import: errors, version, config, progress, files, backend, quantize, inputs, storage, hub, convert, decoding, chat,
diagnostics, calibrate, export, finetune, folder, serve.
"""

from .entry import main

__all__ = ["main"]
