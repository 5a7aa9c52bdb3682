"""Types of the fields in clients' bodies, and which other fields are let pass.

Fields that would change the answer and are not served are refused by name, unless they hold a neutral
value; fields that are only remarks are let pass; unknown ones are refused, as OpenAI does. null counts as
not given. What is said here is said in the OpenAPI document too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..request import MOST_LOGPROBS

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "early_stopping": (False,),
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}
"""Without tools there is nothing for tool_choice, function_call and parallel_tool_calls to choose."""

REMARKS = frozenset(
    {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)

NOT_SERVED = "not_served"
"""The type of a validation error, whose context names the field."""

INT32 = 2**31
Small = Annotated[int, Field(ge=0, lt=INT32)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Stops = Annotated[list[str], Field(max_length=16)]

Ids = tuple[int, ...]
Prompt = str | Ids | list[str] | list[Ids]


def read_ids(value: Any) -> Ids:
    if isinstance(value, tuple):  # `bodies.parse` has looked at each
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise ValueError("token ids are a list of integers")


def read_prompt(value: Any) -> Prompt:
    """Not by pydantic: where it tries the four forms in turn, a long list is gone through four times."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and not isinstance(value[0], int):
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list | tuple) for item in value):
            return [read_ids(item) for item in value]
    elif isinstance(value, list | tuple):
        return read_ids(value)
    raise ValueError("a prompt is a text or a list of token ids; several are a list of either")


def read_bias_keys(value: Any) -> Any:
    """JSON has no integers as keys: "42" is one."""
    if not isinstance(value, dict):
        return value
    keys = [int(key) if _KEY.fullmatch(str(key)) else key for key in value]
    return dict(zip(keys, value.values(), strict=True))


_KEY = re.compile(r"[0-9]{1,9}")
_ID = {"type": "integer"}
_IDS = {"type": "array", "items": _ID}
_PROMPTS = [{"type": "array", "items": {"type": "string"}}, {"type": "array", "items": _IDS}]
_BIASES = {
    "type": "object",
    "propertyNames": {"pattern": f"^{_KEY.pattern}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}

TokenIds = Annotated[Ids, PlainValidator(read_ids), WithJsonSchema(_IDS)]
AnyPrompt = Annotated[
    Prompt,
    PlainValidator(read_prompt),
    WithJsonSchema({"anyOf": [{"type": "string"}, _IDS, *_PROMPTS]}),
]
Biases = Annotated[dict[int, Bias], BeforeValidator(read_bias_keys), WithJsonSchema(_BIASES)]


def describe(schema: dict[str, Any], model: type[Fields]) -> None:
    """Adds to a JSON schema what a class of bodies lets pass: null, neutral values, remarks."""
    properties = schema["properties"]
    for name in properties.keys() - set(schema.get("required", ())):
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    for name, values in model.neutral.items():
        properties.setdefault(name, {"enum": [*values, None]})
    for name in model.remarks:
        properties.setdefault(name, {})
    schema["additionalProperties"] = {"type": "null"}


class Fields(BaseModel):
    """A body, or a part of one: strict about types; null counts as not given.

    neutral: fields that are not served, and values that ask for nothing; remarks: fields that change nothing
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=describe)
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}
    remarks: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {key: value for key, value in data.items() if not cls._says_nothing(key, value)}
        for field in cls.neutral.keys() & kept.keys():
            only = " or ".join(map(json.dumps, cls.neutral[field]))
            known = {"field": field, "only": only}
            raise PydanticCustomError(NOT_SERVED, "not served, other than as {only}", known)
        return kept

    @classmethod
    def _says_nothing(cls, key: str, value: Any) -> bool:
        if value is None or key in cls.remarks:
            return True
        neutral = cls.neutral.get(key)  # compared as JSON, where 1 is not true
        return neutral is not None and json.dumps(value) in map(json.dumps, neutral)
