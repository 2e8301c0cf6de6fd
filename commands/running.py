"""What every command does around its work: progress, quiet libraries, and errors that name what could not be loaded."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console


#: For progress: stdout has only what a command prints for its reader, and can be piped.
progress = Console(stderr=True)


@contextmanager
def naming(*sources: str | None) -> Iterator[None]:
    """Name what could not be loaded: transformers' messages about the Hub often do not."""
    try:
        yield
    except OSError as error:
        absent = [source for source in sources if source and not Path(source).exists()]
        # A number means that the system refused something: then the message is about a file.
        if error.errno is not None or not absent:
            raise
        raise OSError(
            f"{' or '.join(absent)} is no folder here, and could not be had from the Hub: {error}"
        ) from error


def calm_transformers() -> None:
    """Leave out what transformers says while it loads: its bars and advice would bury the one line that matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def load_composed(checkpoint: str, trust_remote_code: bool, dtype: str | None = None) -> tuple[Any, Any]:
    """A composed model, on the graphics card if there is one, and its processor.

    Raises:
        ValueError: the checkpoint is another kind of model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

    from anyvlm import AnyVlmConfig

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    if config.model_type != AnyVlmConfig.model_type:
        raise ValueError(
            f"{checkpoint} is a {config.model_type!r} model, not a composed one. Make one with: anyvlm compose; or of a "
            "vision-language model of transformers with: anyvlm convert."
        )
    arguments = {} if dtype is None else {"dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, **arguments)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor
