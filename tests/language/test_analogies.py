"""language/analogies.py: 3CosAdd and its control, written out; the files of questions; the command."""

import gzip

import numpy as np
import pytest
from conftest import run_command

from formats import word_vectors
from language.analogies import PAIRS, accuracy, all_questions, neighbours, read_questions

WORDS = [f"w{i}" for i in range(30)]
VECTORS = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)


def answer(a: int, b: int, c: int, control: bool = False) -> int:
    """Return the answer of the equation, in float64, word by word."""
    unit = [v / np.linalg.norm(v) for v in VECTORS.astype(np.float64)]
    target = unit[c] if control else unit[b] - unit[a] + unit[c]
    cosines = [unit[d] @ target / np.linalg.norm(target) if d not in (a, b, c) else -2 for d in range(30)]
    return int(np.argmax(cosines))


def test_the_answers_are_those_of_the_equation_and_never_a_word_of_the_question():
    generator = np.random.default_rng(1)
    triples = [generator.choice(30, 3, replace=False) for _ in range(40)]
    right = [tuple(WORDS[i] for i in (*triple, answer(*triple))) for triple in triples]
    control = [tuple(WORDS[i] for i in (*triple, answer(*triple, control=True))) for triple in triples]
    found = accuracy(WORDS, VECTORS, right)
    both = sum(x == y for x, y in zip(right, control, strict=True)) / 40
    assert found.right == 1 and found.control == pytest.approx(both) and 0 < both < 1
    assert accuracy(WORDS, VECTORS, control).control == 1
    for i, (a, b, c, _) in enumerate(right):
        assert accuracy(WORDS, VECTORS, [(a, b, c, (a, b, c)[i % 3])]).right == 0


def test_lengths_do_not_matter():
    scaled = VECTORS * np.random.default_rng(2).uniform(0.1, 10, (30, 1)).astype(np.float32)
    questions = all_questions([(WORDS[i], WORDS[i + 1]) for i in range(0, 20, 2)])
    assert accuracy(WORDS, VECTORS, questions) == accuracy(WORDS, scaled, questions)


def test_gensim_counts_the_same_questions_as_right(tmp_path):
    models = pytest.importorskip("gensim.models")
    generator = np.random.default_rng(3)
    rows = [[WORDS[i] for i in generator.choice(30, 4, replace=False)] for _ in range(60)]
    for row in rows[:30]:  # half of them right
        row[3] = WORDS[answer(*(WORDS.index(word) for word in row[:3]))]
    (tmp_path / "q.txt").write_text(": random\n" + "\n".join(map(" ".join, rows)) + "\nw1 w2 w3 unknown\n")
    peer = models.KeyedVectors(4)
    peer.add_vectors(WORDS, VECTORS)
    theirs, _ = peer.evaluate_word_analogies(str(tmp_path / "q.txt"))
    found = accuracy(WORDS, VECTORS, read_questions(tmp_path / "q.txt")["random"])
    assert found.right == pytest.approx(theirs) and (found.n, found.n_unknown) == (60, 1)
    assert neighbours(WORDS, VECTORS, "w5", 6) == [word for word, _ in peer.most_similar("w5", topn=6)]


def test_questions_are_read_by_section(tmp_path):
    content = ": one\na b c d\nE f g h\n: two words\n\ni j k l\n"
    (tmp_path / "q.txt").write_text(content)
    (tmp_path / "q.txt.gz").write_bytes(gzip.compress(content.encode()))
    expected = {"one": [("a", "b", "c", "d"), ("E", "f", "g", "h")], "two words": [("i", "j", "k", "l")]}
    assert read_questions(tmp_path / "q.txt") == read_questions(tmp_path / "q.txt.gz") == expected


@pytest.mark.parametrize("content", ["a b c d\n", ": one\na b c\n", ": one\n", "", b"\xff\xfe\n"])
def test_files_without_questions_are_refused_by_name(content, tmp_path):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "q.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"q\.txt: "):
        read_questions(tmp_path / "q.txt")


def test_no_word_is_in_two_pairs_of_a_section():
    for pairs in PAIRS.values():
        words = [word for pair in pairs for word in pair]
        assert len(set(words)) == len(words)
    assert len(all_questions(PAIRS["plural"])) == 35 * 34


def test_the_command_prints_a_table_and_neighbours(tmp_path):
    path = tmp_path / "v.txt"
    word_vectors.write(path, ["file", "files", "name", "names", "x"], VECTORS[:5], binary=False)
    ended = run_command("-m", "language.analogies", str(path))
    assert ended.code == 0 and "plural" in ended.out and "1,188" in ended.out  # two questions are asked
    ended = run_command(
        "-m", "language.analogies", str(path), "--near", "file", "--solve", "file", "files", "name"
    )
    assert ended.code == 0 and "3CosAdd" in ended.out and ended.out.startswith("file ")
    # Of three words none is left to answer a question about two of them but the third.
    word_vectors.write(path, WORDS[:3], VECTORS[:3])
    ended = run_command("-m", "language.analogies", str(path), "--solve", "w0", "w1", "w0")
    assert ended.code == 0 and ended.out.split() == ["3CosAdd", "w2", "c", "alone", "w2"]
    word_vectors.write(path, WORDS[:2], VECTORS[:2])
    ended = run_command("-m", "language.analogies", str(path), "--solve", "w0", "w1", "w0")
    assert ended.code == 0 and ended.out.split() == ["3CosAdd", "c", "alone"]
    ended = run_command("-m", "language.analogies", str(path), "--near", "missing")
    assert ended.code == 2 and "'missing' has no vector" in ended.err
