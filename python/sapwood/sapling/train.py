"""Makes the demo model from the corpus: tokenizer, data, training, export. Run by hand:

    python -m sapwood.sapling.train --corpus DIR [--minutes 60] [--seed N] [--out DIR]

corpus.py gives it the prose and facts, dialogues.py the chats, network.py the decoder, muon.py the optimizer; what it
writes is a Hugging Face checkpoint that card.py then describes. It needs torch and tokenizers, which serving does not.

The schedule follows the clock, so that training ends when it should whatever else the machine does. A checkpoint in the
work directory every few minutes lets `--resume` go on after a stop; SIGTERM exports what there is and ends.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from sapwood.sapling import MODEL_DIR
from sapwood.sapling.corpus import knowledge, prose
from sapwood.sapling.dialogues import Dialogues, Knowledge, Message
from sapwood.sapling.muon import Muon
from sapwood.sapling.network import IGNORED, Decoder, Shape
from sapwood.sapling.tokenizer import END, END_OF_TEXT, START, render, save_tokenizer, token_id, train_tokenizer

log = logging.getLogger("sapwood.sapling")

Batch = tuple[Tensor, Tensor]  # ids and targets, int64 [rows, length]

WIDTHS: Final = (32, 48, 64, 96, 128, 256, 512, 1024)  # lengths chats are padded to
CHECKPOINT_S: Final = 180.0
HELD_OUT: Final = 50


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train. The learning rates are for matrices (Muon, in AdamW's measure) and for the rest (AdamW)."""

    minutes: float = 60.0
    steps: int = 0  # where given, the schedule follows the steps and not the clock
    seed: int = 1
    vocab_size: int = 4096
    tokenizer_chats: int = 20_000  # chats the tokenizer sees, besides prose
    passes: int = 2  # forward and backward passes of one step
    pass_tokens: int = 4096  # tokens of one pass, padding included
    matrix_rate: float = 6e-3
    other_rate: float = 3e-3
    weight_decay: float = 0.05
    warm_up: float = 0.02  # the part of the training in which the rates rise
    decay: float = 0.5  # the part, at its end, in which they fall to zero
    chat_first: float = 0.25  # the part of the passes that are chats, in the first fifth and from two fifths on
    chat_last: float = 0.85
    widths: tuple[int, ...] = WIDTHS


class Chats:
    """Batches of chats, one chat a row as in serving, padded to the next of the widths with rows of like length.

    The loss counts what the assistant says and the mark that ends it.
    """

    def __init__(self, dialogues: Dialogues, tokenizer: Tokenizer, seed: int, plan: Plan) -> None:
        self._chats = dialogues.conversations(seed)
        self._tokenizer = tokenizer
        self._random = Random(seed)
        self._plan = plan
        self._rows: dict[int, list[tuple[list[int], list[int]]]] = collections.defaultdict(list)
        self._ready: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while not self._ready:
            # So many at a time that the widths used most come to full batches.
            for _ in range(self._plan.pass_tokens // 2):
                ids, targets = encode_chat(self._tokenizer, next(self._chats))
                width = next((w for w in self._plan.widths if w >= len(ids)), 0)
                if width:
                    self._rows[width].append((ids, targets))
            self._ready = [w for w, rows in self._rows.items() for _ in range(len(rows) // self._count(w))]
            self._random.shuffle(self._ready)
        width = self._ready.pop()
        rows = [self._rows[width].pop(0) for _ in range(self._count(width))]
        # What pads is never counted, and comes last, where nothing that is counted attends to it.
        padded = [(ids + [0] * (width - len(ids)), targets + [IGNORED] * (width - len(ids))) for ids, targets in rows]
        return torch.tensor([ids for ids, _ in padded]), torch.tensor([targets for _, targets in padded])

    def _count(self, width: int) -> int:
        return max(self._plan.pass_tokens // width, 1)


def encode_chat(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """(ids, targets) of a chat, of one length; the targets are IGNORED but where the assistant speaks."""
    ids = tokenizer.encode(render(messages)).ids
    opening = tokenizer.encode(f"{START}assistant\n").ids
    end = token_id(tokenizer, END)
    targets = [IGNORED] * len(ids)
    at = 0
    while at < len(ids):
        if ids[at : at + len(opening)] != opening:
            at += 1
            continue
        at += len(opening)
        while at < len(ids) and ids[at - 1] != end:
            targets[at - 1] = ids[at]
            at += 1
    return ids, targets


class Prose:
    """Batches of running text: the documents in random order, one after the other, with a mark between them."""

    def __init__(self, documents: list[list[int]], mark: int, seed: int, plan: Plan) -> None:
        self._documents = documents
        self._mark = mark
        self._random = Random(seed)
        self._widths = plan.widths[-2:]
        self._pass_tokens = plan.pass_tokens
        self._tokens: collections.deque[int] = collections.deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # Mostly the shorter width; the longer one often enough that every position of the context is trained.
        width = self._random.choices(self._widths, (7, 1))[0]
        count = max(self._pass_tokens // width, 1)
        while len(self._tokens) < count * (width + 1):
            for document in self._random.sample(self._documents, len(self._documents)):
                self._tokens.extend(document)
                self._tokens.append(self._mark)
        rows = torch.tensor([self._tokens.popleft() for _ in range(count * (width + 1))]).view(count, width + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Trainer:
    """The decoder, its optimizers and where in the schedule they are. `run` trains; `export` writes the model."""

    def __init__(self, plan: Plan, shape: Shape, tokenizer: Tokenizer, documents: list[str], facts: Knowledge) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.tokenizer = plan, tokenizer
        self.model = Decoder(shape)
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.optimizers = (
            Muon(matrices, lr=plan.matrix_rate, weight_decay=plan.weight_decay),
            torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.elapsed = 0.0  # seconds of training, of earlier runs too
        self.step = 0
        self.tokens = 0
        self.history: list[dict[str, float]] = []
        self._documents = [encoding.ids for encoding in tokenizer.encode_batch(documents)]
        self._dialogues = Dialogues(facts)
        self._stopped = False

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        done = self.step / self.plan.steps if self.plan.steps else self.elapsed / (60 * self.plan.minutes)
        return min(done, 1.0)

    def compile(self) -> None:
        """Let torch.compile make the layers faster, once for every width; it needs a C++ compiler, and minutes."""
        torch._dynamo.config.recompile_limit = 2 * len(self.plan.widths)
        for layer in self.model.layers:
            layer.compile(dynamic=False)

    def stop(self, signum: int, frame: FrameType | None) -> None:
        self._stopped = True

    def run(self, work: Path) -> None:
        """Train to the end of the plan, or until `stop`."""
        plan, mark = self.plan, token_id(self.tokenizer, END_OF_TEXT)
        # A resumed run draws other data than the first one did, not the same again.
        seed = plan.seed + 1000 * self.step
        # One text in HELD_OUT, and chats of another seed, are kept for the measure of what was learned.
        kept = [document for at, document in enumerate(self._documents) if at % HELD_OUT]
        prose = Prose(kept, mark, seed, plan)
        chats = Chats(self._dialogues, self.tokenizer, seed, plan)
        saved, share, losses = time.monotonic(), 0.0, collections.defaultdict(list)
        while self.progress < 1 and not self._stopped:
            began, progress = time.monotonic(), self.progress
            for optimizer, rate in zip(self.optimizers, (plan.matrix_rate, plan.other_rate), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * self._rate(progress)
            for _ in range(plan.passes):
                share += self._chat_share(progress)
                kind, source = ("chat", chats) if share >= 1 else ("prose", prose)
                share -= kind == "chat"
                ids, targets = next(source)
                loss, count = self.model.loss(ids, targets)
                (loss / (count * plan.passes)).backward()
                losses[kind].append(loss.item() / count)
                self.tokens += ids.numel()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            self.elapsed += time.monotonic() - began
            if self.step % 20 == 0:
                log.info(
                    "%5.1f %% step %d %s %.0f tokens/s",
                    100 * self.progress,
                    self.step,
                    _means(losses),
                    self.tokens / self.elapsed,
                )
                losses.clear()
            if time.monotonic() - saved > CHECKPOINT_S:
                self.save(work)
                saved = time.monotonic()
        self.save(work)

    def _rate(self, progress: float) -> float:
        """The learning rates' factor: up, flat, and down to zero in a line (Hägele et al. 2024)."""
        return min(1.0, (progress + 1e-3) / self.plan.warm_up, (1 - progress) / self.plan.decay)

    def _chat_share(self, progress: float) -> float:
        """The part of the passes that are chats: low in the first fifth, high from two fifths on."""
        along = min(max((progress - 0.2) / 0.2, 0.0), 1.0)
        return self.plan.chat_first + along * (self.plan.chat_last - self.plan.chat_first)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def measure(self, batches: int = 8) -> dict[str, float]:
        """Mean loss in nats per token over texts and chats that were not trained on."""
        mark = token_id(self.tokenizer, END_OF_TEXT)
        prose = Prose(self._documents[::HELD_OUT], mark, 0, self.plan)
        chats = Chats(self._dialogues, self.tokenizer, 987_654_321, self.plan)
        result = {}
        for kind, source in (("prose", prose), ("chat", chats)):
            sums = [self.model.loss(*next(source)) for _ in range(batches)]
            result[kind] = sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)
        return result

    def save(self, work: Path) -> None:
        """Write the checkpoint `load` reads, and export the model as it is."""
        measured = self.measure()
        self.history.append({"step": self.step, "tokens": self.tokens, "seconds": round(self.elapsed), **measured})
        log.info("held-out loss: prose %.3f, chat %.3f", measured["prose"], measured["chat"])
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "elapsed": self.elapsed,
            "step": self.step,
            "tokens": self.tokens,
            "history": self.history,
        }
        torch.save(state, work / "checkpoint.new")
        os.replace(work / "checkpoint.new", work / "checkpoint.pt")
        self.export(work / "model")

    def load(self, work: Path) -> None:
        state = torch.load(work / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.elapsed, self.step, self.tokens = state["elapsed"], state["step"], state["tokens"]
        self.history = state["history"]

    def export(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint in bfloat16: each file complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        shape = self.model.shape
        eos = token_id(self.tokenizer, END)
        mark = token_id(self.tokenizer, END_OF_TEXT)
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(shape),
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": eos,
            "pad_token_id": mark,
        }
        # Greedy by default: of so small a model the likeliest answer is the one to show.
        generation = {"eos_token_id": [eos, mark], "pad_token_id": mark, "do_sample": False}
        training = {
            "command": "python -m sapwood.sapling.train",
            "plan": dataclasses.asdict(self.plan),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(self.elapsed),
            "steps": self.step,
            "tokens": self.tokens,
            "torch": torch.__version__,
            "history": self.history,
        }
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh_name:
            fresh = Path(fresh_name)
            weights = {f"model.{key}": value.to(torch.bfloat16) for key, value in self.model.state_dict().items()}
            save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
            save_tokenizer(self.tokenizer, fresh, shape.max_position_embeddings)
            for stem, content in (("config", config), ("generation_config", generation), ("training", training)):
                (fresh / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            (fresh / "model.safetensors").chmod(0o644)  # written as readable by its owner alone
            for file in sorted(fresh.iterdir()):
                os.replace(file, folder / file.name)


def _means(losses: dict[str, list[float]]) -> str:
    return " ".join(f"{kind} {sum(values) / len(values):.3f}" for kind, values in sorted(losses.items()))


def texts_for_tokenizer(documents: list[str], facts: Knowledge, seed: int, chats: int) -> Iterator[str]:
    """What the tokenizer's merges are chosen on: a third of the prose, and so many chats."""
    yield from documents[::3]
    conversations = Dialogues(facts).conversations(seed)
    for _ in range(chats):
        for message in next(conversations):
            yield message["role"] + "\n"
            yield message["content"]


def train(
    corpus: Path, work: Path, out: Path, plan: Plan, shape: Shape, *, resume: bool = False, compiled: bool = False
) -> Trainer:
    """Everything from the corpus to a checkpoint in `out`; `work` keeps what a resumed run needs.

    shape.vocab_size is replaced by what the tokenizer comes to, rounded up to a multiple of 64.
    """
    work.mkdir(parents=True, exist_ok=True)
    documents = prose(corpus)
    if len(documents) < 2:
        raise SystemExit(f"corpus must be a folder with gutenberg_books.jsonl.gz, got {corpus}, which has no prose")
    facts = knowledge(corpus, documents)
    saved = work / "tokenizer.json"
    if resume:
        tokenizer = Tokenizer.from_file(str(saved))
    else:
        texts = texts_for_tokenizer(documents, facts, plan.seed, plan.tokenizer_chats)
        tokenizer = train_tokenizer(texts, plan.vocab_size)
        tokenizer.save(str(saved))
    vocab = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    trainer = Trainer(plan, dataclasses.replace(shape, vocab_size=vocab), tokenizer, documents, facts)
    if resume:
        trainer.load(work)
    if compiled:
        trainer.compile()
    before = signal.signal(signal.SIGTERM, trainer.stop)
    try:
        trainer.run(work)
    finally:
        signal.signal(signal.SIGTERM, before)
    trainer.export(out)
    return trainer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sapwood.sapling.train", description="Train the demo model.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl.gz, as corpus.py lists them")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time (default: 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="where the model goes (default: into the package)")
    parser.add_argument(
        "--work", type=Path, default=Path("sapling-training"), help="checkpoints (default: ./sapling-training)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: its own choice)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if not options.corpus.is_dir():
        parser.error(f"--corpus must name a folder, got {options.corpus}")
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = Plan(minutes=options.minutes, seed=options.seed)
    trainer = train(
        options.corpus,
        options.work,
        options.out,
        plan,
        Shape(plan.vocab_size),
        resume=options.resume,
        compiled=options.compile,
    )
    log.info("%d steps, %d tokens, %.0f s; written to %s", trainer.step, trainer.tokens, trainer.elapsed, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
