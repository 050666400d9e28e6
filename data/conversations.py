"""Conversations in files: the record formats that are in common use, read into one.

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": str}, in which user
and assistant alternate and the assistant is last; a system message may come first. `read_conversations` lists
the formats that it reads. formats/chat_template.py writes a conversation as tokens.
"""

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

from formats.chat_template import Conversation

# Fields of records that hold one question and one answer.
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
EXPECTED = (
    'expected {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, or '
    + ", ".join(f'{{"{ask}", "{answer}"}}' for ask, answer in PAIRS)
)
OUR_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names: ours


def check(messages: Conversation) -> None:
    """Raise ValueError unless user and assistant alternate, with the assistant last and never empty."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        order = "user, assistant, user, assistant ..., an assistant last; a system message may come first"
        raise ValueError(f"roles {', '.join(map(str, roles))}: expected {order}")
    for message in messages:
        content = message["content"]
        if not isinstance(content, str) or re.search("[\ud800-\udfff]", content):
            raise ValueError(f"{message['role']}: {content!r:.60}: expected a string of valid characters")
        if message["role"] == "assistant" and not content.strip():
            raise ValueError("the assistant's answer is empty: expected text")


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
    messages = [{"role": OUR_ROLES.get(str(role), role), "content": content} for role, content in turns]
    check(messages)
    return messages


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations in a .jsonl file, one per line, or a .json file, one list; also with .gz.

    Each record is {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from": "human" | "gpt" |
    "system", "value"}, ...]} (ShareGPT), {"instruction", "output"} with an "input" or without (Alpaca),
    {"prompt", "completion"}, {"prompt", "response"} or {"question", "answer"}; other fields are ignored.

    Raises ValueError naming the file, the line or item, and what was expected.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".json")):
        raise ValueError(f"{path}: expected a .jsonl or .json file of conversations, also .gz")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected UTF-8 text") from None

    # Parse the JSON: of the file, or of each line.
    sources = [("", text)]
    if name.endswith(".jsonl"):
        sources = [(f", line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = []
    for place, source in sources:
        try:
            records.append((place, json.loads(source)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}{place}: {source[:60]!r} is not JSON ({error}); {EXPECTED}") from None
    if name.endswith(".json"):
        content = records[0][1]
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected one list of conversations, found {content!r:.60}")
        records = [(f", item {i}", record) for i, record in enumerate(content, 1)]

    # Translate the records.
    conversations = []
    for place, record in records:
        try:
            conversations.append(to_messages(record))
        except ValueError as error:
            raise ValueError(f"{path}{place}: {error}") from None
    if not conversations:
        raise ValueError(f"{path}: has no conversations; {EXPECTED}")
    return conversations
