r"""Chat templates: how a conversation is written as tokens.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. A *template* writes it
as tokens. Two of them are implemented (see `pieces`): ChatML, for tokenizers that have its special tokens,
such as Qwen's, and that of Tülu (Wang et al. 2023, arXiv 2306.04751) for all others. Training and inference
must write the same tokens, so the template is also saved beside the tokenizer as chat_template.jinja, which
Hugging Face's libraries read.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol

from formats.atomic import replace_file
from formats.json_file import read_json, write_json
from formats.tokenizer_json import STYLE, Around

Conversation = list[dict[str, str]]  # of {"role": ..., "content": ...}

ROLES = ("system", "user", "assistant")
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
IMAGE = "<image>"  # the place of an image in a message, for models that read images


class ImageTokens(NamedTuple):
    """The tokens that an image takes in a conversation: the same id several times."""

    id: int
    n: int


class Tokenizer(Protocol):
    """The part of `data.tokenizer.Tokenizer` that a template uses."""

    special_tokens: dict[str, int]
    eot: str
    eot_id: int
    around: Around
    begin_ids: list[int]

    def encode(self, text: str) -> list[int]: ...


def is_chatml(tokenizer: Tokenizer) -> bool:
    """Return whether the template is ChatML, which it is if the tokenizer has ChatML's special tokens."""
    return {IM_START, IM_END} <= tokenizer.special_tokens.keys()


def end_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a response."""
    return tokenizer.special_tokens[IM_END] if is_chatml(tokenizer) else tokenizer.eot_id


def as_text(content: str) -> str:
    """Return the content of a message with a space in each marker of Tülu's template, such as "<| user|>".

    Markers are ordinary text in that template. Without the space, a user could write a turn of the assistant.
    """
    for role in ROLES:
        content = content.replace(f"<|{role}|>", f"<| {role}|>")
    return content


def pieces(messages: Conversation, tokenizer: Tokenizer) -> Iterator[tuple[str | int, bool]]:
    r"""Yield the pieces of a conversation: (a text or the id of a token, whether it is part of a response).

    ChatML is used if the tokenizer has its special tokens, as Qwen's does:

        <|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n

    otherwise Tülu's template, in the form of OLMo 2 with a line break between a response and the next turn:

        <|endoftext|><|user|>\nWhat is 2 + 2?\n<|assistant|>\n4<|endoftext|>

    Tülu's template needs no new tokens, whose embeddings would start at random and be learned from few
    conversations: the markers are ordinary text, and <|endoftext|> comes before a text and after it, as in
    pretraining. Both templates begin with the tokens that the tokenizer puts in front of a text, if there are
    any; Tülu's then has no <|endoftext|> there.
    """
    begin = tokenizer.begin_ids or ([] if is_chatml(tokenizer) else [tokenizer.eot_id])
    yield from ((i, False) for i in begin)
    if is_chatml(tokenizer):
        start, end = tokenizer.special_tokens[IM_START], tokenizer.special_tokens[IM_END]
        for message in messages:
            is_response = message["role"] == "assistant"
            yield from ((start, False), (f"{message['role']}\n", False))
            yield from ((message["content"], is_response), (end, is_response), ("\n", False))
        return

    for i, message in enumerate(messages):
        is_response = message["role"] == "assistant"
        yield from ((f"<|{message['role']}|>\n", False), (as_text(message["content"]), is_response))
        if is_response:
            yield tokenizer.eot_id, True
        if not is_response or i + 1 < len(messages):
            yield "\n", False


def with_images(
    parts: Iterator[tuple[str | int, bool]], image: ImageTokens | None
) -> Iterator[tuple[str | int, bool]]:
    """Yield pieces in which each "<image>" outside of responses is replaced by the tokens of an image.

    image: those tokens, or None to leave the text as it is.
    """
    for piece, flag in parts:
        if image is None or flag or isinstance(piece, int):
            yield piece, flag
            continue
        before, *rest = piece.split(IMAGE)
        yield before, flag
        for text in rest:
            yield from [(image.id, flag)] * image.n
            yield text, flag


def encode(parts: Iterator[tuple[str | int, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the token ids of pieces, and for each id whether it is part of a response.

    parts: as `pieces` yields them. Adjacent texts are joined before they are encoded if both are part of a
    response, or neither is.
    """
    tokens: list[int] = []
    flags: list[bool] = []
    for (kind, flag), group in groupby(parts, key=lambda part: (type(part[0]), part[1])):
        content = [piece for piece, _ in group]
        ids = tokenizer.encode("".join(content)) if kind is str else content
        tokens += ids
        flags += [flag] * len(ids)
    return tokens, flags


def render(
    messages: Conversation, tokenizer: Tokenizer, image: ImageTokens | None = None
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and for each id whether it is part of a response.

    A response is the content of an assistant's message and the token that ends it. It is encoded apart from
    the text before it, so that in training it follows the same tokens as in inference, those of
    `prompt_tokens`. image: see `with_images`.

    Hugging Face's apply_chat_template encodes all text between two special tokens at once. Its ids differ in
    two cases. (1) A response begins with a line break, which most split patterns join to the one before it,
    or, with GPT-2's pattern, with several spaces. (2) A content contains the name of a special token: there
    it becomes that token, here it stays text.
    """
    return encode(with_images(pieces(messages, tokenizer), image), tokenizer)


def prompt_tokens(
    messages: Conversation, tokenizer: Tokenizer, image: ImageTokens | None = None
) -> list[int]:
    """Return the token ids that precede the response to messages, including the header of that turn.

    image: see `with_images`. Raises ValueError if there is no message, or if the last is the assistant's.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("there is nothing to answer: expected messages of which the last is the user's")
    header = [(f"<|{ROLES[-1]}|>\n", False)]
    if is_chatml(tokenizer):
        header = [(tokenizer.special_tokens[IM_START], False), (f"{ROLES[-1]}\n", False)]
    parts = with_images(pieces(messages, tokenizer), image)
    tokens, _ = encode(iter([*parts, *header]), tokenizer)
    return tokens


def chat_template(tokenizer: Tokenizer) -> str:
    """Return the template in Jinja, for Hugging Face's tokenizers. `render` names where its ids differ."""
    if is_chatml(tokenizer):
        turn = f"'{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n'"
        first, header = "", f"{IM_START}assistant\\n"
    else:
        content = "message['content']"
        for role in ROLES:
            content += f" | replace('<|{role}|>', '<| {role}|>')"
        end = "(eos_token + ('' if loop.last else '\\n') if message['role'] == 'assistant' else '\\n')"
        turn = f"'<|' + message['role'] + '|>\\n' + ({content}) + {end}"
        first, header = "{{ eos_token }}", "<|assistant|>\\n"
    begin = "".join(f"{{{{ {json.dumps(name)} }}}}" for name in tokenizer.around[0]) or first
    ask = f"{{% if add_generation_prompt %}}{{{{ '{header}' }}}}{{% endif %}}"
    return f"{begin}{{% for message in messages %}}{{{{ {turn} }}}}{{% endfor %}}{ask}"


def save_chat_template(tokenizer: Tokenizer, directory: Path) -> None:
    """Write chat_template.jinja beside a saved tokenizer, for AutoTokenizer's apply_chat_template.

    With Tülu's template, tokenizer_config.json also gets the texts before and after a response. Without them,
    the server of transformers looks for ChatML's markers in all models of Qwen's layout, and since it finds
    none, repeats the prompt before the response. With ChatML, a model in the same directory gets two tokens
    that end a response in its generation_config.json: ChatML's own and the end of text. They replace a single
    eos_token_id there; in a list they come first.
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
        content = read_json(generation)
        given = content.get("eos_token_id")
        ends = [end_id(tokenizer), tokenizer.eot_id, *(given if isinstance(given, list) else [])]
        write_json(generation, content | {"eos_token_id": list(dict.fromkeys(ends))})  # without duplicates
