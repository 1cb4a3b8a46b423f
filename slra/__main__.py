"""``python -m slra``: the command line."""

import sys

__all__ = ["main"]

_DEMO_EXTRA = {"typer", "rich", "matplotlib", "safetensors"}


def main() -> None:
    """Run the command line, or say which extra to install if it lacks its libraries.

    Once a command runs, `slra.cli.terminal.Commands` minds its interrupts.
    """
    try:
        from slra.cli.app import app

        app(prog_name="slra")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _DEMO_EXTRA:
            raise
        sys.exit(f'the command line needs {missing}: pip install "slra[demo]"')
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
