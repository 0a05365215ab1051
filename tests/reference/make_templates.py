#!/usr/bin/env python3
"""tests/fixtures/templates.json: chat templates rendered by Transformers' apply_chat_template.

    python make_templates.py        (needs transformers; run in this folder)

The built-in templates of src/data/templates, and small ones that each use what real templates use.
Every template renders every conversation; where Transformers fails, so must we.
Left out: the `%` operator on texts, which our Jinja refuses (the `format` filter and method do the same), and
`title()` on texts with punctuation, where Python begins a word after any sign and our Jinja after blanks.
"""
import json
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parents[2]
SYSTEM = {"role": "system", "content": "You are terse."}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "exact": True, "at": None, "t": 0.25}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city: \"now\" & <later>",
          "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}}, "required": ["city"]}}}]
CHATS = {
    "one": [{"role": "user", "content": "Hi"}],
    "answered": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How can I help?"}],
    "system": [SYSTEM, {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red"},
               {"role": "user", "content": "Another\none?"}, {"role": "assistant", "content": "  Blue \n"}],
    "odd": [{"role": "user", "content": "  spaces\t "}, {"role": "assistant", "content": ""}, {"role": "user", "content": "é🙂 <|im_end|> {{ x }} {% y %}"}],
    "thinking": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning_content": "easy\n", "content": "4"},
                 {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n6"}],
    "tools": [{"role": "user", "content": "Weather in Zürich?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
              {"role": "tool", "name": "get_weather", "content": "{\"temp\": 21.5}"}, {"role": "tool", "content": "sunny"},
              {"role": "assistant", "content": "21.5 °C and sunny."}, {"role": "user", "content": "Thanks"}],
}
LOOP = "{% for message in messages %}"
OWN = {
    "whitespace": """
{# a comment #}
{% for message in messages %}
    {% if message.role == 'user' %}
        [USER] {{ message.content }}
    {%- elif message['role'] == 'assistant' -%}
        [BOT]   {{- message.content -}}
    {% else %}
  {{ message.role }}:{{ message.content }}   
    {% endif %}
    {#- another -#}
{% endfor %}
  tail
{%+ if add_generation_prompt %}
>>{%- endif %}

""",
    "namespace": "{% set ns = namespace(system='', turns=0, last_user=-1) %}{% for message in messages[::-1] %}"
        "{% set i = (messages | length - 1) - loop.index0 %}{% if ns.last_user < 0 and message.role == 'user' %}{% set ns.last_user = i %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% continue %}{% endif %}"
        "{% set ns.turns = ns.turns + 1 %}{% if ns.turns > 4 %}{% break %}{% endif %}"
        "{{ ns.turns }}/{{ loop.index }}/{{ loop.revindex0 }}{{ '*' if loop.index0 == ns.last_user }}{{ ' first' if loop.first }}{{ ' last' if loop.last else '' }}"
        " {{ loop.previtem.role if loop.previtem is defined else '-' }} {{ loop.nextitem.role if loop.nextitem is defined }};{% endfor %}<{{ ns.system }}>",
    "strings": LOOP + "{% set c = message.content %}{{ c.strip() }}|{{ c.lstrip() }}|{{ c.rstrip('\\n ') }}|{{ c.split(' ')[0] }}|{{ c.split() | length }}|"
        "{{ c.startswith('H') }}|{{ c.endswith('?') }}|{{ c.replace('o', '0') }}|{{ c.upper() }}|{{ c[:3] }}|{{ c[-3:] }}|{{ c[::-1] if c }}|"
        "{{ c | trim }}|{{ c | length }}|{{ 'a' in c }}|{{ c.find('o') }}|{{ c.count('e') }}|{{ '=' * 3 }}|{{ 'x' ~ 1 ~ none ~ true ~ 1.0 }}|"
        "{{ c.split('</think>')[-1].lstrip('\\n') }}|{{ c.rsplit(' ', 1)[0] }}|{{ c.rsplit() | length }}|{{ c.rsplit(none, 1)[-1] }}|{{ c.removeprefix('H') }}|{{ c.removesuffix('?') }}|{{ c.partition(' ')[2] }}|"
        "{{ c.isdigit() }}|{{ c.lower().capitalize() }}|{{ ', '.join(['a', 'b']) }}|{{ '{} and {x}'.format(1, x='y') }}|{{ c.splitlines() | length }}{% endfor %}",
    "json": "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{{ tool | tojson(indent=4) }}\n{{ tool.function.parameters | tojson(sort_keys=true, separators=(',', ':')) }}{% endfor %}{% endif %}"
        + LOOP + "{{ message | tojson }}{{ message.content | tojson(ensure_ascii=true) }}{% for call in message.tool_calls %}{{ call.function.arguments | tojson(indent=2) }}{% endfor %}{% endfor %}",
    "python values": LOOP + "{% for call in message.tool_calls %}{% set call = call.function %}{% for k, v in call.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
        "{% for k, v in call.arguments | items %}{{ loop.index }}{{ k }}{% endfor %}{% for k in call.arguments %}{{ k }},{% endfor %}{{ call.arguments.keys() | list | length }}"
        "{{ call.arguments }}{{ [1, 'a\\'b', \"c\", none, true, 2.50] }}{{ call.arguments.get('city') }}{{ call.arguments.get('none', 'default') }}{{ 'city' in call.arguments }}"
        "{{ call.arguments | string }}{{ (call.arguments | dictsort)[0][0] }}{% endfor %}{% endfor %}"
        "{{ none }} {{ true }} {{ undefined_variable }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1e3 }} {{ 1.5e-7 }} {{ 0.1 + 0.2 }} {{ [1.5e-7, 1e22, 12345.0] | tojson }} {{ 3 | float }} {{ '12' | int + 1 }} {{ 1 == 1.0 }} {{ [1, 2] + [3] }} {{ (1, 2) }} {{ {'a': 1} }}",
    "tests": LOOP + "{{ message.content is string }}{{ message.content is iterable }}{{ message.content is sequence }}{{ message is mapping }}{{ message.tool_calls is defined }}"
        "{{ message.x is none }}{{ message.x is undefined }}{{ message.content is not none }}{{ loop.index is odd }}{{ loop.index is divisibleby 2 }}{{ message is sequence }}"
        "{{ 1 is number }}{{ true is boolean }}{{ 1 is integer }}{{ 1.5 is float }}{{ message.tool_calls is sequence }}{{ message.tool_calls is iterable }}{{ tools is none }}"
        "{{ message.role is in ['user', 'tool'] }}{{ message.role is eq 'user' }}{{ 'a' is lower }}{{ message['content'] is true }}{{ none is none }}{% endfor %}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | join(', ') }}"
        "{{ messages | map(attribute='role') | unique | list }}{{ messages | first }}{{ (messages | last).role }}{{ [3, 1, 2] | sort | join }}{{ [1, 2] | sum }}{{ [4, 9] | max }}"
        "{{ x | default('d') }}{{ '' | default('e', true) }}{{ 'a b' | title }}{{ 'abc' | capitalize }}{{ 'abc' | upper | lower }}{{ 'a,b'.split(',') | map('upper') | list }}"
        "{{ 'line\\nline' | indent(2) }}{{ 'line\\nline' | indent(width=2, first=true) }}{{ [1, 2, 3, 4, 5] | batch(2) | list }}{{ 'x' | replace('x', 'y') }}{{ messages | selectattr('tool_calls', 'defined') | list | length }}"
        "{{ messages | selectattr('content') | list | length }}{{ 3.14159 | round(2) }}{{ [1, [2]] | string }}{{ 'abc' | list }}{{ 'abc' | reverse }}{{ {'b': 1, 'a': 2} | dictsort }}{{ 'a' | e }}{{ '%s!' | format('hi') }}",
    "macros": "{% macro turn(m, open='<', close='>') %}{{ open }}{{ m.role }}{{ close }}{{ caller() if caller else '' }}{% endmacro %}"
        "{% macro schema(value, depth=0) -%}{% if value is mapping %}{{ '{' }}{% for k, v in value.items() %}{{ k }}:{{ schema(v, depth + 1) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}"
        "{% elif value is string %}{{ value }}{% elif value is iterable %}[{% for v in value %}{{ schema(v, depth + 1) }}{% endfor %}]{% else %}{{ depth }}{{ value }}{% endif %}{%- endmacro %}"
        + LOOP + "{{ turn(message) }}{{ turn(message, close=']') }}{% call turn(message) %} inside {{ message.content }}{% endcall %}{% endfor %}{% if tools %}{{ schema(tools) }}{% endif %}"
        "{% set block %}in a {{ 'block' }}{% endset %}{{ block }}{{ block | length }}{% filter upper %}filtered{% endfilter %}{% set a, b = (1, 2) %}{{ b }}{% set d = dict(a=1) %}{{ d.a }}",
    "generation": LOOP + "{%- if message.role == 'assistant' -%}{{ '<a>' }}{% generation %}{{ message.content + '</a>' }}{% endgeneration %}{{ '\n' }}\n"
        "{%- else -%}<u>{{ message.content }}</u>\n  {%- generation -%}  \n x {% endgeneration -%}  {% endif %}{% endfor %}",
    "raise": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
        + "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{{ message.role }}{% endfor %}{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    "reasoning": LOOP + "{% if message.role == 'assistant' %}{% set content = message.content %}{% set reasoning = '' %}{% if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}"
        "{% elif '</think>' in content %}{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.last or (not loop.last and reasoning) %}{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}{% else %}{{ content }}{% endif %}{{ message.thinking }}"
        "{% else %}{{ message.role }}: {{ message.content }}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% if enable_thinking is defined and enable_thinking is false %}no{% endif %}{% endif %}",
}


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tests/fixtures/tiny/llama/tokenizer.json"),
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    templates = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT / "src/data/templates").glob("*.jinja"))}
    out = []
    for name, source in {**templates, **OWN}.items():
        cases = []
        for chat, messages in CHATS.items():
            for prompt, tools in ((False, None), (True, TOOLS if chat == "tools" else None)):
                case = {"chat": chat, "add_generation_prompt": prompt, "tools": tools is not None}
                try:
                    case["text"] = tokenizer.apply_chat_template(messages, chat_template=source, tools=tools, tokenize=False, add_generation_prompt=prompt)
                except Exception as error:
                    case["error"] = str(error)
                cases.append(case)
        out.append({"name": name, "source": None if name in templates else source, "cases": cases})
    text = json.dumps({"transformers": transformers.__version__, "tools": TOOLS, "chats": CHATS, "templates": out}, ensure_ascii=False, indent=1)
    (ROOT / "tests/fixtures/templates.json").write_text(text + "\n", encoding="utf-8")
    for t in out:
        print(t["name"], sum("text" in c for c in t["cases"]), "rendered,", [c["error"] for c in t["cases"] if "error" in c][:1])


main()
