"""The command line: typer commands that call the public names of `rewire`.

Nothing here imports torch or Transformers when loaded, so that `--help` answers at once.
"""

from rewire.cli.app import app, main

__all__ = ["app", "main"]
