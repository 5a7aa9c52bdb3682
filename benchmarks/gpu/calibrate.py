"""What `mnemoc calibrate` measures, and the cluster file that it writes, beside what was shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mnemoc import calibration_gpu
from mnemoc.planner import Cluster, load_cluster
from mnemoc.runtime.measuring import probes_gpu, probes_providers
from mnemoc.runtime.measuring.probes_gpu import Sizes

from .device import Run
from .kernels import kernel_spec
from .runner import Case, Figures, Section, Setup
from .timing import race
from .work import Heads

CLUSTER_FILE = "cluster.toml"

TINY = Sizes(
    rows=(16, 32),
    weights=(1 << 12, 1 << 13),
    chunks=(4, 8),
    pasts=(64,),
    lengths=(64, 128),
    copy=1 << 16,
    pages=(1, 2),
    square=64,
    cold=1 << 14,
    launches=5,
)
TINY_POINTS = probes_providers.Points(prefill=((4, 40),), decode=((2, 24),), cold=1)


def cases(setup: Setup) -> Sequence[Case]:
    setup.drop_pool()
    return [Case("this device", lambda: _calibrated(setup))]


def _calibrated(setup: Setup) -> list[Figures]:
    path = setup.out / CLUSTER_FILE
    full = probes_gpu.FULL, probes_providers.FULL
    quick = probes_gpu.QUICK, probes_providers.QUICK
    if setup.device.rehearsal:
        bench, sizes = _rehearsed(setup), (TINY, TINY_POINTS)
    else:
        bench, sizes = calibration_gpu.this_gpu(), quick if setup.sizes.quick else full
    effort = calibration_gpu.Effort(None, *sizes)  # tiles are a section of their own
    cluster = calibration_gpu.calibrate_device(path, bench, effort, setup.measured)
    shipped = load_cluster(cluster.name)
    numbers = [
        {"figure": key, "unit": now.unit, "measured": now.value, "shipped": shipped[key]}
        for key, now in cluster.numbers.items()
        if now.source != shipped.numbers[key].source
    ]
    return numbers + [row for key in cluster.curves for row in _curve(key, cluster, shipped)]


def _rehearsed(setup: Setup) -> calibration_gpu.Bench:
    """The rehearsal's device, as if it were a GPU of a DGX H100."""
    heads, device = Heads("rehearsal", 4, 2, 64), setup.device
    spec = kernel_spec(device.target, heads, device.dtype, hidden=96, ffn=160)

    def clock(runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
        few = {name: calls[:2] for name, calls in runs.items()}
        return {name: timing.median_s for name, timing in race(device, few, 0.0).items()}

    memory = device.machine.memory_bytes << 4
    return calibration_gpu.Bench(
        "dgx-h100", "rehearsal", memory, spec, device.tiles, device.place, clock
    )


def _curve(key: str, cluster: Cluster, shipped: Cluster) -> list[Figures]:
    """Measured shares by size, beside what the shipped file says of that size."""
    return [
        {
            "figure": f"efficiency.{key}",
            "unit": cluster.curves[key].unit,
            "size": size,
            "measured": share,
            "shipped": shipped.curve(key).share(size),
        }
        for size, share in cluster.curves[key].points
        if cluster.curves[key].source != shipped.curve(key).source
    ]


SECTION = Section("calibrate", "What `mnemoc calibrate` measures", cases)
