"""Training data: where samples come from, and what is done with them before they are batches."""

from .source_settings import Source, spec_errors
from .sources import load_training_data


__all__ = ["Source", "load_training_data", "spec_errors"]
