"""Random-weight models in Hugging Face form, so that demo and tests load what real users load.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json
    model.safetensors.index.json  model-00001-of-0000N.safetensors ...

Scales are chosen so that a random model behaves like a trained one where exactness is at stake:
logits have a deviation of about 1, and attention looks at few tokens (scores deviate by about 2),
so that losing any shard, page or token shows in the logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..whole import whole_folder

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

Progress = Callable[[str, float], None]  # what is being done, and the fraction that is done

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor -%}
{% if add_generation_prompt %}assistant:{% endif %}"""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Blueprint:
    """What to write: the config as it stands, and what follows from it.

    tensors: checkpoint tensor name → shape; specials: ids of the tokens that begin and end a text.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    dtype: str
    vocab: int
    bos: int | None
    eos: tuple[int, ...]


def init_model(
    blueprint: Blueprint,
    directory: Path,
    *,
    seed: int,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Write the model, whole or not at all.

    A tensor's values depend on the seed and its name only, not on how the file is cut in shards.
    At most one shard is in memory. BadInput: the folder exists and is not empty, or the vocabulary
    has no room for 256 bytes and the special tokens.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BadInput("exists and is not empty", where=directory, do="choose another folder")
    small_files = {
        "config.json": _json(blueprint.config),
        "generation_config.json": _json(_generation_config(blueprint)),
        "tokenizer.json": byte_tokenizer(blueprint).to_str(),
        "tokenizer_config.json": _json(_tokenizer_config(blueprint)),
    }
    with whole_folder(directory) as aside:
        for name, text in small_files.items():
            (aside / name).write_text(text, encoding="utf-8")
        _write_weights(blueprint, aside, seed, max_shard_bytes, progress)


def shards(blueprint: Blueprint, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names per shard, in order, each shard as full as the limit allows."""
    result: list[list[str]] = []
    room = 0
    for name, shape in blueprint.tensors.items():
        size = prod(shape) * _ITEM_BYTES[blueprint.dtype]
        if not result or size > room:
            result.append([])
            room = max_shard_bytes
        result[-1].append(name)
        room -= size
    return result


def _write_weights(
    blueprint: Blueprint,
    directory: Path,
    seed: int,
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    from safetensors.torch import save_file

    plan = shards(blueprint, max_shard_bytes)
    total = sum(prod(shape) for shape in blueprint.tensors.values())
    done = 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = random_tensor(blueprint, name, seed)
            done += tensors[name].numel()
            weight_map[name] = file
            if progress is not None:
                progress(f"writing {file}", done / total)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    size = total * _ITEM_BYTES[blueprint.dtype]
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(_json(index), encoding="utf-8")


def random_tensor(blueprint: Blueprint, name: str, seed: int) -> torch.Tensor:
    """The values of one tensor: Gaussian, with a mean and a deviation that its role decides."""
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    mean, std = _distribution(blueprint, name)
    tensor = torch.empty(blueprint.tensors[name], dtype=getattr(torch, blueprint.dtype))
    return tensor.normal_(mean, std, generator=generator)


def _distribution(blueprint: Blueprint, name: str) -> tuple[float, float]:
    """(mean, deviation): 1/√fan_in keeps the variance; q and k sharpen attention by 1.5 each.

    An embedding of deviation 1 keeps greedy answers moving; one that is the head too must be small,
    or each token would only repeat itself.
    """
    sharp = 1.5 if any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")) else 1.0
    if name.endswith("norm.weight"):
        return sharp, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if name == "model.embed_tokens.weight" and "lm_head.weight" in blueprint.tensors:
        return 0.0, 1.0
    return 0.0, sharp / blueprint.tensors[name][1] ** 0.5


# ------------------------------------------------------------------------------------ the tokenizer


def byte_tokenizer(blueprint: Blueprint) -> Tokenizer:
    """A byte-level vocabulary of the model's size: any text comes back as it was.

    The 256 bytes take the first ids that are not special; what is left is reserved and never made
    by encoding.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = _specials(blueprint)
    free = [i for i in range(blueprint.vocab) if i not in specials]
    if len(free) < 256 or any(i >= blueprint.vocab for i in specials):
        raise BadInput(
            f"a vocabulary of {blueprint.vocab} has no room for 256 bytes and the special tokens",
            where="vocab_size",
        )
    vocab = {character: free[byte] for byte, character in enumerate(_byte_characters())}
    vocab |= {f"<|{i}|>": i for i in free[256:]}
    vocab |= {text: i for i, text in specials.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in specials.values()]
    )
    return tokenizer


def _specials(blueprint: Blueprint) -> dict[int, str]:
    names = {i: f"<|end_of_text_{i}|>" for i in blueprint.eos[1:]}
    if blueprint.bos is not None:
        names[blueprint.bos] = "<|begin_of_text|>"
    if blueprint.eos:
        names[blueprint.eos[0]] = "<|end_of_text|>"
    return names


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (as in GPT-2):
    itself where it is printable and not blank, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _tokenizer_config(blueprint: Blueprint) -> dict[str, Any]:
    specials = _specials(blueprint)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if blueprint.bos is not None:
        config["bos_token"] = specials[blueprint.bos]
    if blueprint.eos:
        config["eos_token"] = specials[blueprint.eos[0]]
    return config | {"clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}


def _generation_config(blueprint: Blueprint) -> dict[str, Any]:
    eos = list(blueprint.eos) if len(blueprint.eos) > 1 else next(iter(blueprint.eos), None)
    return {"bos_token_id": blueprint.bos, "eos_token_id": eos}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
