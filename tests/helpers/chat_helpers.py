"""Small models whose tokenizers have chat templates of the families that are in use, and what an assistant's tokens are in them."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import transformers

QWEN = """
{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = """
{%- for message in messages %}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{%- set content = bos_token + content %}{%- endif %}{{- content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
GEMMA = """
{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{%- if message['role'] == 'assistant' %}{%- set role = 'model' %}{%- else %}{%- set role = message['role'] %}{%- endif %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
INSTRUCT = """
{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'] | trim + ' ' + eos_token }}{%- endif %}{%- endfor %}"""
PHI = """
{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
THINKING = """
{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}
{%- endif %}{%- endfor %}{%- for message in messages %}{%- if message.role == 'assistant' %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
FORGETFUL = """
{%- for message in messages %}{%- if loop.last or message.role != 'user' or messages|length < 4 %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- else %}{{- '...' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GENERATION = """
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}
{%- endif %}{{- '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Family:
    """A chat template, and how it writes an assistant's turn."""

    template: str
    before: str
    """What stands before its content, from the mark of its turn on."""
    ends: str
    """The special token that ends it."""
    special: tuple[str, ...]
    bos: bool = False
    """Whether the tokenizer adds BOS, and the template writes it."""
    system: bool = True


_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen": Family(QWEN, "<|im_start|>assistant\n", "<|im_end|>", _IM),
    "llama3": Family(
        LLAMA3,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos=True,
    ),
    "gemma": Family(
        GEMMA, "<start_of_turn>model\n", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), bos=True, system=False
    ),
}
OTHERS = {
    "instruct": Family(INSTRUCT, " [/INST]", "<eos>", (), bos=True, system=False),
    "phi": Family(PHI, "<|assistant|>\n", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "thinking": Family(THINKING, "<|im_start|>assistant\n", "<|im_end|>", _IM),
    "forgetful": Family(FORGETFUL, "<|im_start|>assistant\n", "<|im_end|>", _IM),
    "generation": Family(GENERATION, "<|im_start|>assistant\n", "<|im_end|>", _IM),
}

ONE = [
    {"role": "user", "content": "who wrote the book?"},
    {"role": "assistant", "content": "the quick fox"},
]
TWO = [*ONE, {"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3 = 3"}]
SYSTEM = {"role": "system", "content": "a small village"}


@cache
def chatting(name: str) -> Any:
    """Return a model with the tokenizer of a family; tests leave it as it was."""
    with tempfile.TemporaryDirectory() as folder, tiny.quiet():
        _save_tokenizer(folder, {**FAMILIES, **OTHERS}[name])
        return tiny.to_bridge(_plain(), "llama", tiny.load_tokenizer(folder))


def save_chatting(name: str, folder: Path) -> None:
    """Save the same as a Hugging Face directory."""
    _plain().save_pretrained(folder)
    _save_tokenizer(str(folder), {**FAMILIES, **OTHERS}[name])


def _plain() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with tiny.quiet(0):
        return transformers.LlamaForCausalLM(config).eval()


def _save_tokenizer(folder: str, family: Family) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>", *family.special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*tiny.TEXTS * 3, "user model assistant system\n\n"], trainer)
    if family.bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>" if family.bos else None, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)


def template_ids(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """Return what transformers itself makes of a conversation."""
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


def assistants(tokenizer: Any, ids: list[int], family: Family) -> list[int]:
    """Return the places of the assistant's tokens: behind the marks of its turns, and up to what ends them."""
    before = tokenizer(family.before, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(family.ends)
    places: list[int] = []
    for start in range(len(ids)):
        if ids[start : start + len(before)] == before:
            over = ids.index(end, start + len(before))
            places += range(start + len(before), over + 1)
    return places
