"""`mnemoc calibrate` of a GPU: a cluster file of nodes of such GPUs, with figures measured on it.

One GPU cannot tell how nodes are wired, what an iteration of the engine costs, or how much memory a library
keeps: those figures stay as the shipped file of such nodes has them, with the sources that they have there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration import Steps, rising, way_figures
from .errors import BadInput

if TYPE_CHECKING:
    from .calibration import Figure
    from .console import Progress
    from .planner import Cluster
    from .runtime.probes_gpu import Figures, Points

SHIPPED: Mapping[str, str] = {
    "H200": "dgx-h200",
    "H100": "dgx-h100",
    "B200": "dgx-b200",
    "A100": "dgx-a100",
}
"""Part of a GPU's name → the shipped cluster of such GPUs."""

PAGE = 64


def shipped_name(device: str) -> str:
    """The shipped cluster file that a GPU's figures complete. BadInput if there is none."""
    for part, name in SHIPPED.items():
        if part in device:
            return name
    raise BadInput(
        "no shipped cluster file has GPUs of this kind",
        got=device,
        do=f"write one by hand; there are files for {', '.join(SHIPPED)}",
    )


def calibrate_gpu(
    out: Path | None, progress: Progress | None = None, *, quick: bool = False
) -> tuple[Path, Cluster]:
    """Measure the first GPU with the kernels that plans of Llama 3 8B emit; write `out`, or the file that
    `--cluster local` reads. BadInput where there is no GPU, or none of a kind that we have a file of.

    quick: fewer sizes
    """
    import torch

    from .codegen.kernels import KernelSpec, render_kernels
    from .ir.model import load_model
    from .planner import measured_path
    from .runtime.loader import ArtifactModules
    from .runtime.probes_gpu import FULL, QUICK, Probes, Shape

    if not torch.cuda.is_available():
        raise BadInput(
            "no CUDA device is here", do="leave --gpu out, or give --cpu, to measure the CPU"
        )
    device = torch.device("cuda", 0)
    name = shipped_name(torch.cuda.get_device_name(device))
    major, minor = torch.cuda.get_device_capability(device)
    spec = load_model("llama-3-8b")
    kernels_of = KernelSpec(
        target=f"cuda:sm_{major}{minor}",
        dtype=spec.dtype,
        hidden=spec.hidden,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        merged_heads=spec.num_heads,
        head_dim=spec.head_dim,
        ffn=spec.ffn,
        page_size=PAGE,
        norm_eps=spec.norm_eps,
        qk_norm=spec.qk_norm,
        inv_freq=spec.rope.inv_freq(spec.head_dim),
        attention_factor=spec.rope.attention_factor,
    )
    contents = {path: text.encode() for path, text in render_kernels(kernels_of).items()}
    loader = ArtifactModules(Path("calibrate"), contents, ("kernels/",))
    modules = {
        module: loader.load(f"kernels.{module}")
        for module in ("attention_prefill", "attention_decode", "rms_norm")
    }
    shape = Shape(spec.hidden, spec.ffn, spec.num_heads, spec.num_kv_heads, spec.head_dim, PAGE)
    sizes = QUICK if quick else FULL
    dtype = getattr(torch, spec.dtype)
    say = Steps(progress)
    measured = Probes(modules, shape, sizes, device, dtype).measure(
        lambda share: say.at("measuring the GPU", share)
    )
    memory = torch.cuda.get_device_properties(device).total_memory
    path = out or measured_path()
    return path, write(path, name, torch.cuda.get_device_name(device), memory, measured)


def write(path: Path, name: str, device: str, memory_bytes: int, measured: Figures) -> Cluster:
    """The cluster file `name`, with what was measured in place of what was shipped."""
    from .planner import CALIBRATED, load_cluster, write_cluster

    peaks: dict[str, Figure] = {
        f"peak.{dtype}": (measured.peak_flops, "FLOP/s", CALIBRATED)
        for dtype in ("bfloat16", "float16")
    }
    curves: dict[str, tuple[Points, float, str]] = {
        "matmul": (measured.matmul, measured.peak_flops, "rows"),
        "attention_prefill": (measured.attention_prefill, measured.peak_flops, "rows"),
        "attention_decode": (measured.attention_decode, measured.bandwidth, "B"),
        "memory": (measured.memory, measured.bandwidth, "B"),
    }
    if measured.peak_fp8_flops is not None:
        peaks["peak.float8"] = (measured.peak_fp8_flops, "FLOP/s", CALIBRATED)
        curves["matmul_fp8"] = (measured.matmul_fp8, measured.peak_fp8_flops, "rows")
    figures: dict[str, Figure] = {
        **peaks,
        "memory.bandwidth": (measured.bandwidth, "B/s", CALIBRATED),
        "memory.capacity": (float(memory_bytes), "B", CALIBRATED),
        **{
            f"efficiency.{key}": (rising(points, best), unit, CALIBRATED)
            for key, (points, best, unit) in curves.items()
        },
        "overhead.launch": (measured.launch_s, "s", CALIBRATED),
        "overhead.launch_captured": (measured.gap_s, "s", CALIBRATED),
        **way_figures("host", measured.host, CALIBRATED),
    }
    target = load_cluster(name).target
    return write_cluster(path, name=name, device=device, target=target, figures=figures)
