"""Gap sentences: whole sentences of a document are masked, and the model writes them (PEGASUS, Zhang et al.
2019, arXiv:1912.08777). The masked sentences are those that are most like the rest of the document, so that
together they resemble a summary.

    document  Dogs run. The grass is wet. Dogs run in the wet grass. Nobody came.
    input     Dogs run. The grass is wet. <mask_1> Nobody came.
    target    Dogs run in the wet grass.

A sentence is scored by ROUGE-1 F1 between it and the rest of its document (language/overlap.py), each on its
own, and with repeated words counted as often as they occur ("Ind-Orig", section 3.1). The best 30 % are the
gaps. All of them are in the target, in the order of the document. In the input nine of ten become a mask, as
in the authors' code; the others stay, so that the model also learns to copy.

By default the documents are functions of Python's standard library, and no sentence is scored: the gap is the
first sentence of the docstring, which sums up the function. The rest of the docstring is left out.

    python -m language.pegasus                                 the gaps of a document
    python train.py --model t5 --task pegasus                  write what a function does, from its code
    python train.py --model t5 --task pegasus --data FOLDER    gap sentences of documents
"""

import re
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, nn

from data import text_pairs
from data.corpus import documents, find_files
from data.docstrings import stdlib_functions
from data.rows import Dataset
from data.text import bad_texts, bpe_size
from data.text_pairs import Pair
from data.tokenizer import get_tokenizer, train_bpe
from engine.settings import with_fields
from formats import command
from language.beam_search import longest_output
from language.overlap import f1, rouge_1, words

MODEL = "t5"
OPTIMIZER, STEPS = "muon", 2500
MASK = "<mask_1>"
N_SHOWN, N_SCORED = 5, 100  # held-out documents
make_batch = text_pairs.make_batch


@dataclass(frozen=True)
class Config:
    gap_rate: float = 0.3  # share of a document's sentences
    keep_rate: float = 0.1  # share of the gaps that stay in the input

    def __post_init__(self):
        for name in ("gap_rate", "keep_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 1")


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text. One ends at . ! or ? before white space, or at a blank line."""
    parts = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def scores(sentences: list[str]) -> list[float]:
    """Return the ROUGE-1 F1 of each sentence, compared with all others of the document together."""
    counts = [Counter(words(sentence)) for sentence in sentences]
    document = sum(counts, Counter())
    n_words = document.total()
    return [f1((own & (document - own)).total(), own.total(), n_words - own.total()) for own in counts]


def gap_sentences(sentences: list[str], rate: float = 0.3) -> list[int]:
    """Return the numbers, ascending, of the best sentences by `scores`: the share `rate`, at least one."""
    found = scores(sentences)
    order = sorted(range(len(sentences)), key=lambda i: -found[i])
    return sorted(order[: max(1, round(rate * len(sentences)))])


def gap_pair(sentences: list[str], generator: Generator, config: Config) -> Pair:
    """Return the input and the target of a document: gaps become MASK in the input, or stay (keep_rate)."""
    gaps = gap_sentences(sentences, config.gap_rate)
    draws = torch.rand(len(sentences), generator=generator).tolist()
    masked = {i for i in gaps if draws[i] >= config.keep_rate}
    shown = [MASK if i in masked else sentence for i, sentence in enumerate(sentences)]
    return Pair(" ".join(shown), " ".join(sentences[i] for i in gaps))


# --- the task


def settings(model_config) -> Config:
    """Return the default settings, for any model."""
    return Config()


def document_pairs(data: str, cache: Path, bad_text: str, text_field: str, config: Config) -> list[Pair]:
    """Return the pairs of the documents that --data names. Those of fewer than 3 sentences are left out.

    Raises ValueError if fewer than 2 pairs are left.
    """
    generator, pairs = torch.Generator().manual_seed(0), []
    with bad_texts(f"--data {data}", bad_text, print) as on_bad_text:
        for text in documents(find_files(data, cache), on_bad_text, text_field):
            sentences = sentences_of(text)
            if len(sentences) >= 3:
                pairs.append(gap_pair(sentences, generator, config))
    if len(pairs) < 2:
        raise ValueError(f"--data {data}: {len(pairs)} documents of 3 sentences or more; expected at least 2")
    return pairs


def load_data(args: Namespace, model_config) -> Dataset:
    """Return the pairs of --data, the last twentieth held out; by default functions and their summaries.

    Inputs are cut to --seq-len tokens. Raises ValueError for --document-mask.
    """
    if args.document_mask:
        raise ValueError("--document-mask: an input and its target are one document; leave it out")
    if args.data == "stdlib":
        functions = stdlib_functions()
        train, held_out = ([Pair(f"{MASK} {one.source}", one.summary) for one in side] for side in functions)
    else:
        config = with_fields(Config(), args.set)
        pairs = document_pairs(args.data, args.cache, args.bad_text, args.text_field, config)
        n = max(1, len(pairs) // 20)
        train, held_out = pairs[:-n], pairs[-n:]
    size = bpe_size(args.tokenizer)
    texts = [text for pair in train for text in pair]
    tokenizer = get_tokenizer(args.tokenizer) if size is None else train_bpe(texts, size)
    tokenizer = tokenizer.with_special_tokens({"pad_token": "<pad>"}, [MASK])
    return text_pairs.as_dataset(
        train, held_out, tokenizer, args.seq_len, cut=True, special=frozenset([MASK])
    )


def trivial(source: str) -> str:
    """Return a summary without a model: the words in a function's name, or the first sentence of a text."""
    name = re.match(rf"(?:{MASK} )?(?:async )?def (\w+)", source)
    if name is None:
        return next((s for s in sentences_of(source.replace(MASK, " ")) if words(s)), "")
    return re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", name[1])


@torch.no_grad()
def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Return the mean ROUGE-1 F1 of outputs for 100 held-out documents, beside that of `trivial` summaries,
    and the first outputs."""
    tokenizer, val = dataset.tokenizer, dataset.val
    pairs = [text_pairs.sides_of(val[i]) for i in range(min(N_SCORED, len(val)))]
    longest = longest_output(model, max(len(target) for _, target in pairs) + 8)
    written = []
    for start in range(0, len(pairs), 32):
        outputs = model.generate([source for source, _ in pairs[start : start + 32]], longest, temperature=0)
        written += [tokenizer.decode(t for t in output if t != tokenizer.eot_id) for output in outputs]
    sources, targets = ([tokenizer.decode(side[:-1]) for side in both] for both in zip(*pairs, strict=True))
    means = [
        sum(map(rouge_1, texts, targets)) / len(targets) for texts in (written, list(map(trivial, sources)))
    ]
    lines = [
        f"ROUGE-1 {100 * means[0]:.1f} of {len(targets)} held-out documents; the name of the function, or "
        f"the first sentence: {100 * means[1]:.1f}"
    ]
    for source, text, target in list(zip(sources, written, targets, strict=True))[:N_SHOWN]:
        first = source.removeprefix(f"{MASK} ").splitlines()[0]
        lines += ["", f"{first:.100}", f"    {text}", f"    was {target}"]
    return "\n".join(lines)


def main() -> None:
    text = "Dogs run. It rained all day. Dogs run in the wet grass. Nobody came. The grass is green."
    sentences = sentences_of(text)
    gaps = gap_sentences(sentences)
    for i, (sentence, score) in enumerate(zip(sentences, scores(sentences), strict=True)):
        print(f"{score:.2f} {'gap' if i in gaps else '   '}  {sentence}")
    source, target = gap_pair(sentences, torch.Generator().manual_seed(0), Config())
    print(f"\ninput   {source}\ntarget  {target}")


if __name__ == "__main__":
    command.run(main)
