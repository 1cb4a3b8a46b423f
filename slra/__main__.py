"""``python -m slra``: the command line."""

import os
import sys

__all__ = ["main"]

_DEMO_EXTRA = {"typer", "rich", "matplotlib", "safetensors"}


def main() -> None:
    """Run the command line; what cannot be printed ends it with one line on stderr."""
    try:
        try:
            _run()
        finally:
            # Here, where it can still be said if a full disk or a closed pipe refuses the last lines.
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise
        # Python flushes once more when it ends, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"cannot write to standard output: {error.strerror}")


def _run() -> None:
    """Run a command, or say which extra to install if it lacks its libraries.

    Once a command runs, `slra.cli.terminal.Commands` minds its interrupts.
    """
    try:
        from slra.cli.app import app

        app(prog_name="slra")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _DEMO_EXTRA:
            raise
        sys.exit(f'the command line needs {missing}: pip install ".[demo]" in a clone of slra')
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
