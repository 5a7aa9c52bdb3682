"""What a model is: the figures of a dense decoder with grouped-query attention.

Read from a Hugging Face directory, a `config.json` or a shipped preset (presets/*.json, themselves
real config.json contents). Whatever would change what the model computes and is not supported is
refused by name: nothing is silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .rope import Rope, read_rope

__all__ = ["ARCHITECTURES", "ModelSpec", "Rope", "load_model", "presets", "read_config"]

ARCHITECTURES = {  # name → model_type, which older files have alone
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "bfloat16", "float16")

_PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder model: counts, sizes and constants, no weights.

    ffn: width of the SwiGLU; max_position: tokens it was trained for (a promise may go beyond);
    dtype: of the checkpoint; eos: every token that ends a text.
    """

    name: str
    architecture: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope: Rope
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_position: int
    dtype: str
    bos: int | None
    eos: tuple[int, ...]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face checkpoint: tensor name → shape, in the model's order."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        for layer in range(self.num_layers):
            for name, shape in self._layer().items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def _layer(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        widths = {"q": q, "k": kv, "v": kv}
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (self.hidden,)}
        for part, width in widths.items():
            shapes[f"self_attn.{part}_proj.weight"] = (width, self.hidden)
            if self.qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (width,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes | {
            "self_attn.o_proj.weight": (self.hidden, q),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.ffn, self.hidden),
            "mlp.up_proj.weight": (self.ffn, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.ffn),
        }


def presets() -> tuple[str, ...]:
    """Names of the shipped models."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


def load_model(name_or_path: str) -> ModelSpec:
    """A preset's name, a Hugging Face model directory, or a config.json.

    A preset's name wins over a folder of the same name: write ./NAME for the folder.
    """
    if name_or_path in presets():
        return _spec(read_config(name_or_path), name_or_path, name_or_path)
    path = _config_path(name_or_path)
    config = read_config(name_or_path)
    generation = path.with_name("generation_config.json")
    if generation.is_file():  # where it is there, it says which tokens end a text
        config = config | _only(_read_json(generation), "bos_token_id", "eos_token_id")
    return _spec(config, path.resolve().parent.name, str(path))


def read_config(name_or_path: str) -> dict[str, Any]:
    """The contents of the config.json of a preset, a model directory or that file, unchecked."""
    if name_or_path in presets():
        return _read_json(_PRESETS / f"{name_or_path}.json")
    return _read_json(_config_path(name_or_path))


def _config_path(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    raise BadInput(
        "no such model: neither a preset nor a folder with config.json",
        where=name_or_path,
        do=f"presets: {', '.join(presets())}",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read: {error.strerror}", where=path) from error
    except ValueError as error:
        raise BadInput(f"not valid JSON: {error}", where=path) from error
    if not isinstance(value, dict):
        raise BadInput("expected an object", where=path, got=value)
    return value


def _only(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if values.get(key) is not None}


def _spec(config: Mapping[str, Any], name: str, where: str) -> ModelSpec:
    architecture = _architecture(config, where)
    _refuse_what_is_not_supported(config, architecture, where)
    heads = _count(config, "num_attention_heads", where)
    hidden = _count(config, "hidden_size", where)
    spec = ModelSpec(
        name=name,
        architecture=architecture,
        num_layers=_count(config, "num_hidden_layers", where),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=_kv_heads(config, architecture, heads, where),
        head_dim=_head_dim(config, architecture, hidden, heads, where),
        ffn=_count(config, "intermediate_size", where),
        vocab=_count(config, "vocab_size", where),
        norm_eps=_norm_eps(config, where),
        rope=read_rope(config, where),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_embeddings=_flag(config, "tie_word_embeddings", where),
        max_position=_count(config, "max_position_embeddings", where),
        dtype=_dtype(config, where),
        bos=next(iter(_tokens(config, "bos_token_id", where)), None),
        eos=_tokens(config, "eos_token_id", where),
    )
    if spec.num_heads % spec.num_kv_heads:
        raise BadInput(
            f"{spec.num_heads} attention heads are not a multiple of {spec.num_kv_heads} KV heads",
            where=where,
        )
    if spec.head_dim % 2:
        raise BadInput("head_dim must be even for RoPE", where=where, got=spec.head_dim)
    return spec


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures")
    name: object = names[0] if isinstance(names, list) and names else None
    if name is None:
        by_type = {model_type: arch for arch, model_type in ARCHITECTURES.items()}
        model_type = config.get("model_type")
        name = by_type.get(model_type, model_type) if isinstance(model_type, str) else None
    if name is None:
        raise BadInput("key 'architectures' is missing", where=where, do="is it a model's config?")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise BadInput(
            f"architecture {name!r} is not supported",
            where=where,
            do=f"supported: {', '.join(ARCHITECTURES)}",
        )
    return name


def _refuse_what_is_not_supported(config: Mapping[str, Any], arch: str, where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BadInput(
            f"activation {activation!r} is not supported", where=where, do="supported: silu"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise BadInput(f"{key} is not supported", where=where, do="use a model without it")
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise BadInput(
            f"quantised checkpoints are not supported{f' ({method})' if method else ''}",
            where=where,
            do="use the original weights, if you like with --quantization fp8",
        )
    if _slides(config, arch):
        raise BadInput(
            "sliding-window attention is not supported",
            where=where,
            do="use a model with full attention, such as Mistral 7B v0.3",
        )


def _slides(config: Mapping[str, Any], arch: str) -> bool:
    """Whether any layer attends to a window only; the defaults are those of transformers."""
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        return True
    window = config.get("sliding_window", 4096)
    if arch == "MistralForCausalLM":
        return window is not None
    if arch == "LlamaForCausalLM" or not config.get("use_sliding_window"):
        return False
    first, layers = config.get("max_window_layers", 28), config.get("num_hidden_layers", 32)
    return window is not None and not (
        isinstance(first, int) and isinstance(layers, int) and first >= layers
    )


def _kv_heads(config: Mapping[str, Any], arch: str, heads: int, where: str) -> int:
    """Absent in Llama files older than grouped-query attention: one KV head per head."""
    absent = config.get("num_key_value_heads") is None
    if absent and (arch == "LlamaForCausalLM" or "num_key_value_heads" in config):
        return heads
    return _count(config, "num_key_value_heads", where)


def _head_dim(config: Mapping[str, Any], arch: str, hidden: int, heads: int, where: str) -> int:
    if config.get("head_dim") is not None:
        return _count(config, "head_dim", where)
    if arch == "Qwen3ForCausalLM":
        return 128
    if hidden % heads:
        raise BadInput(
            f"hidden_size {hidden} is not a multiple of {heads} attention heads", where=where
        )
    return hidden // heads


def _count(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if value is None:
        raise BadInput(f"key {key!r} is missing", where=where)
    if type(value) is not int or value <= 0:
        raise BadInput(f"{key} must be a positive whole number", where=where, got=value)
    return value


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise BadInput(f"{key} must be true or false", where=where, got=value)
    return value


def _norm_eps(config: Mapping[str, Any], where: str) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise BadInput("rms_norm_eps must be a small number", where=where, got=value)
    return float(value)


def _dtype(config: Mapping[str, Any], where: str) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    if value not in DTYPES:
        raise BadInput(
            f"dtype {value!r} is not supported", where=where, do=f"supported: {', '.join(DTYPES)}"
        )
    return str(value)


def _tokens(config: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = config.get(key)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in tokens):
        raise BadInput(f"{key} must be a token id or a list of them", where=where, got=value)
    return tuple(tokens)
