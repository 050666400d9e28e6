r"""Files of word vectors, as word2vec's own program writes them and gensim, fastText and others read them.

Both formats begin with a line `V D`, the number of words and of numbers in each vector. Then

    text      a line for each word:   word 0.12 -0.5 ...\n
    binary    for each word:          word, a space, D little-endian float32, and in most files \n

Words are UTF-8 and hold no ASCII white space, which separates them from the numbers. Text is written with as
many digits as a float32 needs, so both formats give back equal vectors. `read` recognises the format by the
first word and its numbers, and unpacks a file named .gz. gensim opens both formats by
`KeyedVectors.load_word2vec_format(path, binary=...)`. The files of its `save` are pickles, which could run
any code, and are not read here: its `save_word2vec_format` writes vectors in these formats.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from formats.atomic import replace_file

TEXT_LINE = re.compile(rb"[^\s]+(?: +[-+.0-9eEinfatyINFATY]+)+ *")  # a word and numbers, maybe too few
LONGEST_WORD = 10_000  # bytes


def write(path: str | Path, words: Sequence[str], vectors: np.ndarray, *, binary: bool = True) -> None:
    """Write words and their vectors (V, D), as float32, to a file that replaces the old one when complete.

    Raises ValueError, before anything is written, for words that could not be read again (an empty one, one
    with white space, one that comes twice), and for vectors that are not finite or not one for each word.
    """
    vectors = np.asarray(vectors, dtype="<f4")
    if vectors.ndim != 2 or len(words) != len(vectors) or not vectors.size:
        raise ValueError(f"vectors of shape {vectors.shape} for {len(words)} words: expected a row for each")
    check_words(path, words)
    check_finite(path, words, vectors)
    with replace_file(Path(path)) as new, open(new, "wb") as file:
        file.write(f"{len(words)} {vectors.shape[1]}\n".encode())
        for word, vector in zip(words, vectors, strict=True):
            numbers = vector.tobytes() if binary else " ".join(map(str, vector)).encode()
            file.write(word.encode() + b" " + numbers + b"\n")


def read(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Return the words and the vectors, float32 (V, D), of a file in either format.

    Raises ValueError naming the file, and the place in it, if it is of another format, ends too early or goes
    on after its last word, and for vectors that are not finite.
    """
    path = Path(path)
    data = content(path)
    end = data.find(b"\n", 0, 100)
    header = re.fullmatch(rb" *(\d{1,12}) +(\d{1,12})\s*", data[: max(end, 0)])
    if not header:
        raise ValueError(
            f"{path}: begins with {data[:40]!r}; expected a line of two numbers, the words and the width of "
            "their vectors (a file of gensim's `save` is another format: use its save_word2vec_format)"
        )
    n, width = int(header[1]), int(header[2])
    stop = data.find(b"\n", end + 1)
    line = data[end + 1 : stop if stop >= 0 else len(data)].rstrip(b"\r")  # the first word, as text
    is_text = TEXT_LINE.fullmatch(line) is not None

    # Compare with the smallest file of this header, so that no memory is taken for numbers that are missing.
    least = n * (2 * width + 1 if is_text else 4 * width + 2)
    if n < 1 or width < 1 or len(data) - end - 1 < least:
        raise ValueError(
            f"{path}: the first line promises {n} words of {width} numbers, at least {least:,} bytes as "
            f"{'text' if is_text else 'binary'}; found {len(data) - end - 1:,}: write or download it again"
        )

    words, vectors = [], np.empty((n, width), np.float32)
    entries = text_entries if is_text else binary_entries
    for i, (word, vector) in enumerate(entries(path, data, end + 1, n, width)):
        try:
            words.append(word.decode())
        except UnicodeDecodeError:
            raise ValueError(f"{path}: word {i + 1} is {word[:40]!r}, which is not UTF-8") from None
        vectors[i] = vector
    check_words(path, words)
    check_finite(path, words, vectors)
    return words, vectors


def content(path: Path) -> bytes:
    """Return the bytes of a file, unpacked if it is named .gz."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected word vectors in word2vec's format")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); download it again") from None


def text_entries(
    path: Path, data: bytes, start: int, n: int, width: int
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yield the words and vectors (D,) of a text, whose first entry begins at byte `start` of data."""
    lines = data[start:].rstrip().split(b"\n")
    if len(lines) != n:
        raise ValueError(f"{path}: {len(lines)} lines behind the first; expected {n}: download it again")
    for i, line in enumerate(lines):
        word, *numbers = line.split()
        if len(numbers) != width:
            raise ValueError(f"{path}: line {i + 2} has {len(numbers)} numbers; expected {width}")
        try:
            with np.errstate(over="ignore"):  # an infinity is found below
                yield word, np.array([float(number) for number in numbers]).astype(np.float32)
        except ValueError:
            raise ValueError(f"{path}: line {i + 2}: {line[:60]!r}: expected a word and numbers") from None


def binary_entries(
    path: Path, data: bytes, start: int, n: int, width: int
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yield the words and vectors (D,) of a binary file, whose first entry begins at byte `start` of data."""
    for i in range(n):
        space = data.find(b" ", start, start + LONGEST_WORD)
        begin, start = start, space + 1 + 4 * width
        if space < 0 or start > len(data):
            raise ValueError(f"{path}: ends within word {i + 1} of {n}, or is damaged: download it again")
        yield data[begin:space].lstrip(b"\n"), np.frombuffer(data, "<f4", width, space + 1)
    if rest := data[start:].strip():
        raise ValueError(f"{path}: {len(rest)} bytes behind the last of {n} words: download it again")


def check_words(path: str | Path, words: Sequence[str]) -> None:
    """Raise ValueError for a word that is empty, too long, has white space or comes twice."""
    seen = set()
    for i, word in enumerate(words):
        # Of bytes, so that only ASCII white space counts: published words may hold a no-break space.
        raw = word.encode()
        if raw.split() != [raw] or len(raw) >= LONGEST_WORD:
            raise ValueError(f"{path}: word {i + 1} is {word[:40]!r}; expected one without white space")
        if word in seen:
            raise ValueError(f"{path}: word {i + 1}, {word[:40]!r}, comes twice; expected each word once")
        seen.add(word)


def check_finite(path: str | Path, words: Sequence[str], vectors: np.ndarray) -> None:
    """Raise ValueError naming the first word whose vector has a NaN or an infinity."""
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise ValueError(f"{path}: the vector of {words[int(finite.argmin())]!r} is not finite")
