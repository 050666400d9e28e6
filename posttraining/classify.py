"""Fine-tuning: a pretrained encoder learns to classify texts.

    p(label | text) = softmax(W tanh(P h_[CLS]) + b)            h from a pretrained encoder

BERT's recipe (Devlin et al. 2018, section 3.2): a new layer W on top, and all weights trained for a few
epochs at a small rate. The lower layers hold what is common to all texts and should move less, so each may
learn at a smaller rate than the one above (`--layer-decay`; ULMFiT, Howard and Ruder 2018, section 3.2, calls
it discriminative and divides by 2.6), or be kept frozen until those above have settled (`--unfreeze gradual`,
section 3.3: one layer more each epoch, from the top). The rate rises for a tenth of the steps and falls for
the rest, ULMFiT's slanted triangle.

    python -m posttraining.classify --data reviews.jsonl --init-from runs/bert/model       lines of {"text", "label"}
    python -m posttraining.classify runs/classify/model --text "a waste of two hours"      what it says

The run leaves, in --out, model/ (opens with AutoModelForSequenceClassification) and metrics.jsonl.

Shapes: n texts of a batch, N their tokens in all, D model width, L layers.
"""

import argparse
import gzip
import json
import math
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bert import BERT, Config, dense_and_norm, initialize
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import decoders, encoders
from formats.atomic import replace_directory, replace_file
from language.encoder_inference import pack


def is_head(name: str) -> bool:
    """Whether a tensor, under our name, belongs to what stands above the encoder."""
    return not name.startswith("bert.") or name.startswith("bert.pooler.")


def read_labels(directory: str | Path, weights: dict[str, Tensor]) -> list[str] | None:
    """The labels of the text classifier in directory, whose weights these are; None if it is none.

    Raises ValueError for one whose logits mean something else than in `Classifier`.
    """
    path = Path(directory) / "config.json"
    hf = decoders.read_json(path)
    architecture = (hf.get("architectures") or ["none"])[0]  # classifiers of tokens have the same tensors
    if not architecture.endswith("ForSequenceClassification") or "classifier.bias" not in weights:
        return None
    ours = {"problem_type": (None, "single_label_classification")}
    if hf["model_type"] == "modernbert":
        ours["classifier_pooling"] = ("mean",)
    for key, values in ours.items():
        if hf.get(key) not in values:
            raise ValueError(f"{path}: {key} {hf.get(key)!r} is not implemented; expected {values[-1]!r}")
    n = len(weights["classifier.bias"])
    names = hf.get("id2label") or {str(i): f"LABEL_{i}" for i in range(n)}  # transformers' own
    if n < 2 or set(names) != {str(i) for i in range(n)} or len(set(names.values())) < n:
        found = f"id2label {names!s:.80} of {n} outputs"
        raise ValueError(f"{path}: {found}: expected a different name for each of 2 or more")
    return [str(names[str(i)]) for i in range(n)]


class Classifier(BERT):
    """An encoder without its old heads, and a linear layer to the labels from a summary of the text.

    The summary is the pooler's, for ELECTRA with a GELU in place of tanh; or, with pre_norm (ModernBERT), the
    mean of all hidden states, through the transform of the masked-language-model head.
    """

    def __init__(self, config: Config, labels: list[str], family: str, dropout: float = 0.1):
        """family: one of those in formats/encoders.py. dropout: of the summary, nowhere else."""
        super().__init__(replace(config, pooler=not config.pre_norm, mlm_head=False, pair="none"))
        D = config.d_model
        if config.pre_norm:
            self.cls["predictions"] = nn.ModuleDict({"transform": dense_and_norm(D, D, config)})
        self.classifier = nn.Linear(D, len(labels))
        self.labels, self.family, self.dropout = labels, family, dropout
        initialize(self, self.config)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Logits (n, labels) of n texts packed into one row (1, N), see language/encoder_inference.py; segments (1, N), else 0."""
        hidden = self.hidden(tokens, segments, cu_seqlens=cu_seqlens)
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
        """The classifier in directory, in float32; or, given labels, a new one on the encoder in there.

        A new one drops the heads that have no place in it, and draws what the checkpoint lacks. Raises
        ValueError as `BERT.from_pretrained` does, and for a classifier of other labels or of another kind.
        """
        family, _ = encoders.read_config(directory)
        fields, weights = encoders.read(directory)
        found = read_labels(directory, weights)
        if found is None and labels is None:
            raise ValueError(f"{directory}: has no classifier; make one by --data and --init-from")
        if found is not None and set(labels or found) != set(found):
            raise ValueError(f"{directory}: has the labels {found}, not {labels}; start from an encoder")
        model = cls(Config(**fields, kernels=kernels), found or labels, family)
        places = model.state_dict()
        kept = {name: w for name, w in weights.items() if name in places or not is_head(name)}
        if found is None:
            kept = {name: w for name, w in kept.items() if not name.startswith("classifier.")}
            kept = {name: w for name, w in places.items() if is_head(name)} | kept
        decoders.assign(model, kept, directory)
        return model.float()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write an AutoModelForSequenceClassification to the directory."""
        ids = {label: i for i, label in enumerate(self.labels)}
        more = {"id2label": dict(enumerate(self.labels)), "label2id": ids}
        more |= {"classifier_pooling": "mean"} if self.family == "modernbert" else {}
        head = "ForSequenceClassification"
        encoders.save(self.config, self.state_dict(), directory, self.family, head, **more)


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(text, label) of the lines of a .jsonl[.gz], each an object with these two fields.

    Raises ValueError naming the file and line that is something else, or a file with less than two.
    """
    expected = 'expected lines of {"text": ..., "label": ...}'
    try:
        raw = path.read_bytes()
        content = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {expected}") from None
    examples = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            text, label = example["text"], example["label"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: {line[:60]!r}: {expected}") from None
        if not isinstance(text, str) or not isinstance(label, str | int):
            raise ValueError(f"{path}, line {number}: {line[:60]!r}: {expected}, both of them strings")
        examples.append((text, str(label)))
    if len(examples) < 2:
        raise ValueError(f"{path}: {len(examples)} examples; {expected}, at least two")
    return examples


def token_row(tokenizer: Tokenizer | WordPiece, text: str, config: Config, cut: bool) -> list[int]:
    """[CLS] text [SEP]; ValueError if the text is longer than the model reads, unless it is to be cut."""
    row = [tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]
    if len(row) > config.max_seq_len and not cut:
        sizes = f"{len(row) - 2} tokens: this model reads at most {config.max_seq_len - 2}"
        raise ValueError(f"{text[:40]!r}... has {sizes}; use --cut to have texts cut")
    return [*row[:-1][: config.max_seq_len - 1], tokenizer.sep_id]


def batch(examples: list[tuple[list[int], int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tokens (1, N), cu_seqlens (n + 1,) and labels (n,) of n rows of token ids with their labels."""
    rows, labels = zip(*examples, strict=True)
    return *pack(rows, device), torch.tensor(labels, device=device)


def depth(name: str, n_layers: int) -> int:
    """How far from the input a parameter stands: 0 the embeddings, 1 ... L the layers, L + 1 the heads."""
    if is_head(name):
        return n_layers + 1
    if name.startswith("bert.encoder.layer."):
        return 1 + int(name.split(".")[3])
    return n_layers if name.startswith("bert.final_norm.") else 0


def parameter_groups(model: Classifier, lr: float, layer_decay: float) -> list[dict]:
    """For AdamW: the parameters of each depth, matrices apart because they alone decay, at the "rate"
    lr * layer_decay^(distance from the heads). ALBERT's one layer is at distance 1, its embeddings at 2."""
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


def slanted_triangle(step: int, n_steps: int) -> float:
    """The share of the peak rate at a step: up for the first tenth of the steps, then down to nothing."""
    rise = max(1, n_steps // 10)
    return min((step + 1) / rise, (n_steps - step) / (n_steps - rise + 1))


def scores(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy, and macro F1: the mean over the labels of 2 TP / (2 TP + FP + FN), leaving out a label that
    neither occurs nor is predicted. predicted and labels are int64 (n,)."""
    right = labels[predicted == labels].bincount(minlength=int(max(predicted.max(), labels.max())) + 1)
    total = predicted.bincount(minlength=len(right)) + labels.bincount(minlength=len(right))  # 2 TP + FP + FN
    f1 = 2 * right[total > 0] / total[total > 0]
    return right.sum().item() / len(labels), f1.mean().item()


@torch.no_grad()
def predict(model: Classifier, examples: list[tuple[list[int], int]], batch_size: int) -> Tensor:
    """The likeliest label (len(examples),) of each, whatever theirs are."""
    model.eval()
    device, starts = model.embedding_weight.device, range(0, len(examples), batch_size)
    batches = [batch(examples[i : i + batch_size], device) for i in starts]
    return torch.cat([model(tokens, cu_seqlens).argmax(-1).cpu() for tokens, cu_seqlens, _ in batches])


def train(model: Classifier, examples: list, held_out: list, args: argparse.Namespace) -> None:
    """args.epochs times over the examples, each time in another order, scored on those held out after each.

    Both are as for `batch`. Each epoch adds a row to metrics.jsonl. ValueError if a gradient is not finite.
    """
    device = model.embedding_weight.device
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.layer_decay))
    top = max(group["depth"] for group in optimizer.param_groups)
    n_steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    generator = torch.Generator().manual_seed(args.seed)
    log, step, began = "", 0, time.perf_counter()
    with tqdm(total=n_steps, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(args.epochs):
            lowest = {"all": 0, "gradual": top - epoch, "none": top}[args.unfreeze]
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.requires_grad_(group["depth"] >= lowest)
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
            predicted = predict(model, held_out, args.batch_size)
            accuracy, f1 = scores(predicted, torch.tensor([label for _, label in held_out]))
            row = {"epoch": epoch + 1, "step": step, "loss": total / len(examples)}
            row |= {"val_accuracy": accuracy, "val_f1": f1, "seconds": time.perf_counter() - began}
            log += json.dumps(row) + "\n"
            with replace_file(args.out / "metrics.jsonl") as new:
                new.write_text(log)
            told = f"loss {row['loss']:.3f}, held out: accuracy {accuracy:.1%}, F1 {f1:.3f}"
            bar.write(f"epoch {epoch + 1}: {told}")


def prepare(args: argparse.Namespace) -> tuple[Classifier, Tokenizer | WordPiece, list, list]:
    """The model, the examples to train on and those held out; ValueError says what is wrong in args."""
    for flag in ("epochs", "batch_size", "lr", "layer_decay"):
        if not 0 < getattr(args, flag) < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected more than 0")
    if args.layer_decay > 1:
        raise ValueError(f"--layer-decay {args.layer_decay}: expected at most 1; ULMFiT's is {1 / 2.6:.2f}")
    if (args.out / "model").exists():
        raise ValueError(f"--out {args.out}: there is a model in it; name another directory")
    examples = read_examples(args.data)
    labels = sorted({label for _, label in examples})
    if len(labels) < 2:
        raise ValueError(f"{args.data}: every text has the label {labels[0]!r}; expected two or more labels")
    torch.manual_seed(args.seed)
    if args.val is not None:
        held_out = read_examples(args.val)
    else:
        examples = [examples[i] for i in torch.randperm(len(examples))]
        n_held_out = math.ceil(len(examples) / 10)
        held_out, examples = examples[:n_held_out], examples[n_held_out:]
    for _, label in held_out:
        if label not in labels:
            raise ValueError(f"{args.val}: label {label!r}; {args.data} has {', '.join(labels)}")
    model, tokenizer = load(args.init_from, labels)
    number = {label: i for i, label in enumerate(model.labels)}

    def rows(part):
        return [(token_row(tokenizer, text, model.config, args.cut), number[label]) for text, label in part]

    examples, held_out = rows(examples), rows(held_out)
    args.out.mkdir(parents=True, exist_ok=True)
    with replace_file(args.out / "metrics.jsonl") as new:  # so that no write fails for the first time later
        new.write_text("")
    return model, tokenizer, examples, held_out


def load(directory: str, labels: list[str] | None = None) -> tuple[Classifier, Tokenizer | WordPiece]:
    """`Classifier.from_pretrained` on the best device here, and its tokenizer."""
    model, tokenizer = Classifier.from_pretrained(directory, labels), get_tokenizer(directory)
    if tokenizer.n_vocab > model.config.vocab_size:
        sizes = f"{tokenizer.n_vocab} tokens, the model has {model.config.vocab_size}"
        raise ValueError(f"{directory}: the tokenizer has {sizes}; they do not belong together")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def ask(args: argparse.Namespace) -> None:
    model, tokenizer = load(args.checkpoint)
    row = token_row(tokenizer, args.text, model.config, args.cut)
    with torch.no_grad():
        p = model.eval()(*pack([row], model.embedding_weight.device))[0].softmax(-1).tolist()
    for share, label in sorted(zip(p, model.labels, strict=True), reverse=True):
        print(f"{share:6.1%} {label}")


def finetune(args: argparse.Namespace) -> None:
    model, tokenizer, examples, held_out = prepare(args)
    most = Counter(label for _, label in held_out).most_common(1)[0][1] / len(held_out)
    print(f"{len(examples):,} texts, {len(held_out):,} held out; labels {', '.join(model.labels)}")
    print(f"always the most frequent label: {most:.1%} of the held out", flush=True)
    train(model, examples, held_out, args)
    with replace_directory(args.out / "model") as new:
        model.save_pretrained(new)
        tokenizer.save(new)
    print(f"model: {args.out / 'model'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Teach a pretrained encoder to classify texts, or ask it.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a classifier to ask, by --text")
    add("--text", help="what to classify")
    add("--data", type=Path, metavar="FILE", help='.jsonl[.gz], lines of {"text": ..., "label": ...}')
    add("--val", type=Path, metavar="FILE", help="held-out examples (default: a tenth of --data)")
    add("--init-from", metavar="DIR", help="the pretrained encoder, in Hugging Face layout")
    add("--out", type=Path, metavar="DIR", default=Path("runs/classify"), help="default %(default)s")
    add("--epochs", type=int, default=3, metavar="N", help="default %(default)s")
    add("--batch-size", type=int, default=16, metavar="TEXTS", help="default %(default)s")
    add("--lr", type=float, default=5e-5, metavar="X", help="peak rate of the top (default %(default)s)")
    add("--layer-decay", type=float, default=1.0, metavar="X", help="the rate of a layer, by that above it")
    choices, told = ("all", "gradual", "none"), "layers that train: all, one more each epoch, or heads alone"
    add("--unfreeze", choices=choices, default="all", help=told)
    add("--cut", action="store_true", help="cut texts that are longer than the model reads")
    add("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    try:
        given = [value is not None for value in (args.data, args.init_from, args.checkpoint, args.text)]
        if given not in ([True, True, False, False], [False, False, True, True]):
            raise ValueError("give --data and --init-from to train, or a classifier and --text to ask it")
        (finetune if given[0] else ask)(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
