"""language/windows.py: which words are kept, and which are in a window."""

import pytest
import torch
from torch import Generator

from language.noise import Noise
from language.windows import batches, centres_of, keep_probability


def test_frequent_words_are_kept_with_the_probability_of_the_authors_code():
    counts = torch.tensor([50_000, 10_000, 5_000, 2_618, 932_382])
    kept = keep_probability(counts, 1e-3)
    assert kept[:3].tolist() == pytest.approx([0.1614, 0.4162, 0.6472], abs=5e-5)
    assert kept[3].item() == pytest.approx(1, abs=1e-4)  # the golden ratio squared times t


def test_no_window_leaves_its_document_and_every_word_is_in_one_block():
    noise, generator = Noise(torch.ones(3), 1.0), Generator().manual_seed(0)
    # Numbers in the place of words: a pair shows which places it joins.
    places, documents = torch.arange(203), torch.arange(203) // 23
    centres = []
    for batch in batches(places, documents, noise, 4, 16, generator):
        own = centres_of(batch)
        N, L, S = batch.mask.shape
        i, j = own[:, :, None].expand(N, L, S), batch.spans[:, None].expand(N, L, S)
        i, j = i[batch.mask > 0], j[batch.mask > 0]
        assert (
            (documents[i] == documents[j]).all() and ((i - j).abs() >= 1).all() and ((i - j).abs() <= 4).all()
        )
        centres.append(own[batch.mask.any(-1)])
    # Each document has several words, and so each word a neighbour.
    assert torch.cat(centres).sort().values.tolist() == list(range(203))
