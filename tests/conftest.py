"""What all tests share: which mnemoc is under test, offline, and hypothesis without a stopwatch."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter computes with bfloat16 and e4m3 as GPUs do.

    Left alone, it rounds halves up, loses what is carried, and multiplies the bits of bfloat16 as integers.
    """
    import numpy as np
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    inexact, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    narrow = {
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.bfloat16: (torch.bfloat16, torch.int16),
    }

    def convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in narrow:
            return inexact(x, source, target, rounding)
        dtype, bits = narrow[target]
        values = torch.from_numpy(np.ascontiguousarray(x)).view(torch.float32)
        rounded = values.to(dtype).view(bits).numpy()
        return rounded.view(f"u{rounded.itemsize}")

    def widened(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )
