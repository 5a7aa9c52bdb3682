"""Random-weight models: what mnemoc init-model writes is a model to transformers too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.errors import BadInput
from mnemoc.ir.model import ARCHITECTURES, load_model, read_config
from mnemoc.runtime.init_model import Blueprint, byte_tokenizer, init_model, random_tensor, shards
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

MIB = 2**20


def blueprint(name: str = "tiny-llama", **changes: Any) -> Blueprint:
    spec = replace(load_model(name), **changes)
    return Blueprint(read_config(name), spec.tensors(), spec.dtype, spec.vocab, spec.bos, spec.eos)


TINY = blueprint()
TOKENIZER = byte_tokenizer(TINY)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    init_model(TINY, directory, seed=0, max_shard_bytes=4 * MIB)
    return directory


def test_transformers_loads_it_with_every_weight(model_dir: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(model_dir, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    name = "model.layers.3.mlp.down_proj.weight"
    expected = random_tensor(TINY, name, seed=0)
    assert torch.equal(model.state_dict()[name], expected)


def test_logits_are_well_behaved_and_greedy_tokens_vary(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.randint(0, 256, (1, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert 0.5 < float(logits.std()) < 2.0
    assert len(set(logits.argmax(-1).tolist())) > 64
    top_two = logits.topk(2).values
    assert float((top_two[:, 0] - top_two[:, 1]).median()) > 0.05


def test_greedy_answers_keep_moving(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([list(b"Once upon a time, and a very long time it was, " * 20)])
    answer = model.generate(
        ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert len(set(answer[0, ids.shape[1] :].tolist())) > 16


def test_a_token_far_back_matters(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.randint(0, 256, (1, 1024), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 5:69] = (ids[0, 5:69] + 1) % 256
    with torch.no_grad():
        difference = model(ids).logits[0, -1] - model(other).logits[0, -1]
    assert float(difference.abs().max()) > 1e-2


def test_the_tokenizer_is_one_for_transformers_too(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer("Hi").input_ids == [72, 105]
    assert tokenizer.eos_token_id == 257
    assert len(tokenizer) == 512


@given(st.text())
def test_any_text_comes_back_as_it_was(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    if not any(token in text for token in ("<|begin_of_text|>", "<|end_of_text|>")):
        assert ids == list(text.encode())
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["mistral-7b", "qwen2.5-7b", "llama-3-8b"])
def test_special_tokens_keep_the_ids_of_the_model(name: str) -> None:
    plan = blueprint(name)
    tokenizer = byte_tokenizer(plan)
    assert tokenizer.get_vocab_size() == plan.vocab
    assert tokenizer.token_to_id("<|end_of_text|>") == plan.eos[0]
    ids = tokenizer.encode("naïve 東京").ids
    assert not {plan.bos, *plan.eos} & set(ids)
    assert tokenizer.decode(ids) == "naïve 東京"


def test_the_index_names_each_tensor_once_and_shards_keep_to_their_size(model_dir: Path) -> None:
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == TINY.tensors.keys()
    files = sorted(model_dir.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(file.stat().st_size < 4 * MIB + 8192 for file in files)
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(file).values()
    )


def test_values_depend_on_the_seed_and_not_on_the_shards(model_dir: Path, tmp_path: Path) -> None:
    def weights(directory: Path) -> dict[str, torch.Tensor]:
        return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}

    init_model(TINY, tmp_path / "same", seed=0, max_shard_bytes=64 * MIB)
    init_model(TINY, tmp_path / "other", seed=1, max_shard_bytes=64 * MIB)
    first, same, other = map(weights, (model_dir, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in TINY.tensors)
    assert not any(torch.equal(first[name], other[name]) for name in TINY.tensors)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    cut = shards(TINY, max_shard_bytes=1000)
    assert [name for names in cut for name in names] == list(TINY.tensors)
    assert all(len(names) == 1 for names in cut)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_and_type_loads(architecture: str, tmp_path: Path) -> None:
    config = read_config("tiny-llama") | {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "sliding_window": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_model(str(tmp_path))
    plan = Blueprint(config, spec.tensors(), spec.dtype, spec.vocab, spec.bos, spec.eos)
    init_model(plan, tmp_path / "model", seed=3, max_shard_bytes=64 * MIB)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert model.dtype == torch.bfloat16
    assert load_model(str(tmp_path / "model")).tensors() == spec.tensors()


def test_progress_ends_at_one(tmp_path: Path) -> None:
    seen: list[float] = []
    init_model(
        TINY,
        tmp_path / "model",
        seed=0,
        max_shard_bytes=MIB,
        progress=lambda _what, fraction: seen.append(fraction),
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("dear")
    with pytest.raises(BadInput, match="exists and is not empty"):
        init_model(TINY, tmp_path / "model", seed=0, max_shard_bytes=MIB)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "dear"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    init_model(TINY, tmp_path / "model", seed=0, max_shard_bytes=64 * MIB)
    assert Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).get_vocab_size() == 512


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(_what: str, fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        init_model(TINY, tmp_path / "m", seed=0, max_shard_bytes=MIB, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_too_small_for_bytes_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a vocabulary of 200 has no room"):
        init_model(blueprint(vocab=200), tmp_path / "m", seed=0, max_shard_bytes=MIB)
    assert not list(tmp_path.iterdir())
