"""What all tests share: which mnemoc is under test, offline, and hypothesis without a stopwatch."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MNEMOC_CALIBRATE", "0")  # --cluster local as shipped, at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import hypothesis
import mnemoc
import pytest

# A shell that starts the tests in the background has them ignore SIGINT, and their children with them:
# handled here, it is back at its default in what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("mnemoc", deadline=None)
hypothesis.settings.load_profile("mnemoc")


def pytest_report_header(config: pytest.Config) -> str:
    return f"mnemoc under test: {mnemoc.__file__}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-goldens", action="store_true", help="write golden texts anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` holds text against goldens/NAME beside the test (--rewrite-goldens writes it)."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "goldens" / name
        if request.config.getoption("--rewrite-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{path} differs: --rewrite-goldens, then read the diff"

    return check
