"""Train a small GPT-J, tokenizer included, on one text, and write it as a folder that all three backends open.

    python examples/train_shakespeare.py tinyshakespeare.txt shakespeare --tpu shakespeare-tpu

`--tpu` also writes it as mesh-transformer-jax would have: 8 shards of bfloat16, and the tokenizer's files. The recipe's
defaults are for 2.6 million parameters on the 1,115,394 characters of tinyshakespeare (public domain;
https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt,
sha256 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed). Every field of `Recipe` is also an option.

Why it is as it is. The text is small, so the model sees it many times over, and what is learnt by heart is lost:
the windows are cut anew each epoch, dropout and weight decay are on, and the weights that are kept are those of the
epoch with the best validation loss. Losses per token cannot be compared across vocabularies, so the measure is bits
per byte of validation text. The last tenth of the text is for validation alone: the tokenizer does not see it either.

What the defaults gave, on 2 virtual cores of an AMD EPYC: the last epoch was the best, with 3.3115 nats per token and
2.1168 bits per byte (the same in bfloat16), while the training loss had come down to 2.898. The epochs before it had
2.1184, 2.1209 and 2.1402. An epoch takes about two minutes of one core; the whole took 45 minutes of a busy machine.
`src/gptj/command/demo/shakespeare` is what `--tpu` wrote.

The same text, recipe, machine and library versions give the same weights, bit for bit (checked on a smaller model).
Elsewhere sums may be rounded in another order.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptj_conversion.convert import convert
from torch import Tensor

import gptj
from gptj.config import GPTJConfig
from gptj.config.labels import IGNORED_LABEL
from gptj.generation.config import GenerationConfig
from gptj.pt import GPTJForCausalLM
from gptj.text.tokenizer import GPTJTokenizer

TRAINING_SHARE = 0.9
"""How much of the text, from its start, is trained on; the rest is for validation."""

TPU_SHARDS = 8
"""Of the TPU checkpoint; a v3-8, which GPT-J was trained for, has 8 cores."""

PROMPT = "ROMEO:"

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50}
"""How text is made where a call does not say; generation_config.json keeps it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything beside the text that decides what comes out.

    Attributes:
        vocab_size: tokens of the byte-level BPE, `<|endoftext|>` included.
        n_positions: tokens of a window, and so the longest sequence.
        n_embd, n_layer, n_head: the model's sizes. The shards of a TPU checkpoint need vocab_size and n_head to be
            multiples of 8.
        dropout: of the embeddings and of what each layer adds to the stream. Attention weights have none: PyTorch's
            fused attention on a CPU is there without dropout only, and is twice as fast.
        epochs: how often each training token is seen.
        batch_size: windows a step.
        peak_learning_rate: after the warm-up; a cosine takes it to zero.
        warm_up: the share of all steps in which the learning rate climbs from zero.
        weight_decay: of matrices; biases and layer norms have none.
        headed: the share of windows that begin where a speech begins, headed by `<|endoftext|>`. So the model can
            also start from that token; it never ends with it.
        seed: of the start values, the windows and the dropout.
        threads: that PyTorch computes with; the order of its sums depends on it.
    """

    vocab_size: int = 1024
    n_positions: int = 256
    n_embd: int = 192
    n_layer: int = 5
    n_head: int = 8
    dropout: float = 0.15
    epochs: int = 10
    batch_size: int = 8
    peak_learning_rate: float = 2e-3
    warm_up: float = 0.05
    weight_decay: float = 0.1
    headed: float = 0.05
    seed: int = 0
    threads: int = 1

    def config(self, tokenizer: GPTJTokenizer) -> GPTJConfig:
        """The model's config: all that GPT-J-6B has, and the whole of each head is rotated."""
        return GPTJConfig(
            vocab_size=len(tokenizer),
            n_positions=self.n_positions,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            rotary_dim=self.n_embd // self.n_head,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )


# The text -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text as token ids, cut in two.

    Attributes:
        training: (n,) ids of the training part.
        speeches: (k,) the places in `training` where a speech begins, rising; the first is 0.
        validation: ids of the validation part, headed by `<|endoftext|>` so that every token of it is predicted.
        validation_bytes: of the validation part in UTF-8.
        end_of_text: the id of `<|endoftext|>`.
    """

    training: Tensor
    speeches: Tensor
    validation: Tensor
    validation_bytes: int
    end_of_text: int


def split(text: str) -> tuple[str, str]:
    """The training part and the validation part: the first nine tenths of the characters, and the last tenth."""
    cut = int(TRAINING_SHARE * len(text))
    return text[:cut], text[cut:]


def encode(text: str, tokenizer: GPTJTokenizer) -> Corpus:
    """The corpus of a whole text. A speech begins at the start and after every empty line."""
    training, validation = split(text)
    ids, offsets = tokenizer.encode_with_offsets(training)
    starts = [place for place, (first, _) in enumerate(offsets) if first == 0 or training[:first].endswith("\n\n")]
    assert tokenizer.eos_token_id is not None
    return Corpus(
        training=torch.tensor(ids),
        speeches=torch.tensor(starts),
        validation=torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(validation)]),
        validation_bytes=len(validation.encode()),
        end_of_text=tokenizer.eos_token_id,
    )


def windows_an_epoch(corpus: Corpus, length: int) -> int:
    """How many windows of `length` tokens fit into the training part, wherever the first begins.

    Neighbours share one token, the last input of one being the first of the next: each token is predicted once.
    """
    return (len(corpus.training) - length + 1) // (length - 1)


def epoch_batches(corpus: Corpus, recipe: Recipe, *, random: np.random.Generator) -> Iterator[Tensor]:
    """An epoch's windows in random order, batch by batch, (b, t); the cuts fall elsewhere in each epoch."""
    t = recipe.n_positions
    count = windows_an_epoch(corpus, t)
    starts = torch.from_numpy(random.integers(t - 1) + (t - 1) * random.permutation(count))
    windows = corpus.training[starts[:, None] + torch.arange(t)]

    headed = torch.from_numpy(random.random(count) < recipe.headed)
    speeches = corpus.speeches[torch.searchsorted(corpus.speeches, starts[headed], right=True) - 1]
    windows[headed, 0] = corpus.end_of_text
    windows[headed, 1:] = corpus.training[speeches[:, None] + torch.arange(t - 1)]

    whole = count - count % recipe.batch_size
    yield from windows[:whole].split(recipe.batch_size)


# Measuring ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts the validation part.

    Attributes:
        nats_per_token: the mean loss.
        bits_per_byte: the same over the bytes of the text, which no choice of tokenizer changes. Where the text is
            ASCII these are bits per character.
    """

    nats_per_token: float
    bits_per_byte: float

    def __str__(self) -> str:
        return f"{self.nats_per_token:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte"


@torch.inference_mode()
def evaluate(model: GPTJForCausalLM, corpus: Corpus, *, batch_size: int = 32) -> Score:
    """The score of the model without dropout, each token predicted once.

    The windows overlap by half, and only what no earlier window has predicted counts; so but for the first window
    every token is predicted from at least half a window.
    """
    ids, t = corpus.validation, min(model.config.n_positions, len(corpus.validation))
    starts = [*range(0, len(ids) - t, t // 2), len(ids) - t]
    windows = torch.stack([ids[start : start + t] for start in starts])
    labels = windows.clone()
    for row, (start, seen) in enumerate(zip(starts, [1, *(start + t for start in starts)], strict=False)):
        labels[row, : seen - start] = IGNORED_LABEL

    nats = 0.0
    was_training = model.training
    model.eval()
    for some, targets in zip(windows.split(batch_size), labels.split(batch_size), strict=True):
        nats += model(some, labels=targets, use_cache=False).loss.item() * int((targets != IGNORED_LABEL).sum())
    model.train(was_training)
    return Score(nats / (len(ids) - 1), nats / math.log(2) / corpus.validation_bytes)


def rounded_to_bfloat16(model: GPTJForCausalLM) -> GPTJForCausalLM:
    """A copy whose float32 parameters have the values that bfloat16 would store."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    return rounded


def write_verse(model: GPTJForCausalLM, tokenizer: GPTJTokenizer, *, tokens: int = 200, seed: int = 0) -> str:
    """`PROMPT` and what the model makes of it, of so many tokens or as many as the model has positions for."""
    prompt = tokenizer.encode(PROMPT)
    tokens = min(tokens, model.config.n_positions - len(prompt))
    ids = model.generate([prompt], max_new_tokens=tokens, seed=seed)
    return tokenizer.decode(ids[0])


# Training -----------------------------------------------------------------------------------------------------


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Of step 0 to steps - 1: up in a straight line, then down a cosine to almost zero."""
    warm = max(1, round(recipe.warm_up * steps))
    if step < warm:
        return recipe.peak_learning_rate * (step + 1) / warm
    return recipe.peak_learning_rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def make_optimizer(model: GPTJForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that lets only matrices decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.98), fused=True)


def train(model: GPTJForCausalLM, corpus: Corpus, recipe: Recipe) -> list[dict[str, Any]]:
    """Train the model, and leave it with the weights of its best epoch. Returns what each epoch measured."""
    random = np.random.default_rng(recipe.seed)
    torch.manual_seed(recipe.seed)
    optimizer = make_optimizer(model, recipe)
    steps = recipe.epochs * (windows_an_epoch(corpus, recipe.n_positions) // recipe.batch_size)
    history: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    step, began_s = 0, time.monotonic()
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        model.train()
        for batch in epoch_batches(corpus, recipe, random=random):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, steps)
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
        score = evaluate(model, corpus)
        if not history or score.bits_per_byte < min(row["bits_per_byte"] for row in history):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        measured = {
            "epoch": epoch,
            "step": step,
            "training_loss": sum(losses) / len(losses),
            **dataclasses.asdict(score),
            "wall_s": round(time.monotonic() - began_s),
        }
        history.append(measured)
        print("  ".join(f"{name} {value:.7g}" for name, value in measured.items()), flush=True)
    model.load_state_dict(best)
    model.eval()
    return history


# The command --------------------------------------------------------------------------------------------------


def parse_arguments() -> tuple[argparse.Namespace, Recipe]:
    """The command line's paths, and its recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("text", type=Path, help="the text to learn, UTF-8")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--tpu", type=Path, metavar="FOLDER", help="also write a TPU checkpoint, into this folder")
    fields = dataclasses.fields(Recipe)
    for field in fields:
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help="[default: %(default)s]")
    arguments = parser.parse_args()
    return arguments, Recipe(**{field.name: getattr(arguments, field.name) for field in fields})


def main() -> None:
    """Train, measure, write."""
    arguments, recipe = parse_arguments()
    if not arguments.text.is_file():
        raise SystemExit(f"{arguments.text}: no such file")
    for folder in filter(None, (arguments.output, arguments.tpu)):
        if folder.exists():  # said before the training rather than after it
            raise SystemExit(f"{folder} exists; move it away first")
    if arguments.tpu and (recipe.vocab_size % TPU_SHARDS or recipe.n_head % TPU_SHARDS):
        raise SystemExit(f"--tpu needs a vocabulary and heads that are multiples of {TPU_SHARDS}")
    torch.set_num_threads(recipe.threads)

    data = arguments.text.read_bytes()
    text = data.decode()
    tokenizer = GPTJTokenizer.train([split(text)[0]], recipe.vocab_size)
    corpus = encode(text, tokenizer)
    model = GPTJForCausalLM(recipe.config(tokenizer), seed=recipe.seed, attn_implementation="sdpa")
    model.generation_config = GenerationConfig.from_model_config(model.config).replace(**SAMPLING)
    print(
        f"{model.num_parameters():,} parameters; {len(corpus.training):,} training tokens, "
        f"{len(text) / (len(corpus.training) + len(corpus.validation)):.2f} characters each",
        flush=True,
    )
    history = train(model, corpus, recipe)
    scores = {"float32": evaluate(model, corpus), "bfloat16": evaluate(rounded_to_bfloat16(model), corpus)}
    for dtype, score in scores.items():
        print(f"best epoch in {dtype}: {score}")

    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    record = {
        "text": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "training_share": TRAINING_SHARE},
        "recipe": dataclasses.asdict(recipe),
        "parameters": model.num_parameters(),
        "versions": {"gptj": gptj.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "validation": {dtype: dataclasses.asdict(score) for dtype, score in scores.items()},
        "history": history,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if arguments.tpu is not None:
        convert(arguments.output, arguments.tpu, to="mesh", shards=TPU_SHARDS, dtype="bfloat16")
    print(f"\n{write_verse(model, tokenizer)}")


if __name__ == "__main__":
    main()
