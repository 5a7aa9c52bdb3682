"""Model specs: presets, Hugging Face files, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mnemoc.codec import from_json, to_json
from mnemoc.errors import BadInput
from mnemoc.ir.model import ARCHITECTURES, ModelSpec, load_model, presets, read_config
from transformers import AutoConfig, AutoModelForCausalLM

BILLIONS = {  # as their makers state them
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "mistral-7b": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.76,
    "tiny-llama": 0.0032,
}


def config(**changes: Any) -> dict[str, Any]:
    values = read_config("tiny-llama") | changes
    return {key: value for key, value in values.items() if value != "absent"}


def load(directory: Path, **changes: Any) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    return load_model(str(directory))


def test_every_promised_preset_is_shipped() -> None:
    assert set(presets()) == set(BILLIONS)


@pytest.mark.parametrize("name", BILLIONS)
def test_presets_have_the_parameters_that_their_makers_state(name: str) -> None:
    parameters = sum(math.prod(shape) for shape in load_model(name).tensors().values())
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.012)


@pytest.mark.parametrize("name", BILLIONS)
def test_tensor_names_and_shapes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(read_config(name)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert load_model(name).tensors() == theirs


@pytest.mark.parametrize("name", BILLIONS)
def test_a_spec_survives_json(name: str) -> None:
    spec = load_model(name)
    assert from_json(ModelSpec, json.loads(json.dumps(to_json(spec))), "manifest") == spec


def test_a_file_a_folder_and_a_preset_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    spec = load(folder)
    assert spec == load_model(str(folder / "config.json")) == load_model("tiny-llama")


def test_files_that_transformers_writes_are_read(tmp_path: Path) -> None:
    for name in presets():
        source = tmp_path / name
        source.mkdir()
        (source / "config.json").write_text(json.dumps(read_config(name)))
        target = tmp_path / "saved" / name
        AutoConfig.from_pretrained(source).save_pretrained(target)
        assert load_model(str(target)) == load_model(name)


def test_tied_embeddings_have_no_head_of_their_own(tmp_path: Path) -> None:
    spec = load(tmp_path, tie_word_embeddings=True)
    assert spec.tied_embeddings
    assert "lm_head.weight" not in spec.tensors()


def test_old_llama_files_have_one_kv_head_per_head(tmp_path: Path) -> None:
    assert load(tmp_path, num_key_value_heads="absent").num_kv_heads == 8


def test_an_absent_head_dim_is_the_hidden_size_per_head(tmp_path: Path) -> None:
    assert load(tmp_path, head_dim="absent").head_dim == 32


def test_the_older_file_without_architectures_is_read_by_its_type(tmp_path: Path) -> None:
    assert load(tmp_path, architectures="absent").architecture == "LlamaForCausalLM"


def test_the_generation_config_says_which_tokens_end_a_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "top_p": 1.0}')
    spec = load(tmp_path)
    assert spec.eos == (7, 9)
    assert spec.bos == 256


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", 7])
def test_other_architectures_are_refused_by_name_with_those_supported(
    name: object, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as error:
        load(tmp_path, architectures=[name])
    assert repr(name) in str(error.value)
    assert all(supported in str(error.value) for supported in ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding-window"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding-window"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 4096,
                "max_window_layers": 2,
            },
            "sliding-window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"architectures": "absent", "model_type": "absent"}, "key 'architectures' is missing"),
        ({"hidden_size": "absent"}, "key 'hidden_size' is missing"),
        ({"hidden_size": "256"}, "hidden_size must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number"),
        ({"vocab_size": True}, "vocab_size must be a positive whole number"),
        ({"num_key_value_heads": 3}, "8 attention heads are not a multiple of 3 KV heads"),
        ({"head_dim": 33}, "head_dim must be even"),
        ({"head_dim": "absent", "hidden_size": 250}, "hidden_size 250 is not a multiple of 8"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a small number"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_is_unsupported_or_malformed_is_refused_in_a_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as error:
        load(tmp_path, **changes)
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_window_that_no_layer_uses_is_no_window(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        architectures=["Qwen2ForCausalLM"],
        use_sliding_window=True,
        sliding_window=4096,
        max_window_layers=4,
    )
    assert spec.qkv_bias


@pytest.mark.parametrize("text", ["", "{", "[]", '"model"', "{'a': 1}"])
def test_a_malformed_file_is_bad_input(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        load_model(str(path))


def test_a_file_that_is_not_text_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadInput, match="not valid JSON"):
        load_model(str(path))


def test_a_missing_model_is_bad_input_with_the_presets(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="presets: llama-3-70b"):
        load_model(str(tmp_path / "nowhere"))
