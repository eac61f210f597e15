"""Chat templates: what models expect of their host, and what a hostile one cannot do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from neaptide.engine import template as template_module
from neaptide.engine.prompt import load_model
from neaptide.engine.template import MAX_TEMPLATE_BYTES, ChatTemplate, load_template, read_json
from neaptide.errors import ModelError, RequestError

HELLO = [{"role": "user", "content": "<hi> 'é'"}]


def render(source: str, messages: Any = HELLO, **kwargs: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **kwargs)


def test_messages_special_tokens_and_the_generation_prompt_are_there() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert render(source) == "<s>[user]<hi> 'é'[assistant]"
    assert render(source, add_generation_prompt=False) == "<s>[user]<hi> 'é'"


def test_the_host_functions_of_hugging_face_are_there() -> None:
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<hi> \'é\'"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    when = ChatTemplate("{{ strftime_now('%Y') }}", now_s=lambda: 86_400.0 * 400)
    assert when.render(HELLO) == time.strftime("%Y", time.localtime(86_400.0 * 400))
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("{% generation %}a{{ 1 }}{% endgeneration %}b") == "a1b"
    assert render("{{ enable_thinking is defined and enable_thinking }}", enable_thinking=False) == "False"
    assert render("{{ tools is none }}") == "True"


def test_what_a_template_refuses_is_the_clients_error() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(RequestError):
        render("{{ messages[0].content.missing.deeper }}")
    with pytest.raises(RequestError):
        render("{{ 1 / 0 }}")
    with pytest.raises(RequestError):
        render("{{ messages + 1 }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ range(10 ** 9) | list }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'x' }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'x'['ljust'](10 ** 9) }}",
        "{{ ('x' | attr('ljust'))(10 ** 9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template_is_stopped(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(RequestError):
        render(source, messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_internals_show_nothing_and_arithmetic_works() -> None:
    assert render("{{ messages.__class__ }}{{ raise_exception.__globals__ }}") == ""
    assert render(
        "{{ 2 ** 10 }} {{ 3 * 4 }} {{ '-' * 3 }} {{ 7 % 4 }} {{ '%s!' % 'a' }} {{ 0.5 * 4 }}{{ '{}'.format(1) }}"
    ) == ("1024 12 --- 3 a! 2.01")


def test_a_template_cannot_write_without_end() -> None:
    line = "x" * 1000
    with pytest.raises(RequestError, match="exceeds"):
        render("{% for i in range(99999) %}" + line + "{% endfor %}")
    assert template_module.MAX_PROMPT_CHARS < 99999 * 1000


def test_a_broken_or_oversized_template_is_the_models_error() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if %}")
    with pytest.raises(ModelError, match="characters"):
        ChatTemplate("x" * (MAX_TEMPLATE_BYTES + 1))


def test_the_template_is_found_where_models_keep_it(tmp_path: Path) -> None:
    assert load_template(tmp_path, {}) is None
    named = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    config = {"bos_token": {"content": "<b>"}, "eos_token": None}
    for given, expected in [({"chat_template": "c{{ bos_token }}", **config}, "c<b>"), (named, "d")]:
        found = load_template(tmp_path, given)
        assert found is not None
        assert found.render(HELLO) == expected
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    found = load_template(tmp_path, named)
    assert found is not None
    assert found.render(HELLO) == "file"


def test_a_models_json_must_be_an_object(tmp_path: Path) -> None:
    assert read_json(tmp_path / "x.json") == {}
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_model_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        load_model("openvino", str(tmp_path))
    assert caught.value.fix
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model("openvino", str(tmp_path))
