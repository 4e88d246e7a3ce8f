"""Chat templates of the formats that models have, in Jinja and in as few words as say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ft_export.ollama.deriving import Chat, Refused

FORMATS: dict[str, str] = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "chatml with a system prompt of its own": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are \"Q\", a "
        "helper.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "chatml with no thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set said = '<<SYS>>\\n' + messages[0]['content'] + "
        "'\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first %}{{ said }}{% endif %}{{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} "
        "{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral, system before the last user": (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{% if loop.last and s is defined %}[INST] {{ s }}\n\n{{ m['content'] }}[/INST]{% else %}[INST] "
        "{{ m['content'] }}[/INST]{% endif %}{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    ),
    "gemma 2, which takes no system message": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "gemma 3, system inside the first question": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi 4": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n{% elif m['role'] == 'user' %}"
        "### Instruction:\n{{ m['content'] }}\n\n{% else %}### Response:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "braces and backslashes": (
        "{% for m in messages %}{{ '{{' }}\\{{ m['role'] }}\"`{{ '}}' }}\u00a0{{ m['content'] }}\t{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{' }}- a -{{ '}}' }}{% endif %}"
    ),
}
BOS, EOS = "<s>", "</s>"


def chat_of(template: str, bos: str = BOS) -> Chat:
    """A chat template without a tokenizer, its leading ``bos`` taken off, as where tokenizing adds it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def chat(messages: Sequence[Any], opened: bool) -> str:
        try:
            rendered, _ = render_jinja_template(
                [list(messages)], chat_template=template, add_generation_prompt=opened, bos_token=BOS, eos_token=EOS
            )
        except Exception as error:
            raise Refused(str(error)) from error
        return str(rendered[0]).removeprefix(bos)

    return chat
