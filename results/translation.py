"""How well does a small Transformer translate captions of photos?

    paste train.de train.en > train.tsv                 files of Multi30k; likewise val.tsv and test.tsv
    python -m results.translation --train train.tsv --val val.tsv --test test.tsv \\
        --out results/translation.json

Multi30k (Elliott et al. 2016) has 29,000 captions of photos in English and their translations to German. It
is no part of this project. `train.py --model t5 --task translate` trains for 3,600 steps of 64 pairs, in
about 50 minutes of one core of an Intel Xeon with AMX. The encoder and the decoder have four layers each, of
width 128, with four heads.

Then --test is translated, greedily and with four beams, by the model of the last step and by the one with the
smallest held-out loss. BLEU is measured as by sacreBLEU's defaults, and for comparison that of the
untranslated sources. A picture of the cross attention of the first held-out caption is written beside --out,
as a PNG.

A run in --work that has ended is not repeated, and one that was interrupted is continued. A figure that is in
--out already is not measured again.
"""

import time
from pathlib import Path

from data import text_pairs
from data.tokenizer import get_tokenizer
from formats import command
from formats.atomic import replace_file
from formats.open_model import open_model
from language.overlap import bleu
from language.translate import translations
from results.keep import Ended
from results.training_runs import last_evaluation, trained

FLAGS = ["--model", "t5", "--task", "translate", "--bad-text", "skip", "--eval-every", "400", "--keep-best"]
SIZE = ["--seq-len", "64", "--batch-size", "64"]
SIZE += ["--set", "n_layers=4", "n_heads=4", "d_model=128", "d_ff=512"]
BEAMS = (1, 4)
LONGEST = 100  # the most tokens of a translation


def score(directory: Path, pairs: list[text_pairs.Pair], n_beams: int) -> dict:
    """Return the BLEU of a model's translations of the sources, how many equal their target, how many there
    are, and the seconds that they took."""
    model, tokenizer = open_model(directory).eval(), get_tokenizer(str(directory))
    sources = [[*tokenizer.encode(pair.source), model.config.eos_token_id] for pair in pairs]
    start = time.perf_counter()
    outputs = [tokenizer.decode(output) for output in translations(model, sources, LONGEST, n_beams)]
    seconds, targets = time.perf_counter() - start, [pair.target for pair in pairs]
    same = sum(output == target for output, target in zip(outputs, targets, strict=True))
    return {"bleu": bleu(outputs, targets), "equal": same, "of": len(pairs), "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name, what in (("train", "train on"), ("val", "choose the best step by"), ("test", "score")):
        add(f"--{name}", type=command.path, required=True, help=f"pairs to {what}: source, tab, target")
    add("--out", type=command.new_file, required=True, help="file for the figures")
    work = Path("runs/translation")
    add("--work", type=command.path, default=work, help="folder of the run (default %(default)s)")
    add("--steps", type=command.count, default=3600, help="updates (default %(default)s)")
    args = parser.parse_args(argv)
    pairs = text_pairs.read_pairs(args.test)

    data = ["--data", str(args.train), "--val", str(args.val), "--cache", str(args.work / "cache")]
    last = trained(args.work / "run", *FLAGS, *SIZE, "--steps", str(args.steps), *data)
    figures = last_evaluation(args.work / "run")
    ended = Ended(args.out, {"step": figures["step"], "val_loss": figures["val_loss"]}, same=("val_loss",))
    if not ended.has(model="none"):
        copied = bleu([pair.source for pair in pairs], [pair.target for pair in pairs])
        ended.add({"model": "none", "bleu": copied, "of": len(pairs)})
    for name, directory in (("last step", last), ("best step", last.parent / "best")):
        for n_beams in BEAMS:
            if not ended.has(model=name, beams=n_beams):
                ended.add({"model": name, "beams": n_beams} | score(directory, pairs, n_beams))
                print(ended.rows[-1], flush=True)
    with replace_file(args.out.with_suffix(".png")) as new:
        new.write_bytes((args.work / "run" / "attention.png").read_bytes())


if __name__ == "__main__":
    command.run(main)
