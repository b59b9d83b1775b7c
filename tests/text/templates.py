"""Chat templates in the shapes that published models have, and conversations to put through them."""
SHAPES = {
    "chatml": "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\\n' + m['content'] | trim + '</s>\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}",
    "chatml_with_a_default_system": """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = 'You help.' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|turn|>system\\n' ~ system ~ '</s>\\n' }}
{%- for message in rest %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|turn|>' + message.role + '\\n' + message.content + '</s>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|turn|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' + (tool_call.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (rest[loop.index0 - 1].role != "tool") %}{{- '<|turn|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (rest[loop.index0 + 1].role != "tool") %}{{- '</s>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n' }}{%- endif %}""",
    "instructions": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
                    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
                    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
                    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
                    "{% else %}{% set content = message['content'] %}{% endif %}"
                    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
                    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "headers": "{{- bos_token }}{%- for message in messages %}{%- set content = '<|turn|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim %}"
               "{%- if loop.first and tools is not none %}{{- 'Tools: ' }}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}"
               "{{- content + eos_token }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn|>assistant<|end|>\\n\\n' }}{%- endif %}",
    "thinking": """
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- set reasoning_content = '' %}
    {%- if message.reasoning_content is string %}
        {%- set reasoning_content = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|turn|>' + message.role }}
    {%- if loop.index0 > ns.last and reasoning_content %}{{- '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>' }}{%- endif %}
    {{- '\\n' + content + '</s>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "parts_or_text": "{{ bos_token }}{% for message in messages %}{{ '<|turn|>' + message['role'] + '\\n' }}"
                     "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}"
                     "{%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
                     "{{ '</s>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<|turn|>model\\n'}}{% endif %}",
    "parts_alone": "{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
                   "{% for line in message['content'] %}{% if line.type == 'text' %}{{ line.text }}{% endif %}{% endfor %}</s>\n{% endfor %}"
                   "{% if add_generation_prompt %}Assistant:{% endif %}",
    "parts_mapped": "{% for m in messages %}{{ m.role }}={{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ~ ') }};{% endfor %}",
    "macros": "{% macro turn(who, what) %}<|turn|>{{ who }} {{ caller() if caller else '' }}{{ what }}</s>{% endmacro %}"
              "{% for m in messages if m.role != 'system' %}{{ turn(m.role, m.content | string | upper) }}{% if loop.last %}{{ unk_token }}{% endif %}{% endfor %}",
    "documents": "{% if documents %}{% for document in documents %}Document: {{ loop.index0 }}\n{% for key, value in document.items() %}"
                 "{{ key | title }}: {{ value }}\n{% endfor %}{% endfor %}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}",
    "alternating": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
                   "{{ m.content }}{{ '%s|%d' % (m.role, loop.index) }}{{ '{:>6}'.format(loop.revindex) }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
                  "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "named_tokens": "{{ bos_token }}{{ image_token }}{{ think_token }}{{ sep_token | default('none') }}{{ messages | length }}{{ dict(a=1) | tojson }}"
                    "{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "whole": "{{ messages | tojson }}{{ tools | tojson }}{{ documents | tojson }}{{ add_generation_prompt }}",
}

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks <up> & down.", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}
USER, ANSWER = {"role": "user", "content": "  Who goes there? "}, {"role": "assistant", "content": "Nobody <b> é 日本 "}
TALKS = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER, ANSWER, {"role": "user", "content": "Go on"}],
    "answered": [USER, ANSWER],
    "absent_fields": [{**USER, "name": None, "tool_calls": None}],
    "thoughts": [USER, {"role": "assistant", "content": "So", "reasoning": "Hm."}, USER, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"}],
    "calls": [USER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "é", "n": 1.5}}}]},
              {"role": "tool", "content": "nothing"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]}],
}
OPTIONS = {
    "plain": {}, "prompted": {"add_generation_prompt": True}, "tools": {"tools": [TOOL], "add_generation_prompt": True}, "no_tools": {"tools": []},
    "documents": {"documents": [{"title": "T", "text": "x"}, {"title": "U", "text": "y"}]}, "variables": {"enable_thinking": False, "add_generation_prompt": True},
    "continued": {"continue_final_message": True},
}
