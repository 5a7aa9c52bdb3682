"""Chat templates: the text that transformers makes of a conversation, and none that goes on for ever."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc import chat
from mnemoc.errors import BadInput
from mnemoc.runtime.server import Conversation
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = "" %}
    {%- set turns = messages %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if date is defined %}
    {{- "Today: " + date + "\\n" }}
{%- endif %}
{{- system + "<|turn|>" }}
{%- for turn in turns %}
    {{- '<|start|>' + turn['role'] + '<|end|>\\n\\n' + turn['content'] | trim + '<|turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
"""As Llama 3 does it: headers, trimmed contents, a system turn always."""

BRACKETS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' ~ message['content'] ~ '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
"""As Mistral does it: roles in turns or an error, the system's text in the last one of the user."""

TAGS = """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
    {% if enable_thinking is defined and enable_thinking is false %}
<think>

</think>
    {% endif %}
{% endif %}
"""
"""As ChatML and Qwen do it, with blocks on lines of their own."""

TRICKS = """\
{%- macro shout(text) %}{{ text | upper }}{% endmacro -%}
{%- set ns = namespace(count=0, last='') -%}
{%- for message in messages -%}
    {%- if message.role == 'developer' %}{% continue %}{% endif -%}
    {%- set ns.count = ns.count + 1 -%}
    {%- set ns.last = ns.last ~ message.role[:1] -%}
    {{- message | tojson }}{{ message.content.split('\\n')[-1] | tojson(indent=1) -}}
    {%- if ns.count > 3 %}{% break %}{% endif -%}
{%- else -%}nobody{%- endfor -%}
{{ shout(ns.last) }}{{ messages | map(attribute='role') | join(',') }} {{ strftime_now('%Y') }}
"""
"""What else templates use: macros, namespaces, loop controls, JSON, the date."""

TEMPLATES = {"headers": HEADERS, "brackets": BRACKETS, "tags": TAGS, "tricks": TRICKS}
CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=15) | st.sampled_from(
    ["{{ 1 }}", "{% raw %}", " <b>&amp; ", "two\nlines\n", "</s>"]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": CONTENT}
    ),
    min_size=1,
    max_size=6,
)


def theirs(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that has the template."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **SPECIAL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_reads_as_transformers_writes_it(name: str) -> None:
    reference, ours = (
        theirs(TEMPLATES[name]),
        chat.ChatTemplate(TEMPLATES[name], SPECIAL, Path(name)),
    )

    @settings(max_examples=60, deadline=None)
    @given(TURNS, st.booleans(), st.sampled_from([{}, {"enable_thinking": False}, {"date": "May"}]))
    def agree(turns: list[dict[str, str]], go_on: bool, more: dict[str, Any]) -> None:
        refusal, expected = None, ""
        try:
            expected = reference.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=go_on, **more
            )
        except Exception as error:
            refusal = str(error)
        if refusal is None:
            assert ours(Conversation(turns, go_on, more)) == expected
        else:
            with pytest.raises(BadInput, match=re.escape(refusal)):
                ours(Conversation(turns, go_on, more))

    agree()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "within"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion|within"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) }}", "range"),
        ("{{ messages[0].content * 10 ** 10 }}", "too large"),
        ("{{ messages * 10 ** 10 }}", "too large"),
        ("{{ (9 ** messages | length) ** 9999999 }}", "too large"),
        ("{% set n = namespace(t='ab') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
         "too large"),
        ("{% set n = namespace(t='ab') %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
         "too large"),
    ],
)  # fmt: skip
def test_what_would_take_for_ever_or_fill_the_memory_is_ended(
    source: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "RENDER_S", 0.2)
    monkeypatch.setattr(chat, "MOST_CHARACTERS", 2**20)
    template = chat.ChatTemplate(source, {}, Path("t"))
    began_s = time.monotonic()
    with pytest.raises(BadInput, match=f"the chat template says: .*({says})"):
        template(Conversation([{"role": "user", "content": "ab"}]))
    assert time.monotonic() - began_s < 30


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include 'tokenizer_config.json' %}",
        "{% import '/etc/passwd' as p %}",
        "{{ undefined.attribute }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(BadInput, match="the chat template says"):
        chat.ChatTemplate(source, {}, Path("t"))(Conversation([{"role": "user", "content": "x"}]))


def test_a_message_is_text_and_never_a_template() -> None:
    template = chat.ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}", {}, Path("t")
    )
    bait = "{{ 7 * 7 }}{% for x in y %}"
    assert template(Conversation([{"role": "user", "content": bait}])) == bait


def test_messages_are_not_what_a_client_calls_otherwise() -> None:
    template = chat.ChatTemplate(
        "{{ messages | length }}{{ bos_token }}{{ mood }}", SPECIAL, Path("t")
    )
    talk = Conversation([{"role": "user", "content": "x"}], more={"messages": [], "mood": "good"})
    assert template(talk) == "1<s>good"


def write(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


TALK = Conversation([{"role": "user", "content": "hi"}])


def test_a_template_is_found_where_models_have_it(tmp_path: Path) -> None:
    assert chat.load(tmp_path) is None
    token = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None}
    found: Callable[[], str] = lambda: (chat.load(tmp_path) or str)(TALK)  # noqa: E731
    write(tmp_path, chat_template="a{{ eos_token }}{{ bos_token }}", **token)
    assert found() == "a</s>"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, chat_template=named)
    assert found() == "d"
    write(tmp_path, chat_template=named[:1])
    assert chat.load(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("file{{ messages[0].content }}")
    assert found() == "filehi"
    other = tmp_path / "other.jinja"
    other.write_text("other")
    assert (chat.load(tmp_path, other) or str)(TALK) == "other"


def test_what_is_no_template_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer_config.json: not a chat template: .*"):
        chat.load(write(tmp_path, chat_template="{% for %}"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        chat.load(tmp_path)
    with pytest.raises(BadInput, match="cannot read"):
        chat.load(tmp_path / "nowhere", tmp_path / "missing.jinja")
