"""Chat templates that do what published ones do, one feature or family each, and conversations to put through them."""

from __future__ import annotations

from typing import Any

MARKERS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>", "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>",
    "<|im_system|>", "<|im_middle|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[gMASK]", "<sop>",
    "<|observation|>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|message_sep|>", "<|role_sep|>", "<|endoftext|>",
    "<tool_response>", "</tool_response>", "/nothink", "<|channel|>", "<|message|>", "<|start|>", "<|end|>",
)  # fmt: skip

_EACH = "{% for m in messages %}"
_END = "{% endfor %}"
_OPEN = "{% if add_generation_prompt %}"
_TEXT = """{%- macro text(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content -%}
            {%- if part is mapping and part.type == 'text' -%}{{- part.text -}}{%- endif -%}
        {%- endfor -%}
    {%- elif content is none or content is not defined -%}
    {%- else -%}{{- content -}}{%- endif -%}
{%- endmacro -%}
"""

TEMPLATES: dict[str, str] = {
    "demonstration": "{{ bos_token }}" + _EACH + "{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}" + _END + _OPEN + "{{ '<|assistant|>' }}{% endif %}",
    "chatml": _EACH + "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}" + _END + _OPEN
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml in lines": """{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {{- m.content | trim }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "default system": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    + _EACH + "<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n" + _END + _OPEN + "<|im_start|>assistant\n{% endif %}",
    "deepseek v3": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}{%- endif %}{%- endfor %}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{'<｜tool▁outputs▁begin｜>' + message['content'] + '<｜tool▁outputs▁end｜>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}""",
    "deepseek r1": """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}""",
    "deepseek v3.1": """{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% set ns = namespace(last=false, system='', first=true) %}{%- for m in messages %}{%- if m['role'] == 'system' %}{%- if ns.first %}{% set ns.system = ns.system + m['content'] %}{% set ns.first = false %}{%- else %}{% set ns.system = ns.system + '\\n\\n' + m['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set ns.last = true -%}{{'<｜User｜>' + m['content']}}{%- endif %}{%- if m['role'] == 'assistant' %}{%- if ns.last %}{{'<｜Assistant｜>'}}{%- if m['prefix'] is defined and m['prefix'] and thinking %}{{'<think>'}}{%- else %}{{'</think>'}}{%- endif %}{%- endif %}{%- set ns.last = false -%}{%- set content = m['content'] -%}{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}{{content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}{%- if add_generation_prompt and ns.last %}{{'<｜Assistant｜>'}}{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}{% endif %}""",
    "glm": _TEXT + """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>
For each call: <tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>{%- endif -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last = loop.index0 -%}{%- endif %}{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ text(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not text(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning = '' %}
{%- set content = text(m.content) %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- else %}{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}{%- endif %}
{%- if loop.index0 > ns.last and reasoning -%}
{{ '\\n<think>' + reasoning.strip() + '</think>'}}
{%- else -%}
{{ '\\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}
{% if m.tool_calls %}{% for tc in m.tool_calls %}{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{ '\\n<tool_call>' + tc.name }}
{% set args = tc.arguments %}{% if args is mapping %}
{% for k, v in args.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}{% endif %}
</tool_call>{% endfor %}{% endif %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|observation|>' }}{%- endif %}
{{- '\\n<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>' }}
{%- elif m.role == 'system' -%}<|system|>
{{ text(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}""",
    "kimi": """{%- macro named(m) -%}{%- set name = m.get('name') or m['role'] -%}
{%- if m['role'] == 'user' -%}<|im_user|>{{name}}<|im_middle|>
{%- elif m['role'] == 'assistant' -%}<|im_assistant|>{{name}}<|im_middle|>
{%- else -%}<|im_system|>{{name}}<|im_middle|>{%- endif -%}{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- for m in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>{%- endif -%}
{{ named(m) }}{%- if m['content'] is string -%}{{ m['content'] }}{%- elif m.content -%}{%- for part in m['content'] -%}{%- if part['type'] == 'image' -%}<|endoftext|>{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}<|im_end|>{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}""",
    "qwen with tools": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n<tool_call>\\n{\\"name\\": <name>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}""",
    "llama with date": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}{{- system }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("only single tool-calls") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- else %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "mistral": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{% if loop.first and system %}{{ '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% else %}{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "gigachat": """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{{ bos_token + messages[0].content + '<|message_sep|>' }}{% else %}{% set rest = messages %}{{ bos_token }}{% endif %}{% for m in rest %}{{ m.role + '<|role_sep|>' + (m.content if m.content is string else m.content | tojson) + '<|message_sep|>' }}{% if m.role == 'user' %}{{ 'available functions<|role_sep|>' + (tools or []) | tojson(indent=2) + '<|message_sep|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant<|role_sep|>' }}{% endif %}""",
    "channels": _EACH + """<|start|>{{ m.role }}{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>{{ m.role }}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}""",
    "generation block": _EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n" + _END,
    "break and continue": _EACH + "{% if loop.index > 3 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>" + _END,
    "macro with markers": "{% macro turn(open, body, close='<|im_end|>') %}{{ open }}{{ body }}{{ close }}{% endmacro %}" + _EACH + "{{ turn('<|im_start|>' + m.role + '\n', m.content) }}" + _END + _OPEN + "{{ turn('<|im_start|>assistant\n', '', '') }}{% endif %}",
    "markers in variables": "{% set open, shut = '<|im_start|>', '<|im_end|>' %}" + _EACH + "{{ open ~ m.role ~ '\n' ~ m.content ~ shut }}" + _END,
    "markers by role": "{% set by = {'user': '<|im_user|>', 'assistant': '<|im_assistant|>', 'system': '<|im_system|>', 'tool': '<|observation|>'} %}" + _EACH + "{{ by[m.role] }}{{ m.content }}<|im_end|>" + _END + _OPEN + "{{ by['assistant'] }}{% endif %}",
    "filter block": _EACH + "{% filter trim %}<|im_start|>{{ m.role }}\n{{ m.content }}   {% endfilter %}<|im_end|>" + _END,
    "set block": _EACH + "{% set body %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endset %}{{ body }}" + _END,
    "format": _EACH + "{{ '<|im_start|>{}\n{}<|im_end|>'.format(m.role, m.content) }}" + _END,
    "percent": _EACH + "{{ '<|im_start|>%s\n%s<|im_end|>' % (m.role, m.content) }}" + _END,
    "join": "{{ messages | map(attribute='content') | select('string') | join('<|im_end|>') }}" + _OPEN + "{{ ['<|im_start|>', 'assistant'] | join }}{% endif %}",
    "looks at its own": "{% set ns = namespace(out='') %}" + _EACH + "{% set ns.out = ns.out + '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' %}" + _END + "{% if ns.out.startswith('<|im_start|>') %}{{ ns.out }}{% endif %}",
    "blocks trimmed": "{% for m in messages %}\n  {% if m.role == 'user' %}\n<|user|>\n{{ m.content }}\n  {% else %}\n<|assistant|>\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "uppercase": _EACH + "{{ m.role | upper }}: {{ m.content | capitalize }}\n" + _END + _OPEN + "ASSISTANT:{% endif %}",
    "replace and slice": _EACH + "<|im_start|>{{ m.role[:4] }}\n{{ (m.content | string).replace('e', 'E')[:60] }}<|im_end|>" + _END,
    "words": _EACH + "<|im_start|>{{ (m.content | string).split() | join(' ') }}<|im_end|>" + _END,
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=1, sort_keys=true) }}",
    "tojson of one": _EACH + "<|im_start|>{{ m | tojson(ensure_ascii=true, separators=(',', ':')) }}<|im_end|>" + _END,
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token is defined }}" + _EACH + "{{ m.content }}{{ eos_token }}" + _END,
    "documents": "{% if documents %}{% for d in documents %}<|im_system|>{{ d.title }}: {{ d.text }}<|im_end|>{% endfor %}{% endif %}" + _EACH + "<|im_user|>{{ m.content }}<|im_end|>" + _END,
    "items": _EACH + "{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}<|im_end|>" + _END,
    "namespace and dict": "{% set d = dict(a='<|user|>') %}{% set ns = namespace(n=0) %}" + _EACH + "{% set ns.n = ns.n + 1 %}{{ d.a }}{{ ns.n }} {{ m.content }}" + _END,
    "tests of content": _EACH + "{% if m.content is string and m.content == m.content.strip() %}={% else %}~{% endif %}<|im_start|>{{ m.content }}<|im_end|>" + _END,
    "default filter": _EACH + "<|im_start|>{{ m.name | default('nobody') }}: {{ m.content | default('<|endoftext|>', true) }}<|im_end|>" + _END,
    "conditional marker": _EACH + "{{ ('<|user|>' if m.role == 'user' else '<|assistant|>') + (m.content or '') }}" + _END + "{{ '<|assistant|>' if add_generation_prompt }}",
    "reversed": "{% for m in messages | reverse %}{{ loop.revindex }}{{ loop.last }}<|im_start|>{{ m.content }}<|im_end|>" + _END,
    "raw": "{% raw %}<|im_start|>{{ not jinja }}{% endraw %}" + _EACH + "{{ m.content }}<|im_end|>" + _END,
    "recursive text": _TEXT + _EACH + "<|im_start|>{{ m.role }}\n{{ text(m.content) | trim }}<|im_end|>\n" + _END + _OPEN + "<|im_start|>assistant\n{% endif %}",
    "last only": "<|im_start|>{{ messages[-1].content }}<|im_end|>{{ messages | length }}",
    "tool use": "{% if tools is not none and tools is defined %}{% for t in tools %}<|im_system|>{{ t.function.name }}{{ t.function.parameters | tojson }}<|im_end|>{% endfor %}{% endif %}" + _EACH + "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} {{ c.function.arguments }}</tool_call>{% endfor %}{% elif m.role == 'tool' %}<|observation|>{{ m.name }} {{ m.tool_call_id }} {{ m.content }}{% else %}<|im_start|>{{ m.content }}{% endif %}" + _END,
    "raises": "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('only user and assistant, not ' + m.role) }}{% endif %}<|im_start|>{{ m.content }}{% endfor %}",
}  # fmt: skip

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a <city> & \"more\" é漢",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}


def _user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _model(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# messages, and what else apply_chat_template is given
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one question": ([_user("Name three birds")], {"add_generation_prompt": True}),
    "with system": ([{"role": "system", "content": "Be brief. "}, _user("hi"), _model("Hello!"), _user("and?")],
                    {"add_generation_prompt": True}),
    "blanks and signs": ([_user("  a < b > c | d\n\n "), _model("\n x's \"y\" & <b>z</b> \t"), _user("é漢🦊 <|x")], {}),
    "reasoning in content": ([_user("2+2?"), _model("<think>\nadd them\n</think>\n\n4"), _user("sure?"),
                              _model("<think>hm</think>yes"), _user("ok")], {"add_generation_prompt": True}),
    "reasoning apart": ([_user("2+2?"), _model("4", reasoning_content="add them"), _user("why?")],
                        {"add_generation_prompt": True, "enable_thinking": False}),
    "tools": ([_user("weather?"), _model(None, tool_calls=[CALL]),
               {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "sunny > 20"}],
              {"tools": [TOOL], "add_generation_prompt": True}),
    "parts": ([_user([{"type": "text", "text": "look "}, {"type": "text", "text": "here"}])],
              {"add_generation_prompt": True}),
    "arguments": ([_user("hi"), _model("yes"), _user("so")],
                  {"add_generation_prompt": True, "thinking": True, "date_string": "26 Jul 2026", "bos_token": "",
                   "documents": [{"title": "t", "text": "d"}]}),
    "continued": ([_user("count"), _model("one, two, ")], {"continue_final_message": True}),
    "continued reasoning": ([_user("count"), _model("<think>\nlet me", prefix=True)],
                            {"continue_final_message": True, "thinking": True}),
    "other roles": ([{"role": "developer", "content": "d"}, {"role": "user", "name": "Ann", "content": "x"},
                     {"role": "ipython", "content": "{}"}, _model("", tool_calls=None)], {}),
}  # fmt: skip
