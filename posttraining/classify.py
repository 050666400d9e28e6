"""Text classification: a pretrained encoder is fine-tuned to label texts.

    p(label | text) = softmax(W tanh(P h_[CLS]) + b)            h and the pooler P from a pretrained encoder

BERT's recipe (Devlin et al. 2018, section 3.2): a new layer W on top, and all weights trained for a few
epochs at a small learning rate. The lower layers hold what is common to all texts and should move less. So
each layer may learn at a smaller rate than the one above it (`--layer-decay`; ULMFiT, Howard and Ruder 2018,
section 3.2, divides by 2.6), or stay frozen until those above have settled (`--unfreeze gradual`, section
3.3: one layer more each epoch, from the top). The rate rises for a tenth of the steps and falls for the rest,
ULMFiT's slanted triangle.

This file has its own loop and does not use train.py, since layers are unfrozen and held-out texts are scored
by epochs, not by steps. A run takes minutes, so it cannot be resumed.

    python -m posttraining.classify --data reviews.jsonl --init-from runs/bert/model       train
    python -m posttraining.classify runs/classify/model --text "a waste of two hours"      classify a text

The run leaves, in --out, model/ (opens with AutoModelForSequenceClassification), metrics.jsonl, and
report.txt, which sets the accuracy on held-out texts beside that of simple guesses.

Shapes: n texts of a batch, N their tokens in all, D model width, L layers.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import BERT, Config, dense_and_norm, initialize
from data.labelled import hold_out, read_examples
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import command, encoders, json_file, safetensors_dir
from formats.atomic import replace_directory, replace_file
from formats.progress import progress_bar
from language.encoder_inference import pack
from posttraining import naive_bayes


def is_head(name: str) -> bool:
    """Return whether a tensor, under our name, belongs to the heads above the encoder."""
    return not name.startswith("bert.") or name.startswith("bert.pooler.")


def read_labels(directory: str | Path, weights: dict[str, Tensor]) -> list[str] | None:
    """Return the labels of the text classifier in directory, whose weights these are; None if it is none.

    Raises ValueError for a classifier whose logits mean something else than in `Classifier`.
    """
    # Classifiers of tokens have tensors of the same names, but another architecture.
    path = Path(directory) / "config.json"
    hf = json_file.read_json(path)
    architecture = (hf.get("architectures") or ["none"])[0]
    if not architecture.endswith("ForSequenceClassification") or "classifier.bias" not in weights:
        return None

    # Its logits: one label for each text, from the summary that we compute.
    ours = {"problem_type": (None, "single_label_classification")}
    if hf["model_type"] == "modernbert":
        ours["classifier_pooling"] = ("mean",)
    for key, values in ours.items():
        if hf.get(key) not in values:
            raise ValueError(f"{path}: {key} {hf.get(key)!r} is not implemented; expected {values[-1]!r}")

    # The names of its labels, by default those that transformers gives.
    n = len(weights["classifier.bias"])
    names = hf.get("id2label") or {str(i): f"LABEL_{i}" for i in range(n)}
    names = {key: str(name) for key, name in names.items()} if isinstance(names, dict) else {}
    if n < 2 or set(names) != {str(i) for i in range(n)} or len(set(names.values())) < n:
        found = f"id2label {hf.get('id2label')!s:.80} of {n} outputs"
        raise ValueError(f"{path}: {found}: expected a different name for each of 2 or more")
    return [names[str(i)] for i in range(n)]


class Classifier(BERT):
    """An encoder without its old heads, and a linear layer from a summary of the text to the labels.

    The summary is the pooler's, for ELECTRA with GELU in place of tanh. With pre_norm (ModernBERT) it is the
    mean of all hidden states, passed through the transform of the masked-language-model head.
    """

    def __init__(self, config: Config, labels: list[str], family: str, dropout: float = 0.1):
        """family: a key of `encoders.TABLES`. dropout: of the summary; there is no other dropout."""
        super().__init__(replace(config, pooler=not config.pre_norm, mlm_head=False, pair="none"))
        D = config.d_model
        if config.pre_norm:
            self.cls["predictions"] = nn.ModuleDict({"transform": dense_and_norm(D, D, config)})
        self.classifier = nn.Linear(D, len(labels))
        self.labels, self.family, self.dropout = labels, family, dropout
        initialize(self, self.config)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return logits (n, labels) of n texts packed into one row (1, N), see `encoder_inference.pack`.
        segments: 0 or 1 for each token (1, N); None: all 0."""
        hidden = self.hidden(tokens, segments, cu_seqlens=cu_seqlens)  # (1, N, D)
        if self.config.pre_norm:
            mean = torch.segment_reduce(hidden[0], "mean", lengths=cu_seqlens.diff().long())  # (n, D)
            transform = self.cls.predictions.transform
            summary = transform.LayerNorm(F.gelu(transform.dense(mean)))
        elif self.family == "electra":
            summary = F.gelu(self.bert.pooler.dense(hidden[0, cu_seqlens[:-1]]))
        else:
            summary = self.pooled(hidden, cu_seqlens)
        return self.classifier(F.dropout(summary, self.dropout, self.training))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, labels: list[str] | None = None, *, kernels: str = "auto"
    ) -> "Classifier":
        """Return the classifier in directory, in float32; or, given labels, a new one on the encoder there.

        A new one drops the encoder's heads that it has no use for, and initialises what the checkpoint lacks.
        Raises ValueError as `BERT.from_pretrained` does, and for a classifier of other labels or kind.
        """
        # Read the checkpoint, and tell whether it is a classifier.
        family, _ = encoders.read_config(directory)
        fields, weights = encoders.read(directory)
        found = read_labels(directory, weights)
        if found is None and labels is None:
            raise ValueError(f"{directory}: has no classifier; make one by --data and --init-from")
        if found is not None and set(labels or found) != set(found):
            raise ValueError(f"{directory}: has the labels {found}, not {labels}; start from an encoder")

        # Take its weights, but for heads that are not used here; from an encoder, no classifier's.
        fields["kernels"] = kernels
        encoder = safetensors_dir.build(lambda: BERT(Config(**fields)), fields, weights, directory)
        model = cls(encoder.config, found or labels, family)
        places = model.state_dict()
        kept = {name: w for name, w in weights.items() if name in places or not is_head(name)}
        if found is None:
            kept = {name: w for name, w in kept.items() if not name.startswith("classifier.")}
            kept = {name: w for name, w in places.items() if is_head(name)} | kept
        safetensors_dir.assign(model, kept, directory)
        return model.float()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write an AutoModelForSequenceClassification to directory."""
        ids = {label: i for i, label in enumerate(self.labels)}
        more = {"id2label": dict(enumerate(self.labels)), "label2id": ids}
        more |= {"classifier_pooling": "mean"} if self.family == "modernbert" else {}
        head = "ForSequenceClassification"
        encoders.save(self.config, self.state_dict(), directory, self.family, head, **more)


Model = Classifier


def token_row(tokenizer: Tokenizer | WordPiece, text: str, config: Config, cut: bool) -> list[int]:
    """Return the token ids of [CLS] text [SEP], cut to the model's length if cut is True.

    Raises ValueError for a text that is longer than the model reads, unless it is cut.
    """
    row = [tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]
    if len(row) > config.max_seq_len and not cut:
        sizes = f"{len(row) - 2} tokens: this model reads at most {config.max_seq_len - 2}"
        raise ValueError(f"{text[:40]!r}... has {sizes}; use --cut to cut longer texts")
    return [*row[:-1][: config.max_seq_len - 1], tokenizer.sep_id]


def batch(examples: list[tuple[list[int], int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed tokens (1, N), cu_seqlens (n + 1,) and labels (n,) of n (row of token ids, label)."""
    rows, labels = zip(*examples, strict=True)
    return *pack(rows, device), torch.tensor(labels, device=device)


def depth(name: str, n_layers: int) -> int:
    """Return how far from the input a parameter is: 0 the embeddings, 1 ... L the layers, L + 1 the heads."""
    if is_head(name):
        return n_layers + 1
    if name.startswith("bert.encoder.layer."):
        return 1 + int(name.split(".")[3])
    return n_layers if name.startswith("bert.final_norm.") else 0


def parameter_groups(model: Classifier, lr: float, layer_decay: float) -> list[dict]:
    """Return groups for AdamW, one for each depth: "rate" is lr * layer_decay^(distance from the heads).

    Matrices have groups of their own, because they alone have weight decay. ALBERT's one layer is at distance
    1, its embeddings at 2.
    """
    n_layers = len(model.bert.encoder.layer)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        members.setdefault((depth(name, n_layers), p.ndim >= 2), []).append(p)
    groups = []
    for (d, matrices), params in members.items():
        rate = lr * layer_decay ** (n_layers + 1 - d)
        decay = 0.01 if matrices else 0.0  # BERT's
        groups.append({"params": params, "depth": d, "rate": rate, "weight_decay": decay})
    return groups


def default_rate(model: Classifier) -> float:
    """Return the peak learning rate 5e-5 (85e6 / n)^0.6 for n weights in the layers of a model.

    BERT base, n = 85 million, is fine-tuned at 5e-5 (Devlin et al. 2018, appendix A.3). Smaller models need
    more: the exponent is from a search with our own, see docs/bert.md.
    """
    n_weights = model.flops_per_token(1) / 6  # a weight costs 6 FLOPs for each token
    return 5e-5 * (85e6 / n_weights) ** 0.6


def slanted_triangle(step: int, n_steps: int) -> float:
    """Return the share of the peak rate at a step: up for the first tenth of the steps, then down to 0."""
    rise = max(1, n_steps // 10)
    return min((step + 1) / rise, (n_steps - step) / (n_steps - rise + 1))


def scores(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return accuracy and macro F1, the mean over the labels of 2 TP / (2 TP + FP + FN).

    A label that neither occurs nor is predicted is left out. predicted and labels are int64 (n,).
    """
    right = labels[predicted == labels].bincount(minlength=int(max(predicted.max(), labels.max())) + 1)
    total = predicted.bincount(minlength=len(right)) + labels.bincount(minlength=len(right))  # 2 TP + FP + FN
    f1 = 2 * right[total > 0] / total[total > 0]
    return right.sum().item() / len(labels), f1.mean().item()


@torch.no_grad()
def predict(model: Classifier, examples: list[tuple[list[int], int]], batch_size: int) -> Tensor:
    """Return the likeliest label of each example, int64 (len(examples),), whatever its own label."""
    model.eval()
    device, starts = model.embedding_weight.device, range(0, len(examples), batch_size)
    batches = [batch(examples[i : i + batch_size], device) for i in starts]
    return torch.cat([model(tokens, cu_seqlens).argmax(-1).cpu() for tokens, cu_seqlens, _ in batches])


def train(model: Classifier, examples: list, held_out: list, args: argparse.Namespace) -> list[str]:
    """Train for args.epochs, each over all examples in another order, and score those held out after each.

    Both lists are as for `batch`. Each epoch adds a row to metrics.jsonl, and a line to those returned.
    Raises ValueError for a gradient that is not finite.
    """
    device = model.embedding_weight.device
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.layer_decay))
    top = max(group["depth"] for group in optimizer.param_groups)
    n_steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    generator = torch.Generator().manual_seed(args.seed)
    log, lines, step, began = "", [], 0, time.perf_counter()
    with progress_bar(total=n_steps, unit="step") as bar:
        for epoch in range(args.epochs):
            # Freeze the layers that do not learn in this epoch.
            lowest = {"all": 0, "gradual": top - epoch, "none": top}[args.unfreeze]
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.requires_grad_(group["depth"] >= lowest)

            # One pass over the examples.
            model.train()
            total = 0.0
            for indices in torch.randperm(len(examples), generator=generator).split(args.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * slanted_triangle(step, n_steps)
                tokens, cu_seqlens, labels = batch([examples[i] for i in indices], device)
                loss = F.cross_entropy(model(tokens, cu_seqlens), labels)
                loss.backward()
                if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
                    raise ValueError(f"step {step}: the gradient is not finite; try a smaller --lr")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.item() * len(indices)
                step += 1
                bar.update()

            # Score the held-out examples, and log.
            predicted = predict(model, held_out, args.batch_size)
            accuracy, f1 = scores(predicted, torch.tensor([label for _, label in held_out]))
            row = {"epoch": epoch + 1, "step": step, "loss": total / len(examples)}
            row |= {"val_accuracy": accuracy, "val_f1": f1, "seconds": time.perf_counter() - began}
            log += json_file.json_line(row)
            with replace_file(args.out / "metrics.jsonl") as new:
                new.write_text(log, encoding="utf-8")
            summary = f"loss {row['loss']:.3f}, held out: accuracy {accuracy:.1%}, F1 {f1:.3f}"
            lines.append(f"epoch {epoch + 1}: {summary}")
            bar.write(lines[-1])
    return lines


def prepare(args: argparse.Namespace) -> tuple[Classifier, Tokenizer | WordPiece, list, list, list[str]]:
    """Return the model, its tokenizer, the examples to train on and those held out, and lines about them.

    Raises ValueError for flags, examples or a model that cannot be used.
    """
    for flag in ("epochs", "batch_size", "lr", "layer_decay"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected more than 0")
    if args.layer_decay > 1:
        raise ValueError(f"--layer-decay {args.layer_decay}: expected at most 1; ULMFiT's is {1 / 2.6:.2f}")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed {args.seed}: expected a number from 0 to 2^63 - 1")
    if (args.out / "model").exists():
        raise ValueError(f"--out {args.out}: there is a model in it; name another directory")

    # Read the examples, and hold some out.
    fields = (args.text_field, args.label_field)
    examples = read_examples(args.data, *fields)
    labels = sorted({label for _, label in examples})
    if len(labels) < 2:
        raise ValueError(f"{args.data}: every text has the label {labels[0]!r}; expected two or more labels")
    torch.manual_seed(args.seed)
    if args.val is not None:
        held_out = read_examples(args.val, *fields)
    else:
        examples, held_out = hold_out([examples[i] for i in torch.randperm(len(examples))])
    for _, label in held_out:
        if label not in labels:
            raise ValueError(f"{args.val}: label {label!r}; {args.data} has {', '.join(labels)}")

    # Load the encoder, and tokenise.
    about = naive_bayes.simple_guesses(examples, held_out)
    model, tokenizer = load(args.init_from, labels)
    number = {label: i for i, label in enumerate(model.labels)}

    def rows(part):
        return [(token_row(tokenizer, text, model.config, args.cut), number[label]) for text, label in part]

    examples, held_out = rows(examples), rows(held_out)

    # Fail now, not after an epoch, if the directory is not writable.
    args.out.mkdir(parents=True, exist_ok=True)
    with replace_file(args.out / "metrics.jsonl") as new:
        new.write_text("", encoding="utf-8")
    return model, tokenizer, examples, held_out, about


def load(directory: str, labels: list[str] | None = None) -> tuple[Classifier, Tokenizer | WordPiece]:
    """Return `Classifier.from_pretrained` on the GPU, if there is one, and the tokenizer of the directory."""
    model, tokenizer = Classifier.from_pretrained(directory, labels), get_tokenizer(directory)
    if tokenizer.n_vocab > model.config.vocab_size:
        sizes = f"{tokenizer.n_vocab} tokens, the model has {model.config.vocab_size}"
        raise ValueError(f"{directory}: the tokenizer has {sizes}; they do not belong together")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def classify(args: argparse.Namespace) -> None:
    """Print the probabilities of all labels for --text, the likeliest first."""
    model, tokenizer = load(args.checkpoint)
    row = token_row(tokenizer, args.text, model.config, args.cut)
    with torch.no_grad():
        p = model.eval()(*pack([row], model.embedding_weight.device))[0].softmax(-1).tolist()
    for share, label in sorted(zip(p, model.labels, strict=True), reverse=True):
        print(f"{share:6.1%} {label}")


def finetune(args: argparse.Namespace) -> None:
    """Train a classifier from the flags, and save it."""
    model, tokenizer, examples, held_out, about = prepare(args)
    args.lr = args.lr or default_rate(model)
    about.append(f"peak learning rate {args.lr:.2g}")
    print(*about, sep="\n", flush=True)
    about += train(model, examples, held_out, args)
    with replace_directory(args.out / "model") as new:
        model.save_pretrained(new)
        tokenizer.save(new)
    with replace_file(args.out / "report.txt") as new:
        new.write_text("\n".join(about) + "\n", encoding="utf-8")
    print(f"model: {args.out / 'model'}")


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser(description="Fine-tune an encoder to classify texts, or use it.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="a trained classifier, for --text")
    add("--text", help="the text to classify")
    add("--data", type=command.path, metavar="FILE", help='.jsonl of {"text": ..., "label": ...}, .csv ...')
    add("--val", type=command.path, metavar="FILE", help="held-out examples (default: a tenth of --data)")
    add("--text-field", default="text", metavar="NAME", help="field of the text (default %(default)s)")
    add("--label-field", default="label", metavar="NAME", help="field of the label (default %(default)s)")
    add("--init-from", type=command.filled, metavar="DIR", help="the encoder, in Hugging Face layout")
    out = "folder of the classifier (default %(default)s)"
    add("--out", type=command.path, metavar="DIR", default=Path("runs/classify"), help=out)
    add("--epochs", type=int, default=3, metavar="N", help="passes over the examples (default %(default)s)")
    add("--batch-size", type=int, default=16, metavar="TEXTS", help="texts per update (default %(default)s)")
    add("--lr", type=float, metavar="X", help="peak rate of the heads (default: by the model's size)")
    rates = "learning rate of a layer over that of the one above it (default 1)"
    add("--layer-decay", type=float, default=1.0, metavar="X", help=rates)
    layers = "layers that learn: all (default), one more each epoch, or only the heads"
    add("--unfreeze", choices=("all", "gradual", "none"), default="all", help=layers)
    add("--cut", action="store_true", help="cut texts that are longer than the model reads")
    add("--seed", type=int, default=0, metavar="N", help="start of all random numbers (default 0)")
    args = parser.parse_args(argv)

    def run() -> None:
        given = [value is not None for value in (args.data, args.init_from, args.checkpoint, args.text)]
        if given not in ([True, True, False, False], [False, False, True, True]):
            raise ValueError("give --data and --init-from to train, or a classifier and --text to classify")
        (finetune if given[0] else classify)(args)

    return command.exit_code(run)


if __name__ == "__main__":
    command.run(main)
