"""What `mnemoc calibrate` measures, and the cluster file that it writes, beside what was shipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mnemoc import calibration_gpu
from mnemoc.planner import Cluster, load_cluster
from mnemoc.runtime import probes_gpu
from mnemoc.runtime.probes_gpu import Probes, Shape, Sizes

from .kernels import PAGE, kernel_spec
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
    square=64,
    cold=1 << 14,
    launches=5,
)


def cases(setup: Setup) -> Sequence[Case]:
    setup.drop_pool()
    return [Case("this device", lambda: _calibrated(setup))]


def _calibrated(setup: Setup) -> list[Figures]:
    path = setup.out / CLUSTER_FILE
    if setup.device.rehearsal:
        measured = _rehearsed(setup)
        memory = setup.device.machine.memory_bytes << 4
        cluster = calibration_gpu.write(path, "dgx-h100", "rehearsal", memory, measured)
    else:
        _, cluster = calibration_gpu.calibrate_gpu(
            path, quick=setup.sizes.quick, tiles=setup.measured
        )
    shipped = load_cluster(cluster.name)
    numbers = [
        {"figure": key, "unit": now.unit, "measured": now.value, "shipped": shipped[key]}
        for key, now in cluster.numbers.items()
        if now.source != shipped.numbers[key].source
    ]
    return numbers + [row for key in cluster.curves for row in _curve(key, cluster, shipped)]


def _rehearsed(setup: Setup) -> probes_gpu.Figures:
    heads, device = Heads("rehearsal", 4, 2, 64), setup.device
    spec = kernel_spec(device.target, heads, device.dtype, hidden=96, ffn=160)
    names = ("attention_prefill", "attention_decode", "rms_norm")
    modules = {name: setup.kernels.load(spec, name) for name in names}
    shape = Shape(spec.hidden, spec.ffn, heads.query, heads.kv, heads.dim, PAGE)

    def clock(calls: Sequence[Callable[[], object]]) -> float:
        return race(device, {"": calls[:2]}, 0.0)[""].median_s

    return Probes(modules, shape, TINY, device.place, device.dtype, clock).measure()


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
