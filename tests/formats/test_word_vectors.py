"""formats/word_vectors.py: files go to gensim and come back equal, and damaged ones are refused by name."""

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import word_vectors

WORDS = ["self", "naïve", "10\u00a0km", "a-b.c", "中文"]  # one has a no-break space, which is not ASCII
VECTORS = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
VECTORS[0, :4] = [0.1, -1e-38, 3.4e38, 1e-45]  # the smallest and the largest float32
BOTH = pytest.mark.parametrize("binary", [True, False])


@pytest.fixture
def keyed():
    return pytest.importorskip("gensim.models").KeyedVectors


@BOTH
def test_what_is_written_is_read_again_to_the_bit(binary, tmp_path):
    word_vectors.write(tmp_path / "v", WORDS, VECTORS, binary=binary)
    words, vectors = word_vectors.read(tmp_path / "v")
    assert words == WORDS and vectors.dtype == np.float32 and np.array_equal(vectors, VECTORS)
    (tmp_path / "v.gz").write_bytes(gzip.compress((tmp_path / "v").read_bytes()))
    assert np.array_equal(word_vectors.read(tmp_path / "v.gz")[1], VECTORS)


@BOTH
def test_gensim_opens_what_is_written_here(binary, keyed, tmp_path):
    word_vectors.write(tmp_path / "v", WORDS, VECTORS, binary=binary)
    theirs = keyed.load_word2vec_format(str(tmp_path / "v"), binary=binary)
    assert theirs.index_to_key == WORDS and np.array_equal(theirs.vectors, VECTORS)


@BOTH
def test_what_gensim_writes_is_opened_here(binary, keyed, tmp_path):
    theirs = keyed(7)
    theirs.add_vectors(WORDS, VECTORS)
    theirs.save_word2vec_format(str(tmp_path / "v"), binary=binary)
    words, vectors = word_vectors.read(tmp_path / "v")
    assert words == theirs.index_to_key and np.array_equal(vectors, theirs.vectors)


def test_the_formats_are_laid_out_as_word2vecs_own_program_writes_them(tmp_path):
    # By hand: its fprintf("%s ", word), then fwrite of the floats or "%lf " of each, then "\n".
    binary = (
        b"2 2\nab "
        + np.array([1, 2], "<f4").tobytes()
        + b"\ncd "
        + np.array([3, -4], "<f4").tobytes()
        + b"\n"
    )
    text = b"2 2\nab 1.000000 2.000000 \ncd 3.000000 -4.000000 \n"
    for data in (binary, text, text.replace(b"\n", b"\r\n"), text.rstrip()):
        (tmp_path / "v").write_bytes(data)
        words, vectors = word_vectors.read(tmp_path / "v")
        assert words == ["ab", "cd"] and vectors.tolist() == [[1, 2], [3, -4]]
    word_vectors.write(tmp_path / "own", words, vectors)
    assert (tmp_path / "own").read_bytes() == binary


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with b''; expected a line of two numbers"),
        (b"\x80\x04\x95gensim", "save_word2vec_format"),
        (b"two three\nab 1 2\n", "expected a line of two numbers"),
        (b"0 2\n", "promises 0 words"),
        (b"999999999999 999999999999\nab 1 2\n", "promises 999999999999 words"),
        (b"2 2\nab 1 2\n", "promises 2 words of 2 numbers, at least 10 bytes as text; found 7"),
        (b"2 2\nab 1.5 2.5\n", "1 lines behind the first; expected 2"),
        (b"2 2\nab 1.5 2.5\ncd 3.5\n", "line 3 has 1 numbers; expected 2"),
        (b"2 2\nab 1 2\ncd 3 x\n", "line 3: b'cd 3 x': expected a word and numbers"),
        (b"2 2\nab 1 2\nab 3 4\n", "word 2, 'ab', comes twice"),
        (b"2 2\nab 1 2\ncd 3 nan\n", "the vector of 'cd' is not finite"),
        (b"2 2\nab 1 2\ncd 3 1e39\n", "the vector of 'cd' is not finite"),
        (b"2 2\nab 1 2\n\xff 3 4\n", "word 2 is b'\\xff', which is not UTF-8"),
        (b"1 1\nab \0\0\0\0\nmore", "4 bytes behind the last of 1 words"),
        (b"1 1\nab\0\0\0\0\0\0", "ends within word 1 of 1"),
        (b"2 1\nab \0\0\0\0cd \0\0\0", "ends within word 2 of 2"),
        (b"2 1\nabcd \0\0\0\0 \0\0\0\0", "word 2 is ''; expected one without white space"),
    ],
)
def test_a_damaged_file_is_refused_by_name(data, message, tmp_path):
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(ValueError) as error:
        word_vectors.read(tmp_path / "damaged")
    assert str(error.value).startswith(str(tmp_path / "damaged")) and message in str(error.value)


def test_a_missing_file_and_a_cut_gz_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        word_vectors.read(tmp_path / "missing")
    word_vectors.write(tmp_path / "v", WORDS, VECTORS)
    packed = gzip.compress((tmp_path / "v").read_bytes())
    for data in (packed[:-20], b"no gz", packed[:30] + b"\xff" * 9 + packed[39:]):
        (tmp_path / "v.gz").write_bytes(data)
        with pytest.raises(ValueError, match=r"v\.gz: damaged"):
            word_vectors.read(tmp_path / "v.gz")


@pytest.mark.parametrize("words", [["a", ""], ["a", "b c"], ["a", "a"], ["a", "b\n"], ["a"]])
def test_words_that_could_not_be_read_again_are_not_written(words, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        word_vectors.write(tmp_path / "v", words, np.zeros((2, 3)))
    assert not list(tmp_path.iterdir())


@settings(max_examples=150, deadline=None)
@given(data=st.data(), binary=st.booleans())
def test_a_cut_or_changed_file_is_refused_or_has_other_numbers(data, binary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    word_vectors.write(folder / "v", WORDS, VECTORS, binary=binary)
    whole = (folder / "v").read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)), label="length")])
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, 255)), max_size=3)
    ):
        damaged[place : place + 1] = bytes([byte])
    (folder / "v").write_bytes(damaged)
    # A ValueError that names the file, or else as many words and numbers as its first line says.
    try:
        words, vectors = word_vectors.read(folder / "v")
    except ValueError as error:
        assert str(folder / "v") in str(error)
    else:
        assert vectors.shape == (len(words), int(bytes(damaged).split(b"\n")[0].split()[1]))
        assert np.isfinite(vectors).all()
        if binary and len(damaged) < len(whole) - 1:  # no cut file passes for one with fewer words
            assert bytes(damaged)[:4] != whole[:4]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"", b"1 1\n", b"2 2\n", b"3 1\n"]))
def test_garbage_is_refused_by_name(garbage, header):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "v")
        path.write_bytes(header + garbage)
        try:
            word_vectors.read(path)
        except ValueError as error:
            assert str(path) in str(error)
