"""Analogies of word vectors, and a control that shows how many answers need the arithmetic.

"a is to b as c is to ...?" is answered by the word d whose vector is nearest by cosine, with all vectors of
length 1, to

    b - a + c          3CosAdd (Mikolov et al. 2013a, 1301.3781; named by Levy and Goldberg 2014)
    c                  the control, which ignores a and b (Linzen 2016, 1606.07736)

The three words of the question are excluded from the answers; otherwise the answer is mostly c itself. Even
so the nearest word to c is often d: `files` is near `file`, whatever a and b are. So only the difference
between the two accuracies is due to the arithmetic. Questions with a word that has no vector are left out,
and counted.

    python -m language.analogies VECTORS                              the pairs below, on source text
    python -m language.analogies VECTORS --questions questions-words.txt
    python -m language.analogies VECTORS --near encode json           neighbours
    python -m language.analogies VECTORS --solve file files name      one question

Shapes: V words, D width, Q questions.
"""

import gzip
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats import command, word_vectors

Question = tuple[str, str, str, str]

# The nouns of Python's library, abbreviations aside, whose singular and plural both occur at least 250 times,
# and those of 150 to 250 times. Words that are mainly verbs or adjectives, such as calls, are left out.
NOUNS = """
option line name file value error item key argument header method type object flag module string warning
part result attribute field window event parameter function character path byte command extension
exception node handler content element
"""
RARER = """
number word member package variable sequence bit group instance task action filename future pair cookie
chunk thread tuple tag keyword script token block
"""
OPPOSITES = """
get:set open:close start:stop first:last left:right up:down in:out read:write add:remove true:false
min:max before:after old:new encode:decode encoder:decoder input:output source:target enter:exit push:pop
load:dump send:recv lower:upper width:height top:bottom head:tail row:column key:value client:server
parent:child public:private success:failure pass:fail high:low long:short int:float
more:less positive:negative internal:external insert:delete acquire:release request:response stdin:stdout
prefix:suffix global:local forward:backward absolute:relative pack:unpack register:unregister above:below
"""
PARTICIPLES = """
encode:encoding map:mapping run:running read:reading write:writing match:matching parse:parsing
call:calling contain:containing include:including set:setting close:closing start:starting
process:processing return:returning debug:debugging create:creating handle:handling wait:waiting
check:checking add:adding
"""
PAIRS = {
    "plural": [(noun, f"{noun}s") for noun in NOUNS.split()],
    "rarer plural": [(noun, f"{noun}s") for noun in RARER.split()],
    "opposite": [tuple(pair.split(":")) for pair in OPPOSITES.split()],
    "-ing": [tuple(pair.split(":")) for pair in PARTICIPLES.split()],
}


class Accuracy(NamedTuple):
    """The shares of questions whose answer is right."""

    right: float  # by 3CosAdd
    control: float  # by the nearest word to c
    n: int  # questions of which all words have a vector
    n_unknown: int  # the other questions, which are left out


def all_questions(pairs: Iterable[tuple[str, str]]) -> list[Question]:
    """Return a question (a, b, c, d) for each ordered choice of two different pairs (a, b) and (c, d)."""
    return [(*one, *other) for one, other in permutations(pairs, 2)]


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Return the questions of each section of a file like questions-words.txt, which is unpacked if its name
    ends in .gz.

    A section begins with `: name`; each other line has four words. Raises ValueError naming a line that is
    neither, and for a file without questions.
    """
    sections: dict[str, list[Question]] = {}
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for i, line in enumerate(file, 1):
                words = line.split()
                if line.startswith(":"):
                    found = sections.setdefault(line[1:].strip(), [])
                elif len(words) == 4 and sections:
                    found.append(tuple(words))
                elif words:
                    raise ValueError(
                        f"line {i}: {line[:60]!r}; expected ': section' or four words behind one"
                    )
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    if not any(sections.values()):
        raise ValueError(f"{path}: no question; expected sections of lines with four words")
    return sections


def unit(vectors: np.ndarray | Tensor) -> Tensor:
    """Return vectors (V, D) at length 1; those of length 0 stay so."""
    vectors = torch.as_tensor(vectors, dtype=torch.float32)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)


def nearest(vectors: Tensor, targets: Tensor, excluded: Tensor, n: int = 1) -> Tensor:
    """Return the n words, int64 (Q, n), whose unit vectors (V, D) are nearest by cosine to targets (Q, D).

    excluded: int64 (Q, any), words that must not be answers.
    """
    found = []
    for some, out in zip(targets.split(512), excluded.split(512), strict=True):
        scores = (some @ vectors.T).scatter_(1, out, -torch.inf)
        found.append(scores.topk(n, 1).indices)
    return torch.cat(found)


def accuracy(words: Sequence[str], vectors: np.ndarray | Tensor, questions: Sequence[Question]) -> Accuracy:
    """Return the shares of questions (a, b, c, d) to which 3CosAdd and the control answer d.

    vectors: (V, D), of the V words. A word that has no vector as it is written is looked up in lower case.
    Without a question both shares are NaN.
    """
    index = {word: i for i, word in enumerate(words)}
    known = [[index.get(w, index.get(w.lower())) for w in question] for question in questions]
    asked = torch.tensor([row for row in known if None not in row], dtype=torch.int64).view(-1, 4)
    if not len(asked):
        return Accuracy(np.nan, np.nan, 0, len(known))
    v = unit(vectors)
    a, b, c = (v[asked[:, i]] for i in range(3))
    right, control = (
        (nearest(v, target, asked[:, :3])[:, 0] == asked[:, 3]).float().mean().item()
        for target in (b - a + c, c)
    )
    return Accuracy(right, control, len(asked), len(known) - len(asked))


def neighbours(words: Sequence[str], vectors: np.ndarray | Tensor, word: str, n: int = 8) -> list[str]:
    """Return the n words whose vectors are nearest to that of a word by cosine.

    Raises ValueError for a word without a vector.
    """
    i = torch.tensor([[number_of(words, word)]])
    v = unit(vectors)
    return [words[j] for j in nearest(v, v[i[0]], i, min(n, len(words) - 1))[0]]


def number_of(words: Sequence[str], word: str) -> int:
    """Return the place of a word among the words. Raises ValueError if it is not there."""
    if word not in words:
        raise ValueError(f"{word!r} has no vector; expected one of {len(words)} words, such as {words[0]!r}")
    return words.index(word)


def table(words: Sequence[str], vectors: np.ndarray | Tensor, sections: dict[str, list[Question]]) -> str:
    """Return a line of text for each section: the accuracies of 3CosAdd and of the control."""
    lines = [f"{'analogies':24} {'3CosAdd':>8} {'c alone':>8} {'asked':>7} {'unknown':>8}"]
    for name, questions in sections.items():
        found = accuracy(words, vectors, questions)
        shares = f"{found.right:8.1%} {found.control:8.1%}" if found.n else f"{'-':>8} {'-':>8}"
        lines.append(f"{name:24} {shares} {found.n:7,} {found.n_unknown:8,}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Analogies and neighbours of word vectors.")
    add = parser.add_argument
    add("vectors", type=command.path, help="a file in word2vec's text or binary format")
    add(
        "--questions",
        type=command.path,
        help="a file like questions-words.txt (default: pairs of source text)",
    )
    add("--near", nargs="+", metavar="WORD", help="print the nearest words of each instead")
    add("--solve", nargs=3, metavar=("A", "B", "C"), help="print the nearest words to B - A + C instead")
    args = parser.parse_args(argv)
    sections = {name: all_questions(pairs) for name, pairs in PAIRS.items()}
    if args.questions:
        sections = read_questions(args.questions)
    words, vectors = word_vectors.read(args.vectors)
    for word in args.near or ():
        print(f"{word:12} {' '.join(neighbours(words, vectors, word))}")
    if args.solve:
        v, asked = unit(vectors), torch.tensor([[number_of(words, word) for word in args.solve]])
        a, b, c = v[asked[0]]
        n = min(8, len(words) - len(set(args.solve)))  # of few words fewer are left
        for name, target in (("3CosAdd", b - a + c), ("c alone", c)):
            print(f"{name:12} {' '.join(words[i] for i in nearest(v, target[None], asked, n)[0])}")
    if not args.near and not args.solve:
        print(table(words, vectors, sections))


if __name__ == "__main__":
    command.run(main)
