"""What `bench/gpu_suite.py --stage engine` runs beside Sapwood on the same GPU, in the same run: the same shape.

torch: a decoder as one writes it by hand, with fused qkv and gate-up products, scaled_dot_product_attention and a
static KV cache; decode of one stream is captured as a CUDA graph, which needs no host at all.

transformers: its continuous batching (generate_batch), which sets itself up as it thinks best; decode alone, from two
runs of different lengths.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import gpu_steps
import make_model
import torch
from gpu_steps import Bench, Case, Row, row
from torch.nn import functional as nn


def shape_of(bench: Bench) -> Mapping[str, Any]:
    shape = make_model.SHAPES["llama-3.1-8b"]
    return gpu_steps.tiny(shape) if bench.emulated else shape


def timed(bench: Bench, call: Any) -> float:
    devices_wait(bench)
    began = time.perf_counter()
    call()
    devices_wait(bench)
    return time.perf_counter() - began


def devices_wait(bench: Bench) -> None:
    if not bench.emulated:
        torch.cuda.synchronize()


# --- torch ----------------------------------------------------------------------------------------------------
class Decoder:
    """One sequence. Its weights are random."""

    def __init__(self, shape: Mapping[str, Any], max_len: int, device: str) -> None:
        self.shape, self.max_len, self.device = shape, max_len, device
        hidden, inter, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
        self.heads, self.kv_heads, self.dim = heads, shape["num_key_value_heads"], hidden // heads
        self.eps = shape["rms_norm_eps"]

        def matrix(rows: int, cols: int) -> torch.Tensor:
            return torch.randn(rows, cols, device=device, dtype=torch.bfloat16).mul_(cols**-0.5)

        self.table, self.head = matrix(shape["vocab_size"], hidden), matrix(shape["vocab_size"], hidden)
        self.norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
        self.layers = [
            (matrix((heads + 2 * self.kv_heads) * self.dim, hidden), matrix(hidden, heads * self.dim),
             matrix(2 * inter, hidden), matrix(hidden, inter))
            for _ in range(shape["num_hidden_layers"])
        ]  # fmt: skip
        cache = (len(self.layers), 2, 1, self.kv_heads, max_len, self.dim)
        self.cache = torch.zeros(cache, device=device, dtype=torch.bfloat16)
        angles = torch.arange(max_len, device=device)[:, None] * shape["rope_theta"] ** (
            -torch.arange(0, self.dim, 2, device=device) / self.dim
        )
        self.cos, self.sin = (f(angles).bfloat16() for f in (torch.cos, torch.sin))
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[positions], self.sin[positions]
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The likeliest token after the last one. mask: [1, max_len] over the cache; None: these are the first."""
        x, count = self.table[tokens], len(tokens)
        for i, (qkv, out, gate_up, down) in enumerate(self.layers):
            normed = nn.rms_norm(x, self.norm.shape, self.norm, self.eps)
            heads = nn.linear(normed, qkv).view(count, -1, self.dim).transpose(0, 1)[None]
            q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = self.turn(q, positions), self.turn(k, positions)
            keys, values = self.cache[i]
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            if mask is None:
                attended = nn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                attended = nn.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
            x = x + nn.linear(attended[0].transpose(0, 1).reshape(count, -1), out)
            normed = nn.rms_norm(x, self.norm.shape, self.norm, self.eps)
            gate, up = nn.linear(normed, gate_up).chunk(2, -1)
            x = x + nn.linear(nn.silu(gate) * up, down)
        last = nn.rms_norm(x[-1:], self.norm.shape, self.norm, self.eps)
        return nn.linear(last, self.head).argmax(-1)

    def step(self) -> None:
        """From self.token at self.position to the next one."""
        mask = torch.arange(self.max_len, device=self.device)[None] <= self.position
        self.token.copy_(self.forward(self.token, self.position, mask))
        self.position.add_(1)


def torch_decoder(bench: Bench) -> None:
    length = int(bench.pick(8192, 96))
    bench.measure("torch: decode 1", lambda: torch_decode(bench))
    bench.measure(f"torch: prefill {length}", lambda: torch_prefill(bench, length))


@torch.inference_mode()
def torch_decode(bench: Bench) -> Iterator[Row]:
    context_len, num_new = bench.pick((128, 256), (16, 6))
    decoder = Decoder(shape_of(bench), context_len + num_new + 16, bench.device)
    decoder.position.fill_(context_len)
    step, note = decoder.step, "launch by launch"
    if not bench.emulated:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                decoder.step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            decoder.step()
        step, note = graph.replay, "a CUDA graph"

    def run() -> None:
        decoder.position.fill_(context_len)
        for _ in range(num_new):
            step()

    run()
    took = statistics.median(timed(bench, run) for _ in range(bench.pick(3, 1)))
    yield ratio(bench, row("torch: decode 1", num_new / took, "tok/s", note=note), "decode 1")


@torch.inference_mode()
def torch_prefill(bench: Bench, length: int) -> Iterator[Row]:
    decoder = Decoder(shape_of(bench), length, bench.device)
    positions = torch.arange(length, device=bench.device)
    tokens = positions % decoder.shape["vocab_size"]
    decoder.forward(tokens, positions, None)
    took = statistics.median(
        timed(bench, lambda: decoder.forward(tokens, positions, None)) for _ in range(bench.pick(3, 1))
    )
    yield ratio(bench, row(f"torch: prefill {length}", length / took, "tok/s"), f"prefill {length}")


def ratio(bench: Bench, found: Row, ours: str) -> Row:
    """A peer's row with what ours is of it."""
    if value := bench.value(ours):
        found["ours_over_this"] = value / found["value"]
        found["note"] = "; ".join(filter(None, (found.get("note"), f"ours is {value / found['value']:.2f} of it")))
    return found


# --- transformers ---------------------------------------------------------------------------------------------
def transformers_batching(bench: Bench) -> None:
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    version = f"transformers {transformers.__version__}"
    model = functools.cache(lambda: random_llama(bench))
    for count, context_len in bench.pick(((1, 128), (64, 1024)), ((1, 16), (4, 16))):

        def take(count: int = count, context_len: int = context_len) -> Iterator[Row]:
            name = f"transformers: decode {count}"
            try:
                rate, took = continuous_batching(bench, model(), count, context_len)
            except Exception as error:  # a peer's trouble is not ours
                yield {"name": name, "skipped": f"{version}: {type(error).__name__}: {error}"[:300]}
                return
            yield ratio(bench, row(name, rate, "tok/s", note=version, all_s=took), f"decode {count}")

        bench.measure(f"transformers: decode {count}", take)


def random_llama(bench: Bench) -> Any:
    transformers: Any = importlib.import_module("transformers")
    fields = {k: v for k, v in shape_of(bench).items() if k not in ("architectures", "model_type", "torch_dtype")}
    config = transformers.LlamaConfig(**fields)
    with torch.device(bench.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def continuous_batching(bench: Bench, model: Any, count: int, context_len: int) -> tuple[float, float]:
    """(tokens a second of decode alone: how much longer a run with more new tokens takes, seconds of that run)."""
    transformers: Any = importlib.import_module("transformers")
    generator = torch.Generator().manual_seed(count)
    vocab_size = int(shape_of(bench)["vocab_size"])
    inputs = torch.randint(0, vocab_size, (count, context_len), generator=generator).tolist()
    few, many = bench.pick((16, 272), (2, 60))
    more: dict[str, Any] = {}
    if bench.emulated:  # it would take most of the machine's memory
        small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        more["continuous_batching_config"] = small

    def run(num_new: int) -> float:
        how = transformers.GenerationConfig(
            max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        began = time.perf_counter()
        found = model.generate_batch(inputs=inputs, generation_config=how, **more)
        took = time.perf_counter() - began
        made = [len(output.generated_tokens) for output in found.values()]
        if made != [num_new] * count:
            raise RuntimeError(f"asked for {count} times {num_new} tokens, got {made[:8]}")
        return took

    run(few)
    short, long = run(few), run(many)
    if long <= short:
        raise RuntimeError(f"{many} tokens took {long:.2f} s, {few} took {short:.2f} s")
    return count * (many - few) / (long - short), long


TORCH: Final = Case("torch", torch_decoder, 60)
TRANSFORMERS: Final = Case("transformers", transformers_batching, 120, "transformers")
