"""Renders the kernels of an artifact, specialised for one plan, from templates.

`render_kernels(spec)` is all there is: one `KernelSpec` decides every constant in every file. Both
targets have modules of the same names and signatures: torch kernels for `cpu`, Triton for `cuda:*`.
Choices of block shapes are the tables here, never in the templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from .templating import render

L2_BLOCK_BYTES = 768 * 1024
"""Bytes of one KV block that the CPU decode streams into a core's second-level cache (1 MiB here)."""

SHORT_BYTES = 128 * 1024
"""Bytes of keys, over all KV heads, up to which the fused CPU kernel wins: the loop costs more calls."""

_FILES = (
    "__init__",
    "attention_decode",
    "attention_prefill",
    "merge",
    "paging",
    "rms_norm",
    "rope_append",
    "rotary",
    "swiglu",
)


@dataclass(frozen=True)
class KernelSpec:
    """What the kernels of one rank are specialised for. Heads and ffn are per rank.

    target: "cpu" or "cuda:sm_90"; dtype: "float32", "bfloat16" or "float16", of activations and KV
    inv_freq: rotary frequencies [head_dim / 2], exact float32 values; attention_factor: scales cos and sin
    """

    target: str
    dtype: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    page_size: int
    norm_eps: float
    qk_norm: bool
    inv_freq: tuple[float, ...]
    attention_factor: float

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, "query heads come in groups"
        assert len(self.inv_freq) * 2 == self.head_dim, "one frequency for each pair"
        assert self.dtype == "float32" or self.target != "cpu", "the CPU kernels are float32"

    @property
    def group(self) -> int:
        """Query heads on each KV head."""
        return self.num_heads // self.num_kv_heads


def render_kernels(spec: KernelSpec) -> dict[str, str]:
    """The kernel modules by path in the artifact ("kernels/rms_norm.py", …)."""
    return {f"kernels/{name}.py": render(f"torch/{name}.py.j2", **_torch(spec)) for name in _FILES}


def _torch(spec: KernelSpec) -> dict[str, object]:
    token_bytes = spec.head_dim * 4
    return {
        **vars(spec),
        "title": f"{spec.num_heads} × {spec.head_dim} query heads, hidden size {spec.hidden}",
        "group": spec.group,
        "scale": spec.head_dim**-0.5,
        "block": L2_BLOCK_BYTES // token_bytes,
        "short": SHORT_BYTES // token_bytes // spec.num_kv_heads,
    }
