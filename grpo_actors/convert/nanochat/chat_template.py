"""nanochat's special tokens and chat template.

The template follows nanochat's ``tokenizer.render_conversation``: a conversation begins with one ``<|bos|>``; a
system turn is put before the text of the first user turn; user and assistant turns alternate; the parts of an
assistant turn may be Python calls and their output. There is one difference: if a turn contains the text of a
special token, it becomes that token, as with every chat template of transformers.
"""

BOS, USER_START, USER_END = "<|bos|>", "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
#: All special tokens that the template writes.
SPECIAL_TOKENS = (
    *(BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
#: Tokens that end an answer: its own end, or the start of another document.
STOPS = (ASSISTANT_END, BOS)

TEMPLATE = """\
{{- '<|bos|>' -}}
{%- set head = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set head = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
    {%- if not turns -%}{{- raise_exception('a system turn must come before a user turn') -}}{%- endif -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant turns must alternate') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- '<|user_start|>' + (head if loop.first else '') + turn['content'] + '<|user_end|>' -}}
    {%- else -%}
        {{- '<|assistant_start|>' -}}
        {%- if turn['content'] is string -%}
            {{- turn['content'] -}}
        {%- else -%}
            {%- for part in turn['content'] -%}
                {%- if part['type'] == 'python' -%}
                    {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
                {%- elif part['type'] == 'python_output' -%}
                    {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
                {%- else -%}
                    {{- part['text'] -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|assistant_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""
