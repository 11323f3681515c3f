"""Chat templates, one a feature of the library or a turn that published ones take; conversations.

All are written for these tests.
"""

from __future__ import annotations

from typing import Any

TEMPLATES: dict[str, str] = {
    # what is set and what is not
    "contents": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "roles": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m.role }}"
    ">{% endfor %}",
    "tools-none": "{% if tools is none %}none{% endif %}{% if tools is defined %}"
    "defined{% endif %}",
    "tools-not-none": "{% if tools is not none %}TOOLS{% endif %}{{ messages | length }}",
    "tools-true": "{% if tools %}{{ tools | tojson }}{% else %}no tools{% endif %}",
    "tools-in-turn": "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}",
    "tools-indented": "{{ tools | tojson(indent=4) }}",
    "documents": "{% if documents %}{% for d in documents %}{{ d.title }}:{{ d.text }}{% endfor %}"
    "{% else %}{{ documents }}{% endif %}",
    "bos": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "unset-tokens": "{{ sep_token is defined }}{{ cls_token is defined }}{{ mask_token }}"
    "{{ unk_token is none }}{{ pad_token | default('nothing') }}",
    "extra-tokens": "{{ image_token is defined }}{{ image_token }}{{ additional_special_tokens }}"
    "{{ extra_special_tokens is defined }}",
    "generation-prompt": "{{ messages[-1].content }}{% if add_generation_prompt %}>>{% endif %}",
    "generation-prompt-is": "{{ add_generation_prompt }}{{ add_generation_prompt is true }}",
    "own-variables": "{{ enable_thinking }}|{{ enable_thinking is defined }}|{{ depth }}",
    "own-variables-default": "{% set t = enable_thinking if enable_thinking is defined else true %}"
    "{% if not t %}<think></think>{% endif %}",
    "thinking-false": "{% if enable_thinking is defined and enable_thinking is false %}"
    "/no{% endif %}",
    "bos-by-variable": "{{ bos_token }}{{ custom | default('-') }}",
    "self-and-loop": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}"
    "{{ loop.last }}{{ loop.length }}{{ loop.previtem is defined }}{{ loop.nextitem }}{% endfor %}",
    "undefined-attribute": "{% for m in messages %}{{ m.nothing }}{{ m.name is defined }}"
    "{% endfor %}",
    # tags
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation-trimmed": "{% for m in messages %} {%- generation -%} {{ m.content }} "
    "{%- endgeneration -%} {% endfor %}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "macro": "{% macro turn(m, end='\n') %}[{{ m.role }}] {{ m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='|') }}{% endfor %}",
    "call": "{% macro wrap() %}<{{ caller() }}>{% endmacro %}"
    "{% for m in messages %}{% call wrap() %}{{ m.content }}{% endcall %}{% endfor %}",
    "filter-block": "{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% endfilter %}",
    "set-block": "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}"
    "{{ all | length }}{{ all }}",
    "with": "{% with x = messages[0].content %}{{ x }}{% endwith %}{{ x is defined }}",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% if m.role == 'system' %}{% set ns.found = true %}{% endif %}"
    "{% endfor %}{{ ns.found }}{{ ns.n }}",
    "namespace-from-end": "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}"
    "{% if ns.last == -1 and m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{{ ns.last }}",
    "raw": "{% raw %}{{ not }} {% this %}{% endraw %}{{ messages[0].content }}",
    "comment": "a{# no #}b{#- no -#} c {#+ x +#}\n{{ messages[0].role }}",
    "else-of-loop": "{% for t in tools or [] %}t{% else %}none{% endfor %}{{ messages | length }}",
    "recursive-loop": "{% for x in [[1, [2, [3]]]] recursive %}{% if x is iterable %}"
    "({{ loop(x) }})"
    "{% else %}{{ x }}{% endif %}{% endfor %}{{ messages[0].content }}",
    "autoescape-is-off": "<b>&{{ messages[0].content }}&amp;</b>",
    # space
    "trim-blocks": "{% for m in messages %}\n{{ m.content }}\n{% endfor %}\n",
    "lstrip-blocks": "    {% for m in messages %}\n    {{ m.content }}\n    {% endfor %}"
    "\n  end  \n",
    "minus": "x \n {%- for m in messages -%} \n {{- m.content -}} \n {%- endfor -%} \n y",
    "plus": "  {%+ if true %}  \n{% endif +%}\n{{ messages[0].content }}",
    "last-newline": "{{ messages[0].content }}\n\n",
    "first-space": "  {% if true %}x{% endif %}{{ messages[0].content }}",
    "crlf": "{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}",
    # filters, tests, methods
    "tojson": "{{ messages | tojson }}",
    "tojson-sorted": "{{ messages[0] | tojson(sort_keys=true) }}",
    "tojson-separators": "{{ messages[0] | tojson(separators=(',', ':')) }}",
    "tojson-ascii": "{{ messages | tojson(ensure_ascii=true) }}",
    "tojson-all": "{{ messages | tojson(indent=2, sort_keys=true, ensure_ascii=false) }}",
    "trim": "{% for m in messages %}{{ m.content | trim }}|{{ m.content.strip() }}{% endfor %}",
    "split": "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    ";{% endfor %}",
    "slices": "{{ messages[1:] | length }}{{ messages[:-1] | length }}{{ messages[-1].role }}",
    "joins": "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "rejects": "{% for m in messages | rejectattr('role', 'in', ['system']) %}"
    "{{ m.role }}{% endfor %}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ messages[0] | items | list | length }}",
    "dictsort": "{{ messages[0] | dictsort | first | first }}{{ dict(a=1) }}",
    "strings": "{{ messages[0].content.upper() ~ 1 }}{{ messages[0].content[:3] }}"
    "{{ messages[0].content.startswith('h') }}{{ 'x' * 3 }}{{ '%s-%d' | format('a', 3) }}",
    "tests": "{% for m in messages %}{{ m.content is string }}{{ m.content is mapping }}"
    "{{ m.content is iterable }}{{ m.content is sequence }}{{ m.content is none }}{% endfor %}",
    "numbers": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 5 }}{{ 7 % 3 }}{{ [3, 1] | sort }}{{ 1.50 }}"
    "{{ messages | length }}",
    "safe-escape": "{{ messages[0].content | e }}{{ '<' | safe }}{{ '<' | escape }}",
    "ranges": "{% for i in range(messages | length) %}{{ i }}{{ messages[i].role }}{% endfor %}",
    "content-parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}{% endif %}"
    "{% endfor %}",
    "content-as-it-is": "{% for m in messages %}{{ m.content }}"
    "{{ m['content'] | string }}{% endfor %}",
    "tool-calls": "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endif %}{% endfor %}",
    "tool-calls-defined": "{% for m in messages %}{{ m.tool_calls is defined }}"
    "{{ 'tool_calls' in m }}{{ m.content is none }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|"
    "{{ m.reasoning }}{% endfor %}",
    "get": "{% for m in messages %}{{ m.get('name', 'nobody') }}{{ m.get('x') }}{% endfor %}",
    # programs that say no
    "raises": "{% if messages[0].role == 'system' %}{{ raise_exception('no system: ' ~ "
    "messages[0].content) }}{% endif %}{{ messages[0].content }}",
    "alternates": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}",
    "adds-to-nothing": "{{ messages[0].nothing + 'x' }}",
    "sandbox": "{{ messages.__class__.__mro__ }}",
    "immutable": "{{ messages.append(1) }}{{ messages | length }}",
    "divides": "{{ 1 // (messages | length - 1) }}",
    "calls-nothing": "{{ nothing() }}",
    # as published ones are built
    "turns": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You help.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "instructions": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    "headers": "{% set loop_messages = messages %}{% for m in loop_messages %}{% set content = "
    "'<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}",
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "hello": [{"role": "user", "content": "hello"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is <b>this</b> & that?\n"},
    ],
    "several": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>\n\nb"},
        {"role": "user", "content": "c <|call|> <|im_end|>"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "日本 🙂"},
    ],
    "answered": [
        {"role": "user", "content": "one, two"},
        {"role": "assistant", "content": "three and "},
    ],
    "empty": [{"role": "user", "content": ""}],
    "parts": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look "},
                {"type": "image"},
                {"type": "text", "text": "here"},
            ],
        }
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "id": "c1",
                    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
    ],
    "named": [
        {"role": "user", "name": "Ann", "content": "me", "tool_calls": None, "extra": [1, {}]}
    ],
    "reasoned": [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "so", "reasoning_content": "because"},
        {"role": "assistant", "content": "then", "reasoning": "hence"},
    ],
    "twice": [{"role": "user", "content": "x"}, {"role": "user", "content": "\ty\r\n"}],
    "nothing-said": [{"role": "assistant", "tool_calls": []}, {"role": "user", "content": "1"}],
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Météo "now"',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "T", "text": "t é"}, {"title": "U", "text": ""}]
KWARGS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "depth": 3},
    {"tools": TOOLS, "enable_thinking": True},
    {"documents": DOCUMENTS, "bos_token": "OWN", "custom": ["a", {"b": None}]},
]
