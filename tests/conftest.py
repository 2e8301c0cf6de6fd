"""Shared fixtures. Tests run offline, and on as many threads as each worker should have."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # also of the processes a test starts: with more threads, kernels round otherwise
    )

import pytest
import torch
from transformers.utils import logging


logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def trained_models():
    """Folder with small trained models, which the project does not contain."""
    folder = os.environ.get("ANYVLM_TEST_MODELS")
    if not folder:
        pytest.skip("needs trained models: set ANYVLM_TEST_MODELS to a folder with dinov2-small and stories-15m")
    return folder
