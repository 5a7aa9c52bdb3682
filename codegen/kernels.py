"""Renders the kernels of an artifact, specialised for one plan, from templates.

`render_kernels(spec)` is all there is: one `KernelSpec` decides every constant in every file. Both
targets have modules of the same names and signatures: torch kernels for `cpu`, Triton for `cuda:*`.
Choices of block shapes are the tables here, never in the templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from .templating import render

STREAM_BYTES = 2 * 1024**2
"""Bytes of keys and values that the CPU decode draws into the caches before it attends to them."""

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
    token_bytes = 2 * spec.num_kv_heads * spec.head_dim * 4
    return {
        **vars(spec),
        "title": f"{spec.num_heads} × {spec.head_dim} query heads, hidden size {spec.hidden}",
        "group": spec.group,
        # With few queries on a key, the fused kernel reads memory well enough by itself.
        "stream": spec.group >= 4 or spec.group * spec.head_dim >= 128,
        "block": STREAM_BYTES // token_bytes,
    }
