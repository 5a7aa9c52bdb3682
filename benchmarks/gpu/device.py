"""The one seam between a GPU and the rehearsal on a CPU: clocks, graphs, what the machine is.

`Cuda` times with events, and replays what it can as a captured graph, so that what is measured is the
device and not Python. `Rehearsal` runs the very kernels of the CUDA target in Triton's interpreter and times
them by the host's clock: its figures mean nothing, and everything around them is what runs on a GPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
from mnemoc.codegen.tiles import TILES, Tiles
from mnemoc.errors import BadInput
from mnemoc.runtime.rank.graphs import captured, warmed

Run = Callable[[], object]

_EVENT: Any = torch.cuda.Event  # untyped, as torch has it


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on. Clocks are read, never set: [now, most] in MHz."""

    device: str
    rehearsal: bool
    capability: str
    multiprocessors: int
    memory_bytes: int
    cache_bytes: int
    driver: str
    sm_clock_mhz: tuple[float, float] | None
    memory_clock_mhz: tuple[float, float] | None
    power_limit_w: float | None
    cpu: str
    python: str
    torch: str
    cuda: str | None
    triton: str
    date: str


@dataclass(frozen=True)
class Ready:
    """Something to be timed. `how`: "graph", captured; "eager", launched by Python each time."""

    run: Run
    how: str


class Device(Protocol):
    """Where kernels run.

    place: for tensors; target, tiles: what kernels are rendered for; dtype: of all but an fp8 cache
    rehearsal: whether its figures mean nothing
    """

    place: torch.device
    tiles: Tiles
    dtype: torch.dtype
    target: str
    rehearsal: bool
    machine: Machine

    def ready(self, run: Run, *, capture: bool = True) -> Ready:
        """`run`, warmed up, and captured if it can be."""
        ...

    def seconds(self, runs: Sequence[Run]) -> list[float]:
        """Time of each, run one after the other."""
        ...

    def synchronize(self) -> None: ...

    def release(self) -> None:
        """Give back memory that nothing uses."""
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile, where that is worth its time."""
        ...


class Cuda:
    """The first CUDA device."""

    rehearsal = False
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        torch.cuda.set_device(0)
        self.place = torch.device("cuda", 0)
        major, minor = torch.cuda.get_device_capability(0)
        self.target = f"cuda:sm_{major}{minor}"
        if f"sm_{major}{minor}" not in TILES:
            raise BadInput("no kernels for this GPU", got=self.target)
        self.tiles = TILES[f"sm_{major}{minor}"]
        properties = torch.cuda.get_device_properties(0)
        self.machine = Machine(
            device=properties.name,
            rehearsal=False,
            capability=f"{major}.{minor}",
            multiprocessors=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
            cache_bytes=properties.L2_cache_size,
            **_driver(),
            **_host(),
        )

    def ready(self, run: Run, *, capture: bool = True) -> Ready:
        warmed(run, times=2)
        self.synchronize()
        if not capture:
            return Ready(run, "eager")
        try:
            replay, _ = captured(run)
        except RuntimeError:  # it waits for the device, or allocates what a graph must not
            self.synchronize()
            return Ready(run, "eager")
        replay()
        self.synchronize()
        return Ready(replay, "graph")

    def seconds(self, runs: Sequence[Run]) -> list[float]:
        pairs = [[_EVENT(enable_timing=True), _EVENT(enable_timing=True)] for _ in runs]
        for (before, after), run in zip(pairs, runs, strict=True):
            before.record()
            run()
            after.record()
        self.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, dynamic=False)
        return self._compiled[function]


class Rehearsal:
    """The CPU, with Triton's interpreter, in the shape of a small Hopper GPU."""

    rehearsal = True
    target = "cuda:sm_90"
    tiles = dataclasses.replace(TILES["sm_90"], sms=2)  # programs run one after the other here
    dtype = (
        torch.float16
    )  # Triton's interpreter takes the bits of bfloat16 for integers in products

    def __init__(self) -> None:
        assert os.environ.get("TRITON_INTERPRET") == "1", "kernels were not loaded for a rehearsal"
        torch.set_num_threads(1)
        self.place = torch.device("cpu")
        self.machine = Machine(
            device="rehearsal on a CPU",
            rehearsal=True,
            capability="9.0",
            multiprocessors=2,
            memory_bytes=1 << 30,
            cache_bytes=1 << 11,
            driver="none",
            sm_clock_mhz=None,
            memory_clock_mhz=None,
            power_limit_w=None,
            **_host(),
        )

    def ready(self, run: Run, *, capture: bool = True) -> Ready:
        run()
        return Ready(run, "eager")

    def seconds(self, runs: Sequence[Run]) -> list[float]:
        times = []
        for run in runs:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return times

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        gc.collect()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


def is_fatal(error: Exception) -> bool:
    """Whether the device's context is lost: every later call would fail with it."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def _host() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {names[0]}" if names else f"{os.cpu_count()} cores"


def _driver() -> dict[str, Any]:
    """What nvidia-smi, which only reads, says of the driver, the clocks and the power limit."""
    asked = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "clocks.max.mem",
        "power.limit",
    )
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}"]
    try:
        answer = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        said = [word.strip() for word in answer.stdout.strip().split(",")]
    except (OSError, subprocess.TimeoutExpired):
        said = []
    driver, *numbers = said if len(said) == len(asked) else ["unknown"] + [""] * (len(asked) - 1)
    sm, most_sm, memory, most_memory, power = (_number(word) for word in numbers)
    return {
        "driver": driver,
        "sm_clock_mhz": None if sm is None or most_sm is None else (sm, most_sm),
        "memory_clock_mhz": None
        if memory is None or most_memory is None
        else (memory, most_memory),
        "power_limit_w": power,
    }


def _number(word: str) -> float | None:
    """None for what nvidia-smi cannot tell, such as "[N/A]"."""
    try:
        return float(word)
    except ValueError:
        return None
