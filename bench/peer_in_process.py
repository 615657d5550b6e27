"""An engine that has no server, in a process of its own: it is asked for generations over stdin and stdout.

bench/peer_process.py starts this with the peer's Python (nothing of Sapwood can be imported here), and exchanges lines
of JSON with it:

    <- {"ready": true}                                                           the weights are loaded
    -> {"prompts": [[ids], ...], "output_len": n, "concurrency": c}
    <- {"starts": [seconds, ...], "times": [[seconds of each token], ...]}       of each prompt, by time.perf_counter()
    <- {"error": "..."}                                                          instead, where it fails

Every token is greedy, and the end-of-text token ends nothing. What the engine prints goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]
# When each prompt began, and when each of its tokens came.
Times = tuple[list[float], list[list[float]]]


class InProcessEngine(Protocol):
    def generate(self, prompts: Prompts, output_len: int, concurrency: int) -> Times: ...


class OpenVino:
    """OpenVINO GenAI's ContinuousBatchingPipeline over a GGUF file, prefix caching on."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = -(-args.kv_bytes // (1 << 30))
        scheduler.max_num_seqs = args.streams
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": args.threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(args.weights, scheduler, "CPU", properties)
        self._num_requests = 0

    def _add(self, prompt: Sequence[int], output_len: int) -> Any:
        ids = self._openvino.Tensor(self._numpy.array([prompt], self._numpy.int64))
        config = self._genai.GenerationConfig(max_new_tokens=output_len, ignore_eos=True, do_sample=False)
        self._num_requests += 1
        return self._pipeline.add_request(self._num_requests, ids, config)

    def generate(self, prompts: Prompts, output_len: int, concurrency: int) -> Times:
        starts: list[float] = []
        times: list[list[float]] = [[] for _ in prompts]
        running: dict[int, Any] = {}
        while len(starts) < len(prompts) or running:
            while len(starts) < len(prompts) and len(running) < concurrency:
                running[len(starts)] = self._add(prompts[len(starts)], output_len)
                starts.append(time.perf_counter())
            self._pipeline.step()
            now = time.perf_counter()
            for i, handle in list(running.items()):
                if handle.can_read():
                    times[i] += [now] * sum(len(output.generated_ids) for output in handle.read().values())
                if handle.get_status() != self._genai.GenerationStatus.RUNNING:
                    del running[i]
        return starts, times


class HuggingFace:
    """transformers' model, its own cache and attention; prompts of one length run as one batch to the end."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            args.weights, dtype=getattr(torch, args.form), local_files_only=True
        ).eval()

    def _batch(self, prompts: Prompts, output_len: int) -> list[float]:
        times = []
        ids, cache = self._torch.tensor(prompts), None
        with self._torch.inference_mode():
            for _ in range(output_len):
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1:].argmax(dim=-1), out.past_key_values
                times.append(time.perf_counter())
        return times

    def generate(self, prompts: Prompts, output_len: int, concurrency: int) -> Times:
        begin = time.perf_counter()
        starts, times = [], []
        for first in range(0, len(prompts), concurrency):
            batch = prompts[first : first + concurrency]
            # One at a time, a request is sent when the one before it has ended; together, all at the beginning.
            starts += [time.perf_counter() if concurrency == 1 else begin] * len(batch)
            times += [self._batch(batch, output_len)] * len(batch)
        return starts, times


def serve(engine: InProcessEngine, requests: Any, answers: Any) -> None:
    """Answer each line of `requests` until they end."""
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in requests:
        asked = json.loads(line)
        try:
            starts, times = engine.generate(asked["prompts"], asked["output_len"], asked["concurrency"])
            answer: dict[str, Any] = {"starts": starts, "times": times}
        except Exception as error:  # the engine's own, of any kind: whoever asked reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("openvino", "hf"))
    parser.add_argument("weights")
    parser.add_argument("--form", required=True, help="hf: the dtype")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True, help="requests at once, at most")
    parser.add_argument("--kv-bytes", type=int, required=True, help="size of the KV cache")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    engine: InProcessEngine = OpenVino(args) if args.engine == "openvino" else HuggingFace(args)
    serve(engine, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
