"""The `moesys` command as a process: stopped by Ctrl-C at any moment, and reading UTF-8 wherever it runs.

python -m moesys launch configs/quickstart.yaml
"""

from __future__ import annotations

import os
import signal
import sys

from moesys.errors import MoesysError

STOPPED = 130

_asked: list[int] = []


def main() -> int:
    """Run one command; returns its exit code, 130 after Ctrl-C."""
    try:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable
        _read_utf8()
        from moesys.cli import main as command

        return command()
    except KeyboardInterrupt:
        return STOPPED
    except MoesysError as error:  # of a plug-in: the schema loads them as it is imported
        print(f"moesys: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:
        if _asked:  # libraries that are being imported turn it into errors of their own
            return STOPPED
        raise
    finally:
        signal.signal(signal.SIGINT, lambda *_: os._exit(STOPPED))


def _interrupt(number: int, frame: object) -> None:
    _asked.append(number)
    raise KeyboardInterrupt


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Print nothing for a Ctrl-C in a place that cannot raise it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _read_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding: this project's files are UTF-8.

    The terminal keeps its encoding.
    """
    import locale

    if sys.flags.utf8_mode or locale.getencoding().lower().replace("-", "") == "utf8":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", None) or "ascii")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
