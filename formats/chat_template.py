r"""Chat templates: how a conversation is written as tokens.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. A *template* writes it
as tokens. Two of them are implemented (see `pieces`): ChatML, for tokenizers that have its special tokens,
such as Qwen's, and Tülu's for all others. Training and inference must write the same tokens, so the template
is also saved beside the tokenizer, in Jinja, as Hugging Face's libraries read it.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Protocol

from formats.atomic import replace_file
from formats.json_file import read_json, write_json
from formats.tokenizer_json import STYLE

Conversation = list[dict[str, str]]  # of {"role": ..., "content": ...}

ROLES = ("system", "user", "assistant")
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


class Tokenizer(Protocol):
    """The part of `data.tokenizer.Tokenizer` that a template uses."""

    special_tokens: dict[str, int]
    eot: str
    eot_id: int

    def encode(self, text: str) -> list[int]: ...


def is_chatml(tokenizer: Tokenizer) -> bool:
    return {IM_START, IM_END} <= tokenizer.special_tokens.keys()


def end_id(tokenizer: Tokenizer) -> int:
    """The token that ends an answer."""
    return tokenizer.special_tokens[IM_END] if is_chatml(tokenizer) else tokenizer.eot_id


def as_text(content: str) -> str:
    """The content with a space put into whatever spells a marker of Tülu's template: "<| user|>".

    Markers are ordinary text there, so that a user could otherwise write turns in the assistant's name.
    """
    for role in ROLES:
        content = content.replace(f"<|{role}|>", f"<| {role}|>")
    return content


def pieces(messages: Conversation, tokenizer: Tokenizer) -> Iterator[tuple[str | int, bool]]:
    r"""Text or a special token's id, and whether it is part of a response.

    ChatML, if the tokenizer has its special tokens (Qwen's does):

        <|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n

    otherwise Tülu's, in the form of OLMo 2, where a line break parts an answer from the next turn:

        <|endoftext|><|user|>\nWhat is 2 + 2?\n<|assistant|>\n4<|endoftext|>

    The latter needs no token that the base model lacks. New tokens would be new rows of the embedding, random
    and to be learned from the few conversations alone; here the markers are ordinary text, <|endoftext|>
    begins the document as it did in pretraining, and as the end of an answer it is an end already known.
    """
    if is_chatml(tokenizer):
        start, end = tokenizer.special_tokens[IM_START], tokenizer.special_tokens[IM_END]
        for message in messages:
            answer = message["role"] == "assistant"
            yield from ((start, False), (f"{message['role']}\n", False))
            yield from ((message["content"], answer), (end, answer), ("\n", False))
        return

    yield tokenizer.eot_id, False
    for i, message in enumerate(messages):
        answer = message["role"] == "assistant"
        yield from ((f"<|{message['role']}|>\n", False), (as_text(message["content"]), answer))
        if answer:
            yield tokenizer.eot_id, True
        if not answer or i + 1 < len(messages):
            yield "\n", False


def encode(parts: Iterator[tuple[str | int, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of pieces and the flag of each. Text that lies together with one flag is encoded as one."""
    tokens: list[int] = []
    flags: list[bool] = []
    for (kind, flag), group in groupby(parts, key=lambda part: (type(part[0]), part[1])):
        content = [piece for piece, _ in group]
        ids = tokenizer.encode("".join(content)) if kind is str else content
        tokens += ids
        flags += [flag] * len(ids)
    return tokens, flags


def render(messages: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and for each whether it is part of a response.

    A response is what the assistant says and the token that ends it. It is encoded apart from what precedes
    it: these are the tokens that the model finds, from `prompt_tokens`, when it is asked.

    Hugging Face's apply_chat_template encodes the whole text between two special tokens at once. Its ids are
    these, unless (1) an answer begins with a line break, which most split patterns join to the one before it,
    or under GPT-2's pattern with several spaces; or (2) some content spells a special token: there it becomes
    that token, here it stays text.
    """
    return encode(pieces(messages, tokenizer), tokenizer)


def prompt_tokens(messages: Conversation, tokenizer: Tokenizer) -> list[int]:
    """What precedes the answer to messages, the last of them the user's: up to the assistant's header."""
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("there is nothing to answer: expected messages of which the last is the user's")
    header = [(f"<|{ROLES[-1]}|>\n", False)]
    if is_chatml(tokenizer):
        header = [(tokenizer.special_tokens[IM_START], False), (f"{ROLES[-1]}\n", False)]
    tokens, _ = encode([*pieces(messages, tokenizer), *header], tokenizer)
    return tokens


def chat_template(tokenizer: Tokenizer) -> str:
    """The template in Jinja, as Hugging Face's tokenizers keep it; `render` says where ids may differ."""
    if is_chatml(tokenizer):
        turn = f"'{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n'"
        begin, header = "", f"{IM_START}assistant\\n"
    else:
        content = "message['content']"
        for role in ROLES:
            content += f" | replace('<|{role}|>', '<| {role}|>')"
        end = "(eos_token + ('' if loop.last else '\\n') if message['role'] == 'assistant' else '\\n')"
        turn = f"'<|' + message['role'] + '|>\\n' + ({content}) + {end}"
        begin, header = "{{ eos_token }}", "<|assistant|>\\n"
    ask = f"{{% if add_generation_prompt %}}{{{{ '{header}' }}}}{{% endif %}}"
    return f"{begin}{{% for message in messages %}}{{{{ {turn} }}}}{{% endfor %}}{ask}"


def save_chat_template(tokenizer: Tokenizer, directory: Path) -> None:
    """Write chat_template.jinja beside a saved tokenizer, for AutoTokenizer's apply_chat_template.

    With Tülu's template, tokenizer_config.json is also told where an answer begins and ends. Otherwise the
    server of transformers looks for ChatML's marks in all models of Qwen's layout, and finding none repeats
    the question before the answer. With ChatML's, the generation_config.json of a model in directory is told
    that its mark ends an answer as well as the end of text does.
    """
    directory = Path(directory)
    with replace_file(directory / "chat_template.jinja") as new:
        new.write_text(chat_template(tokenizer), encoding="utf-8")
    generation = directory / "generation_config.json"
    if not is_chatml(tokenizer):
        path = directory / "tokenizer_config.json"
        template = {"defaults": {"role": "assistant"}, "start_anchor": "<|assistant|>\n"}
        template["fields"] = {"content": {"close": tokenizer.eot, "content": "text"}}
        write_json(path, read_json(path) | {"response_template": template}, **STYLE)
    elif generation.exists():
        ends = list(dict.fromkeys([end_id(tokenizer), tokenizer.eot_id]))  # they may be one
        write_json(generation, read_json(generation) | {"eos_token_id": ends})
