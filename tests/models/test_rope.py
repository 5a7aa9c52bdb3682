"""RoPE tables against transformers' own functions, float32 rounding included."""

import math
from typing import Any

import pytest
import torch
from mnemoc.errors import BadInput
from mnemoc.ir.rope import Rope, read_rope
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-with-everything": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-with-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 1.25,
    },
}


def theirs(head_dim: int, theta: float, scaling: dict[str, Any]) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    if scaling["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    table, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    return table, factor


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name: str, head_dim: int, theta: float) -> None:
    scaling = SCALINGS[name]
    table, factor = theirs(head_dim, theta, scaling)
    config = {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": 131072}
    rope = read_rope(config, "config.json")
    ours = torch.tensor(rope.inv_freq(head_dim), dtype=torch.float32)
    assert rope.attention_factor == factor
    assert ours.tolist() == list(rope.inv_freq(head_dim)), "each value is a float32"
    # torch's float32 power misses the nearest value by one unit now and then: no more than that
    torch.testing.assert_close(ours, table, rtol=2.0**-22, atol=0)
    assert int((ours != table).sum()) <= 1 + head_dim // 128


def test_the_llama_3_table_is_exactly_that_of_transformers() -> None:
    table, _ = theirs(128, 5e5, SCALINGS["llama3"])
    rope = read_rope({"rope_theta": 5e5, "rope_scaling": SCALINGS["llama3"]}, "config.json")
    assert table.tolist() == list(rope.inv_freq(128))


def test_the_newer_form_of_the_config_reads_the_same() -> None:
    for scaling in SCALINGS.values():
        old = {"rope_theta": 1e6, "rope_scaling": scaling, "max_position_embeddings": 131072}
        new = {
            "rope_parameters": {**scaling, "rope_theta": 1e6},
            "max_position_embeddings": 131072,
        }
        assert read_rope(old, "old") == read_rope(new, "new")


def test_the_oldest_form_names_the_kind_type() -> None:
    rope = read_rope({"rope_scaling": {"type": "linear", "factor": 2}}, "config.json")
    assert rope == Rope(10_000.0, "linear", factor=2.0)


def test_a_missing_original_length_is_the_trained_one() -> None:
    config = {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 4096}
    assert read_rope(config, "config.json").original_max_position == 4096


def test_a_missing_yarn_factor_is_the_ratio_of_lengths() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
    rope = read_rope({"rope_scaling": scaling, "max_position_embeddings": 32768}, "config.json")
    assert rope.factor == 8.0
    assert rope.attention_factor == 0.1 * math.log(8.0) + 1.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", ["yarn"], None])
def test_other_scalings_are_refused_by_name(kind: object) -> None:
    with pytest.raises(BadInput, match="is not supported") as error:
        read_rope({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, "config.json")
    assert repr(kind) in str(error.value)
    assert "default, linear, llama3, yarn" in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": "big"},
        {"rope_theta": -1},
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": True}},
        {"rope_scaling": {**SCALINGS["llama3"], "high_freq_factor": 0.5}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_malformed_rope_is_bad_input(config: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"^config\.json"):
        read_rope(config, "config.json")
