"""DALL-E 2 in small: letters drawn from their names, by way of an image embedding or without it.

    python -m results.unclip --out results/unclip.json

Three runs of train.py: a CLIP of letters and their names (`--model clip`), a prior that draws image
embeddings for names (`--model prior`), and a decoder that draws letters of 16 x 16 pixels from image
embeddings (`--model unclip`). They are evaluated at the first and the last step alone, which saves time and
does not change the weights. Then the 130 held-out letters are drawn, with guidance 1 and 2 of the decoder,
from

    its own      the embedding of the true image, which shows what the decoder can do
    the prior's  the embedding that the prior draws for the name
    its text's   the embedding of the name itself, without a prior
    another's    the embedding of another image, as a control

Measured are the shares of drawings whose character and whose style a classifier of real letters recognises
(vision/judge.py), also of the real letters, and the mean squared difference of pixels in [0, 1] to these.

Every run is one of train.py in --work, and is not repeated if it is there. The figures are written to --out
after each seed, and those in it are kept. When the first seed is measured, a picture is drawn beside --out:
the letters as above with guidance 2, and variations of one letter.
"""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine import pictures
from formats import command
from results.keep import Ended
from results.training_runs import run, seconds
from vision import embedding_to_image, image_embeddings, judge
from vision.unclip import UnCLIP

SHOWN = 12  # letters of the picture
PICTURED = ("real", "its own, w = 2", "the prior's, w = 2", "its text's, w = 2", "another's, w = 2")


def measure(work: Path, seed: int, steps: dict[str, int]) -> tuple[dict, list[list[Tensor]]]:
    """Return the figures of one seed, and rows of images for the picture.

    steps: updates of clip, prior and unclip.
    """
    outs = {name: work / f"{name}-{seed}" for name in steps}
    clip, cache = str(outs["clip"] / "model"), ["--cache", str(work / "cache")]
    found: dict = {}
    for name, out in outs.items():
        data = ["--data", "glyphs"] if name == "clip" else ["--set", f"clip={clip}"]
        flags = ["--steps", str(steps[name]), "--eval-every", str(steps[name]), *cache]
        last = run(out, seed, "--model", name, *data, *flags)
        found[name] = {"steps": steps[name], "minutes": seconds(out) / 60, "val_loss": last["val_loss"]}

    # What is drawn from each embedding, and what the judge recognises.
    model = UnCLIP.from_pretrained(outs["unclip"] / "model").float().eval()
    model.config = replace(model.config, clip=clip)
    module = embedding_to_image.wrap(model, model.config)
    options = Namespace(data="glyphs", val=None, bad_text="refuse", cache=work / "cache")
    dataset = embedding_to_image.load_data(options, model.config)
    texts = [texts[0] for texts in dataset.val.part.captions]
    prior = image_embeddings.open_prior(str(outs["prior"] / "model"), clip)
    chosen, rows = embedding_to_image.compare(
        module, dataset, image_embeddings.of_texts(prior, texts, w=1.0, seed=0)
    )
    opinion = judge.of(dataset.small)
    for name, images in rows.items():
        error = (images - rows["real"]).square().mean().item()
        found[name] = opinion.rights(images, chosen) | {"squared error": error}

    # The picture: the same letters in each row, and then the first of them with other noise.
    places = [i * len(chosen) // SHOWN for i in range(SHOWN)]
    shown = [[rows[name][i] for i in places] for name in PICTURED]
    first = torch.from_numpy(dataset.val[chosen[0]]["image"])[None].float() / 255
    shown.append(list(model.draw(module.embed_images(first).expand(SHOWN, -1), guidance=2.0, seed=1)))
    return found, shown


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures, which ends in .json")
    add("--work", type=command.path, default=Path("runs/unclip"), help="folder of runs (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    defaults = {
        "clip": image_embeddings.CLIP_STEPS,
        "prior": image_embeddings.STEPS,
        "unclip": embedding_to_image.STEPS,
    }
    for name, steps in defaults.items():
        add(
            f"--{name}-steps",
            type=command.count,
            default=steps,
            help=f"updates of {name} (default %(default)s)",
        )
    args = parser.parse_args(argv)

    steps = {name: getattr(args, f"{name}_steps") for name in defaults}
    about = {"steps": steps, "threads": torch.get_num_threads()}
    ended = Ended(args.out, about, same=("steps",))
    for seed in args.seeds:
        if not ended.has(seed=seed):
            found, shown = measure(args.work, seed, steps)
            ended.add({"seed": seed} | found)
            if seed == args.seeds[0]:
                labels = (*PICTURED, "variations")
                pictures.save(args.out.parent, shown, labels=labels, name=f"{args.out.stem}.png")


if __name__ == "__main__":
    command.run(main)
