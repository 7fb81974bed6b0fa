"""The entry point: however a command ends, it ends with an exit code and at most one line on stderr.

stdout carries the answer; everything else goes to stderr. Exit codes: 0 done, 1 an error (one sentence, no traceback),
2 wrong usage, 130 interrupted. FASTVLM_TRACEBACK=1 shows where an error came from.
"""

import os
import signal
import sys
from typing import NoReturn

from . import messages, process, startup
from .messages import say

REPORT = "please report it with the command at the project's page (FASTVLM_TRACEBACK=1 shows where it happened)"


def main() -> NoReturn:
    """Run `fastvlm-mlx` and end the process with its exit code."""
    try:
        process.watch()
        startup.spare_threads()
        process.open_streams()
        code = _run()
        process.flush()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the exit is left
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader is gone: no message, and none at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except BaseException as error:
        code = 130 if process.take() else _explain(error)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    startup.leave(code)


def _run() -> int:
    """Run the command; returns its exit code, or raises what ended it."""
    import typer

    from .app import COMMANDS, build, flags

    messages.use_flags(lambda: flags(sys.argv[1] if sys.argv[1:2] and sys.argv[1] in COMMANDS else "generate"))
    try:
        code = build(sys.argv[1:])(standalone_mode=False, prog_name="fastvlm-mlx")
    except typer.Abort:  # an interrupt, or the end of input where a question was asked
        return 130
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Print what went wrong in one line; returns the exit code."""
    from ..backend import address_space, failures
    from ..errors import FastVLMError

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if os.environ.get("FASTVLM_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, FastVLMError):
        say(str(error))
        return 1
    if hasattr(error, "format_message"):  # wrong usage
        return _explain_usage(error)
    if isinstance(error, OSError) and error.strerror:
        name = repr(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else "The output"
        say(f"{name} cannot be used ({error.strerror}); check the path, its permissions and the space left.")
    elif (meant := failures.explained(error)) is not None:
        say(str(meant))
    elif (sentence := address_space.explained(error) or failures.of_mlx(error)) is not None:
        say(sentence)
    else:
        say(f"This is an error in fastvlm-mlx: {type(error).__name__} ({str(error) or 'no message'}); {REPORT}.")
    return 1


def _explain_usage(error: BaseException) -> int:
    from .app import WITH_PICTURES

    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "fastvlm-mlx"
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
    else:
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        if "unexpected extra argument" in message and command.rpartition(" ")[2] in WITH_PICTURES:
            message += "; pictures are given after --image"
        elif "unexpected extra argument" in message and command.endswith(" batch"):
            message += "; put a pattern such as 'photos/*.jpg' in quotes"
        say(f"{message}; see '{command} --help'.")
    return int(getattr(error, "exit_code", 2))
