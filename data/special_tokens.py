"""Special tokens: ids that stand for no text, such as [MASK] or the end of a document.

Each has a *name*, by which a text may contain it where that is allowed, and most have a *role*, their use.
Code refers to roles, since names differ: BERT's `sep_token` is "[SEP]", RoBERTa's is "</s>". The
tokenizers of data/tokenizer.py, data/wordpiece.py and data/pipeline.py share this class.
"""

import functools
import itertools
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np

from formats.tokenizer_json import ROLES


class SpecialTokens:
    """The special tokens of a tokenizer: `special_tokens` {name: id} and `roles` {role: name}."""

    special_tokens: dict[str, int]
    roles: dict[str, str]
    n_vocab: int

    @property
    def cls_id(self) -> int:
        return self.role_id("cls_token")

    @property
    def sep_id(self) -> int:
        return self.role_id("sep_token")

    @property
    def mask_id(self) -> int:
        return self.role_id("mask_token")

    @property
    def pad_id(self) -> int:
        return self.role_id("pad_token")

    @functools.cached_property
    def is_special(self) -> np.ndarray:
        """Return (n_vocab,) bool: True for the special tokens."""
        result = np.zeros(self.n_vocab, bool)
        result[list(self.special_tokens.values())] = True
        return result

    def role_id(self, role: str) -> int:
        """Return the id of the token with a role. Raises ValueError if no token has it."""
        if role in self.roles:
            return self.special_tokens[self.roles[role]]
        name = f"{role.removesuffix('_token')} token ({ROLES[role]})"
        raise ValueError(f"this tokenizer has no {name}; use an encoder's, or add it by with_special_tokens")

    def check_roles(self) -> None:
        """Raise ValueError for a role that is unknown, or whose name is not that of a special token."""
        for role, name in self.roles.items():
            if role not in ROLES:
                raise ValueError(f"special tokens have no role {role!r}; there are {', '.join(ROLES)}")
            if name not in self.special_tokens:
                known = f"{len(self.special_tokens)}, such as {list(self.special_tokens)[:6]}"
                raise ValueError(f"{role} {name!r} is no special token; there are {known}")

    def extended(
        self, roles: dict[str, str], names: Iterable[str], vocab: dict[str, int]
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Return (special tokens, roles): those of the tokenizer, and what is added.

        roles: {role: name}, added unless the tokenizer has a token with this role. names: added after these,
        without a role. vocab: {name: id}; a name that is not in it gets the next free id.
        """
        roles, special_tokens = roles | self.roles, dict(self.special_tokens)
        new_ids = itertools.count(self.n_vocab)
        for name in (*roles.values(), *names):
            if name not in special_tokens:
                special_tokens[name] = vocab[name] if name in vocab else next(new_ids)
        return special_tokens, roles

    def allowed(self, allowed_special: set[str] | Literal["all"]) -> set[str]:
        """Return the names that are read as special tokens in a text; "all" is all of them.

        Raises ValueError for a name that is no special token.
        """
        if allowed_special == "all":
            return set(self.special_tokens)
        unknown = set(allowed_special) - set(self.special_tokens)
        if unknown:
            known = f"{len(self.special_tokens)}, such as {list(self.special_tokens)[:6]}"
            raise ValueError(f"no special token {min(unknown)!r}; there are {known}")
        return set(allowed_special)


def split_at(names: set[str], text: str) -> list[str]:
    """Return a text cut at these names: [text, name, text, ..., name, text].

    Where several names begin at one place, the longest is found.
    """
    if not names:
        return [text]
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
