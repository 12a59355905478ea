"""Shared fixtures: quiet libraries, a fixed seed, one thread."""

from __future__ import annotations

import logging
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries' own imports
    import peft
    import torch
    import transformers

import pytest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torch.__trace").setLevel(logging.ERROR)  # fills every failure otherwise
    transformers.logging.set_verbosity_error()
    assert peft.__version__
