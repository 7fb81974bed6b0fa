"""The chat on the command line: lines typed or piped in, answers shown.

Enters: lines of text, from a terminal or a pipe.
Leaves: calls of `chat`, answers on stdout, notes on stderr.
May import: errors, files, inputs, decoding, chat, cli.
"""
