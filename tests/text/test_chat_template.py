"""Templates give the text transformers gives, do not get out of their sandbox, and come to an end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pelton.errors import ConfigError, ModelFormatError, RequestError
from pelton.text.chat_template import ChatTemplate, load_chat_template
from pelton.text.messages import normalise_messages
from pelton.text.sandbox import MAX_SECONDS
from pelton.text.tokenizer import Tokenizer
from pelton.weights.files import ModelFiles

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|header|>system<|/header|>\\n\\n' }}
{%- if tools is not none and tools %}
    {{- 'Tools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system + '<|eot|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {%- set f = call.function %}
            {{- '<call>' ~ {'name': f.name, 'arguments': f.arguments} | tojson ~ '</call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}"""

TURNS = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start>' + role + '\\n' + message['content'] | trim + '<end>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}"""

INST = """{%- set ns = namespace(system='', last=messages[-1].content) %}
{%- for message in messages if message.role == 'system' %}{% set ns.system = message.content %}{% endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (ns.system + '\\n\\n' if loop.last and ns.system else '') + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {% generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- '%s: %s' % (message.role, message.content.split('\\n')[0] | upper) }}
    {%- endif %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
{%- endfor %}"""

TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "turns": TURNS, "inst": INST}

CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "ü<&>"]}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi"}],
    "blank": [{"role": "user", "content": ""}],
    "spaces": [{"role": "user", "content": "  Hi \n"}, {"role": "assistant", "content": " yes \n\n"}],
    "long": [{"role": ("user", "assistant")[i % 2], "content": f"message {i}"} for i in range(9)],
    "unicode": [{"role": "user", "content": "你好 👩‍👩‍👧 <b>&amp;</b> \"quoted\" {{ x }} {% y %}"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "tool": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "c", "tool_calls": [CALL]},
             {"role": "tool", "content": "42\n"}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ä", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def reference(transformers_tokenizer: Callable[[Path], Any], smollm2_path: Path) -> Any:
    return transformers_tokenizer(smollm2_path)


@pytest.mark.parametrize("name", ["own", *TEMPLATES])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_text_equals_transformers(
    name: str, conversation: str, reference: Any, smollm2: Tokenizer, smollm2_files: ModelFiles
) -> None:
    messages = CONVERSATIONS[conversation]
    own = load_chat_template(smollm2_files, smollm2)
    assert own is not None
    template = own if name == "own" else ChatTemplate(TEMPLATES[name], smollm2.named_tokens)
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": TOOLS},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        try:
            expected = reference.apply_chat_template(messages, chat_template=template.source, tokenize=False, **options)
        except Exception:  # what it refuses is refused here too
            with pytest.raises(RequestError):
                template.render(normalise_messages(messages), **options)
        else:
            assert template.render(normalise_messages(messages), **options) == expected


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(RequestError, match="System role not supported"):
        ChatTemplate(TURNS, {"bos_token": "<s>"}).render([{"role": "system", "content": "x"}])


def test_time_and_other_variables() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}{{ x }}{{ bos_token }}{{ missing }}{{ dict(a=1)['a'] }}", {})
    assert template.render([], x=5).endswith("51") and template.render([])[:2] == "20"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].nothing.more }}", "fails on these messages"),
        ("{{ 1 / 0 }}", "fails on these messages: division by zero"),
        ("{% include 'x' %}", "fails on these messages"),
        ("{{ messages | nothing }}", "wrong in line 1"),
        ("{% if %}", "wrong in line 1"),
        ("a\n\n{{ x", "wrong in line 3"),
    ],
)
def test_a_wrong_template_is_one_line(source: str, message: str) -> None:
    with pytest.raises((RequestError, ModelFormatError), match=message) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": ""}])
    assert "\n" not in str(caught.value)


# --- no way out (T-37) --------------------------------------------------------------------------------------------

UNDERSCORES = "['_'*2 ~ 'class' ~ '_'*2]"
ESCAPES = [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ ()['__class__'] }}",
    "{{ ''['__class__'] }}", "{{ ''|attr('__class__') }}", "{{ ''|attr('_'*2 ~ 'class' ~ '_'*2) }}",
    f"{{{{ ''{UNDERSCORES} }}}}", "{{ self.__init__.__globals__ }}", "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__ }}", "{{ lipsum.__globals__['os'].popen('id') }}", "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}", "{{ namespace.__init__.__globals__ }}", "{{ dict.__base__ }}",
    "{{ dict.mro() }}", "{{ range.__class__ }}", "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}", "{{ strftime_now.__closure__ }}", "{{ strftime_now.__code__ }}",
    "{{ messages.__class__ }}", "{{ messages[0].__class__.__init__ }}", "{{ messages.append.__self__.__class__ }}",
    "{{ '{0.__class__}'.format('') }}", "{{ '{0.__class__.__mro__}'.format(0) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}", "{{ ('{0.__cl' ~ 'ass__}').format('') }}",
    "{{ ''.format.__self__.__class__ }}", "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}", "{{ '{0.__class__}'|attr('format')('') }}",
    "{{ ''|map(attribute='__class__')|list }}", "{{ [1]|map(attribute='__class__')|list }}",
    "{{ [1]|groupby('__class__') }}", "{{ [1]|sort(attribute='__class__') }}", "{{ [1]|sum(attribute='__class__') }}",
    "{{ [1]|selectattr('__class__')|list|first|attr('__class__') }}", "{{ [1]|unique(attribute='__class__')|list }}",
    "{{ messages.append(1) }}", "{{ messages.clear() }}", "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}", "{% set x = messages[0].setdefault('y', 1) %}{{ x.__class__ }}",
    "{% import 'os' as os %}", "{% from 'os' import system %}", "{% extends '/etc/passwd' %}",
    "{% include '/etc/passwd' %}", "{{ open('/etc/passwd').read() }}", "{{ __import__('os') }}", "{{ eval('1') }}",
    "{{ config.items() }}", "{{ request.environ }}", "{{ get_flashed_messages.__globals__ }}",
    "{{ url_for.__globals__ }}", "{{ loop.__class__ }}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}", "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ (1).__class__.__base__.__subclasses__() }}", "{{ (messages|list).__reduce__() }}",
    "{{ ''.encode().__class__ }}",
    "{{ true.real.__class__ }}", "{{ none.__class__ }}", "{{ context.__class__ }}", "{{ environment.__class__ }}",
    "{{ self.environment }}", "{{ cycler('a').__dict__ }}", "{{ ''.join.__func__ }}", "{{ (x for x in [1]).gi_frame }}",
    "{{ [1]|batch(1)|attr('gi_frame') }}", "{{ ([1]|select).gi_frame.f_globals }}",
    "{{ ([1]|map('string')).gi_code }}", "{{ undefined_name.__init__.__globals__ }}",
]


def test_there_are_enough_escapes() -> None:
    assert len(set(ESCAPES)) == len(ESCAPES) >= 40


@pytest.mark.parametrize("source", ESCAPES)
def test_no_escape(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    modules = set(sys.modules)
    try:
        text = ChatTemplate(source, {}).render(messages, add_generation_prompt=False)
    except (RequestError, ModelFormatError) as error:
        text = str(error)
        assert "\n" not in text
    for leak in ("<class", "<built-in", "<function", "<module", "<frame", "<code", "root:", "uid=", "object at 0x"):
        assert leak not in text
    assert messages == [{"role": "user", "content": "x"}]
    assert not {"os", "subprocess"} & (set(sys.modules) - modules)


# --- no work without end (T-36) -----------------------------------------------------------------------------------

ENDLESS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "{% set s %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "{{ 'x' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 10**10**10 }}",
    "{{ 9**99999999 }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.center(10**10) }}",
    "{{ '1'.zfill(10**10) }}",
    "{{ '1'.zfill(9999999999) }}",
    "{{ 'x'.encode().ljust(9999999999) }}",
    "{{ (1).to_bytes(9999999999, 'big') }}",
    "{{ dict.fromkeys(range(99999))|length * 'x' * 99999 }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x\nx'|indent(10**10) }}",
    "{{ [1, 2]|tojson(indent=10**10) }}",
    "{{ [1]|batch(10**10, 0)|list }}",
    "{{ [1]|slice(10**10)|list }}",
    "{{ lipsum(n=10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**10) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).join('b' * 100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s ~ ns.s }}{% endset %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% set s = 'x' * 5000000 %}" + "{% set t = s|upper %}" * 2000,
    "{% set s = 'x' * 50000000 %}" + "{% set t = 'y' in s %}" * 2000,
    "{% set s = 'x' * 50000000 %}" + "{% set t = s[1:] %}" * 2000,
    "{% set s = 'x' * 50000000 %}" + "{% set t = s + 'y' %}" * 2000,
    "{% if true %}" * 5_500 + "{% endif %}" * 5_500,
    "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ 1" + "+1" * 60_000 + " }}",
    "{{ " + "not " * 30_000 + "x }}",
    "x" * 300_000,
]


@pytest.mark.parametrize("source", ENDLESS, ids=lambda source: source[:60])
def test_work_ends(source: str) -> None:
    start = time.thread_time()
    with pytest.raises((RequestError, ModelFormatError)) as caught:
        ChatTemplate(source, {}).render([])
    assert "\n" not in str(caught.value)
    assert time.thread_time() - start < MAX_SECONDS + 3


def test_large_conversations_are_within_the_limits() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 2000} for i in range(600)]
    for name in ("chatml", "turns"):
        assert len(ChatTemplate(TEMPLATES[name], {"bos_token": ""}).render(messages)) > 5_000_000


# --- where templates come from ------------------------------------------------------------------------------------


def test_templates_of_a_gguf_file(tiny: Tokenizer, files_of: Callable[..., ModelFiles]) -> None:
    metadata = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    template = load_chat_template(files_of(metadata), tiny)
    assert template is not None
    assert template.render([]) == "plain" and template.render([], tools=TOOLS) == "tools"
    assert load_chat_template(files_of({}), tiny) is None
    with pytest.raises(ModelFormatError, match=r"tokenizer\.chat_template must be text"):
        load_chat_template(files_of({"tokenizer.chat_template": 1}), tiny)


def test_templates_of_a_folder(tiny: Tokenizer, tmp_path: Path) -> None:
    files = ModelFiles(root=tmp_path, weights=(), format="safetensors", config={}, generation_config={})
    assert load_chat_template(files, tiny) is None

    def rendered(**options: Any) -> str:
        template = load_chat_template(files, tiny)
        assert template is not None
        return template.render([], **options)

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "config"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert (rendered(), rendered(tools=TOOLS)) == ("config", "tools")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}jinja")
    assert rendered() == "<|end|>jinja"


def test_override(tiny: Tokenizer, files_of: Callable[..., ModelFiles], tmp_path: Path) -> None:
    files = files_of({"tokenizer.chat_template": "plain"})
    (tmp_path / "t.jinja").write_text("file")
    for override, text in ((str(tmp_path / "t.jinja"), "file"), ("{{ 'string' }}", "string")):
        template = load_chat_template(files, tiny, override)
        assert template is not None and template.render([]) == text
    with pytest.raises(ConfigError, match="--chat-template nothing.jinja is neither"):
        load_chat_template(files, tiny, "nothing.jinja")
