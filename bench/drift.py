"""How far quantisation moves log-probabilities: Sapwood's and llama.cpp's, against the checkpoint in fp32.

    python bench/drift.py [CHECKPOINT] [--text FILE] [--tokens 400] [--work-dir DIR] [--peers llama.cpp]

For every position of one text from the 9th token on, the model's distribution of the next token, by transformers in
fp32 and by each engine. Of each engine are printed

    rms     of the difference in log-probability of the token that comes next in the text
    KL      mean divergence of the engine's distribution from fp32's, in nats

CHECKPOINT is a folder in HF format (default: the bundled model). The text is tokenised by its tokenizer.json; without
--text the tokens are drawn at random, which suits random weights. llama.cpp is built, and its files are made, in
--work-dir as bench/compare.py does; llama-server is asked for one token after each position, with the logarithms of all
probabilities. Needs torch and transformers.

Exit status: 0, 1 where llama.cpp failed, 2 where it could not begin.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import compare
import machine
import numpy as np
import peer_gguf
import peer_process
from peer_workspace import DEFAULT_ROOT, PeerError, Workspace

FIRST: Final = 8  # position of the first token that is looked at
BUNDLED: Final = Path(__file__).resolve().parent.parent / "python" / "sapwood" / "sapling" / "model"
ENGINES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "bf16": {},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4"},
        "bf16, int8 KV": {"kv_cache_dtype": "int8"},
        "int8, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
    }
)
GGUF_FORMS: Final = ("f16", "q8_0", "q4_0")
START_TIMEOUT_S: Final = 300.0

Array = np.ndarray[Any, np.dtype[np.float64]]


def log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(-1, keepdims=True)
    out: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return out


def drift(got: Array, reference: Array, following: np.ndarray[Any, Any]) -> tuple[float, float]:
    """(rms of the following tokens' differences, mean KL(reference || got)) of [positions, vocab] log-probabilities."""
    differences = (got - reference)[np.arange(len(following)), following]
    return float(np.sqrt((differences**2).mean())), float((np.exp(reference) * (reference - got)).sum(-1).mean())


def reference_logprobs(checkpoint: Path, ids: list[int]) -> Array:
    """[len(ids) - 1 - FIRST, vocab] by transformers in fp32: row i follows ids[: FIRST + i]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, FIRST - 1 : -1]
    return log_softmax(logits.double().numpy())


def sapwood_logprobs(checkpoint: Path, ids: list[int], settings: Mapping[str, Any]) -> Array:
    from sapwood import Engine

    prompts = [ids[:end] for end in range(FIRST, len(ids))]
    with Engine(checkpoint, skip_tokenizer_init=True, dtype="bfloat16", **settings) as engine:
        runner = engine._engine.model.runner
        runner.tap_logits(True)
        by_position: dict[int, Array] = {}
        for prompt in prompts:  # one after the other: all but the last token of each is in the cache
            engine.generate(prompt, {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True})
            for _, _, _, position, logits in runner.take_logits():
                by_position[position] = logits.astype(np.float64)
    return log_softmax(np.stack([by_position[len(prompt)] for prompt in prompts]))


def llama_logprobs(work: Workspace, checkpoint: Path, ids: list[int], form: str, vocab_size: int) -> Array:
    weights, port = peer_gguf.gguf(work, checkpoint, form), peer_process.free_port()
    command = [str(peer_gguf.program(work, "llama-server")), "--model", str(weights), "--host", "127.0.0.1",
               "--port", str(port), "--threads", str(machine.num_usable_cpus()), "--parallel", "1",
               "--ctx-size", str(len(ids) + 64), "--no-ui"]  # fmt: skip
    rows = []
    with peer_process.Server(command, {}, work.log(f"drift-{form}"), port) as server:
        server.wait_ready(START_TIMEOUT_S)
        for end in range(FIRST, len(ids)):
            asked = {"prompt": ids[:end], "n_predict": 1, "n_probs": vocab_size, "temperature": 0, "cache_prompt": True}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", json.dumps(asked).encode(),
                                             {"Content-Type": "application/json"})  # fmt: skip
            with urllib.request.urlopen(request) as answer:
                (token,) = json.load(answer)["completion_probabilities"]
            row = np.full(vocab_size, np.nan)
            for entry in token["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
            if np.isnan(row).any():
                raise PeerError(f"llama-server gave {len(token['top_logprobs'])} of {vocab_size} log-probabilities")
            rows.append(row)
    return np.stack(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--text", type=Path, help="file whose beginning is the text; default: random tokens")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--peers", default="llama.cpp", help='"llama.cpp" (default), or "" for Sapwood alone')
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_ROOT)
    parser.add_argument("--env", type=compare.environment, action="append", default=[], metavar="PEER=DIR")
    args = parser.parse_args(argv)
    if not (args.checkpoint / "config.json").is_file():
        parser.error(f"{args.checkpoint} has no config.json; name a folder in HF format")
    if args.peers not in ("", "llama.cpp"):
        parser.error(f'--peers: expected llama.cpp or "", got {args.peers!r}')
    vocab_size = int(json.loads((args.checkpoint / "config.json").read_text())["vocab_size"])
    if args.text is not None:
        from tokenizers import Tokenizer

        text = args.text.read_text(errors="replace")[: 64 * args.tokens]
        ids = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        ids = ids[: args.tokens]
    else:
        ids = [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, args.tokens)]
    if len(ids) < FIRST + 2:
        parser.error(f"the text has {len(ids)} tokens; give at least {FIRST + 2}")

    following = np.asarray(ids[FIRST:])
    reference = reference_logprobs(args.checkpoint, ids)
    print(f"{args.checkpoint.name}, {len(following)} positions; rms of the next token's log-probability, KL in nats")
    print(f"{'':24}{'rms':>9}{'KL':>12}")

    def report(name: str, logprobs: Callable[[], Array]) -> None:
        rms, divergence = drift(logprobs(), reference, following)
        print(f"{name:24}{rms:9.4f}{divergence:12.2e}", flush=True)

    for name, settings in ENGINES.items():
        report(f"sapwood {name}", lambda settings=settings: sapwood_logprobs(args.checkpoint, ids, settings))
    if not args.peers:
        return 0
    try:
        work = Workspace(args.work_dir, dict(args.env))
        peer_gguf.install(work)
        for form in GGUF_FORMS:
            report(f"llama.cpp {form}", lambda form=form: llama_logprobs(work, args.checkpoint, ids, form, vocab_size))
    except PeerError as error:
        print(f"llama.cpp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
