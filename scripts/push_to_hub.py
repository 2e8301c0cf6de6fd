"""Publish a checkpoint on the Hugging Face Hub: `python scripts/push_to_hub.py CHECKPOINT OWNER/NAME`.

The same as `anyvlm push`.
"""

import typer

from anyvlm.publishing.command import push


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.command()(push)

if __name__ == "__main__":
    app()
