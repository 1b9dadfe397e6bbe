"""Entry point of `vlqc` and `python -m vlqc`."""

import sys


def main() -> None:
    """Runs the command line. Exits without a traceback on Ctrl-C, even during imports."""
    try:
        from vlqc.cli.commands import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
