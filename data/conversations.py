"""Conversations in files: the formats that are in common use, read into one form.

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": str}, in which user
and assistant alternate and the assistant is last; a system message may come first. `read_conversations` lists
the formats that it reads. formats/chat_template.py writes a conversation as tokens.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data.records import converted, refuse
from formats.chat_template import Conversation

# Fields of records that hold one question and one answer.
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
EXPECTED = (
    'expected {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, or '
    + ", ".join(f'{{"{ask}", "{answer}"}}' for ask, answer in PAIRS)
)
OUR_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names: ours


def check(messages: Conversation) -> None:
    """Raise ValueError unless the messages are a conversation: user and assistant alternate, a system message
    may come first, the assistant is last, contents are valid text, and no answer is empty."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        order = "user, assistant, user, assistant ..., an assistant last; a system message may come first"
        raise ValueError(f"roles {', '.join(map(str, roles)) or '(none)'}: expected {order}")
    for message in messages:
        content = message["content"]
        if not isinstance(content, str) or re.search("[\0\ud800-\udfff]", content):
            raise ValueError(f"{message['role']}: {content!r:.60}: expected a string of valid characters")
        if message["role"] == "assistant" and not content.strip():
            raise ValueError("the assistant's answer is empty: expected text")


def as_messages(turns: Iterable[tuple[Any, Any]]) -> Conversation:
    """Return the messages of turns (role, content), with our names of the roles."""
    return [{"role": OUR_ROLES.get(str(role), role), "content": content} for role, content in turns]


def to_messages(record: Any) -> Conversation:
    """Return the conversation in a record. Raises ValueError for a record of an unknown format."""
    try:
        if "messages" in record:
            turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
        elif "conversations" in record:
            turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        else:
            ask, answer = next(pair for pair in PAIRS if record.keys() >= set(pair))
            question = record[ask]
            if ask == "instruction" and record.get("input"):  # Alpaca's text that the instruction is about
                question = question + "\n\n" + record["input"]
            turns = [("user", question), ("assistant", record[answer])]
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise ValueError(f"{record!r:.60}: {EXPECTED}") from None
    messages = as_messages(turns)
    check(messages)
    return messages


def read_conversations(path: Path, on_bad: Callable[[str], None] = refuse) -> list[Conversation]:
    """Return the conversations in a file of records: .jsonl, .json, .csv ... (data/records.py).

    A record has one of these forms; other fields are ignored:

        {"messages": [{"role": "user", "content": "..."}, ...]}            OpenAI, Tülu
        {"conversations": [{"from": "human", "value": "..."}, ...]}        ShareGPT
        {"instruction": "...", "input": "...", "output": "..."}            Alpaca; "input" may be missing
        {"prompt": "...", "completion": "..."}, {"prompt", "response"}, {"question", "answer"}

    on_bad is called with a message for a record that is no conversation, and may raise an error; otherwise
    the record is left out. Raises ValueError for a file that cannot be read, or without conversations.
    """
    return converted(path, "conversations", EXPECTED, to_messages, on_bad)
