"""What all tests share: which mnemoc is under test, offline, and hypothesis without a stopwatch."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import hypothesis
import mnemoc
import pytest

hypothesis.settings.register_profile("mnemoc", deadline=None)
hypothesis.settings.load_profile("mnemoc")


def pytest_report_header(config: pytest.Config) -> str:
    return f"mnemoc under test: {mnemoc.__file__}"
