"""Learn a unigram vocabulary here and by SentencePiece on the same 10 MB of Python's library, and compare.

    pip install sentencepiece
    python -m results.unigram_vocabulary

Both learn 8,000 pieces from the same lines with one thread, after NFKC normalisation and with single spaces.
Printed and written to --out: the CPU seconds of both; the share of SentencePiece's most probable n pieces
that are among our n most probable, for several n; and the tokens that each needs for every 100th line.
"""

import argparse
import io
import json
import platform
import time
from pathlib import Path

from data.corpus import documents, find_files
from data.pipeline import Pipeline
from data.unigram import SPECIAL, train_unigram
from formats import command
from formats.json_file import write_json
from results.peers import require

N_BYTES, N_PIECES = 10_000_000, 8000


def lines() -> list[str]:
    """Return the lines of the first 10 MB of the library, without empty ones and those that are too long."""
    texts, n_bytes = [], 0
    for text in documents(find_files("stdlib", Path("cache"), print), lambda problem: None):
        texts.append(text)
        n_bytes += len(text.encode())
        if n_bytes >= N_BYTES:
            break
    # SentencePiece leaves out lines above 4,192 bytes.
    return [line for text in texts for line in text.split("\n") if line.strip() and len(line.encode()) < 4192]


def theirs(text: list[str]):
    """Return SentencePiece's tokenizer, learned from the lines."""
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=writer,
        vocab_size=N_PIECES,
        model_type="unigram",
        num_threads=1,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    return sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path("results/unigram_vocabulary.json")
    parser.add_argument("--out", type=command.new_file, default=out, help="the figures (default %(default)s)")
    args = parser.parse_args(argv)
    require("sentencepiece")

    # Learn both.
    text = lines()
    began = time.process_time()
    model = theirs(text)
    middle = time.process_time()
    file = train_unigram(text, N_PIECES, lossless=False)
    ended = time.process_time()

    # Compare the pieces, the most probable first.
    first = len(SPECIAL)
    ours = [piece for piece, _ in file["model"]["vocab"][first:]]
    other = [model.id_to_piece(i) for i in range(first, model.get_piece_size())]
    tokenizer, sample = Pipeline(file, SPECIAL[1], {}), text[::100]
    result = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}, one thread, CPU seconds",
        "bytes": sum(len(line.encode()) + 1 for line in text),
        "seconds_here": round(ended - middle, 1),
        "seconds_sentencepiece": round(middle - began, 1),
        "overlap": {
            str(n): round(len({*ours[:n]} & {*other[:n]}) / len(other[:n]), 4)
            for n in (1000, 2000, 4000, len(other))
        },
        "tokens_here": sum(len(tokenizer.encode(line)) for line in sample),
        "tokens_sentencepiece": sum(len(model.encode(line)) for line in sample),
    }
    print(json.dumps(result, indent=2))
    write_json(args.out, result)


if __name__ == "__main__":
    command.run(main)
