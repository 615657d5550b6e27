"""A request's KV bytes and logits are the same bits whatever happens around it (DESIGN 5, "Determinism").

For each ISA level this machine has, in fp32 and bf16, with KV so and in int8: alone = among 64 batch mates = after a
cache hit = in chunks of 1, 7 and 64 = after retraction = with 1 or 2 threads = with any page size, for a model with
grouped queries and QK-norm and for one with a sliding window shorter than the prompt. `tests/mutations.py` breaks each
property on purpose and expects this file to notice.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.models.loader import load

VOCAB = 331
PROMPT_LEN = 300  # past an attention chunk of 256 and into its next tile, so that prefill chunks cut both
NUM_NEW = 12

CONFIGS = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 72, "intermediate_size": 100,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "attention_bias": False, "vocab_size": VOCAB, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "sliding_window": 70, "tie_word_embeddings": False, "vocab_size": VOCAB, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


@dataclass
class Bits:
    """What one request left behind: sampled tokens, the logits each came from, and KV bytes by (layer, position)."""

    tokens: list[int]
    logits: dict[int, bytes]
    kv: dict[tuple[int, int], bytes]


class Rig:
    """The loop's calls made by hand, one step at a time, so that a scenario decides what shares a step."""

    def __init__(self, model_dir: str, **settings: Any) -> None:
        config = EngineConfig.from_kwargs(
            model_dir, load_format="dummy", skip_tokenizer_init=True, max_total_tokens=16384, max_running_requests=80,
            chunked_prefill_size=2048, **settings,
        )  # fmt: skip
        self.model = load(config)
        self.cache = _core.CacheManager(self.model.groups, self.model.num_pages)
        self.builder = _core.BatchBuilder(self.cache, 80)
        self.runner = self._runner()
        self.runner.poison_kv()  # a read of a slot nobody wrote turns into NaN
        self.runner.tap_logits(True)
        self.step_id = 0
        self.logits: dict[tuple[int, int], dict[int, bytes]] = {}  # (row, gen) -> position -> bits

    def _runner(self) -> Any:
        return self.model.runner

    def close(self) -> None:
        self.model.executor.shutdown()

    def admit(self, tokens: np.ndarray, prompt_len: int, num_new: int, seed: int) -> tuple[int, int, int]:
        return self.builder.admit(
            0, tokens.astype(np.int32), prompt_len=prompt_len, max_len=prompt_len + num_new, temperature=0.8, top_k=50,
            top_p=0.95, seed=seed,
        )  # fmt: skip

    def step(self, extends: list[tuple[int, int]]) -> dict[int, int]:
        """One step: every decode row, then the extends. Returns the token of each row that got one."""
        self.step_id += 1
        self.builder.begin_step(self.step_id)
        self.builder.add_decodes()
        for row, num_tokens in extends:
            assert self.builder.add_extend(row, num_tokens) == num_tokens
        built = self.builder.end_step()
        assert not built.blocked
        self.model.executor.submit(built.plan)
        self.model.executor.wait_idle()
        out: dict[int, int] = {}
        for kind, _, result in self.model.executor.drain():
            if kind == "result":
                assert result.error == ""
                rows, tokens, flags, _ = self.builder.commit(result)
                assert not any(f & _core.BAD_LOGITS for f in flags)
                out |= {r: t for r, t in zip(rows, tokens, strict=True) if t >= 0}
        for _, row, gen, position, logits in self.runner.take_logits():
            self.logits.setdefault((row, gen), {})[position] = logits.tobytes()
        self.builder.check_invariants()
        self.cache.check_invariants()
        return out

    def read_kv(self, row: int, into: dict[tuple[int, int], bytes]) -> None:
        """Add the KV bytes of every position of the row that is written and still has its page."""
        page_size = self.cache.page_size
        group = self.model.groups[0]
        pages = self.builder.pages(row)
        for position in range(min(self.builder.num_tokens(row) - 1, self.builder.planned_len(row))):
            page = int(pages[position // page_size])
            if page < 0:
                continue  # slid out of the window
            for layer in range(group.num_layers):
                into[layer, position] = self.runner.read_kv(0, layer, page, position % page_size)

    def generate(
        self,
        prompt: np.ndarray,
        seed: int,
        *,
        chunk: int = 10**6,
        mates: int = 0,
        retract_at: int = 0,
        flush: bool = False,
    ) -> Bits:
        """Run one request to its end in the given company and return its bits; checks nothing itself."""
        rng = np.random.default_rng(seed)
        others: list[int] = []
        for i in range(mates):
            length = int(rng.integers(3, 40))
            row, _, cached = self.admit(rng.integers(3, VOCAB, length), length, 40, seed=i)
            others.append(row)
            if i % 2:  # half of them decode by the time the request comes
                self.step([(row, length - cached)])
        waiting = [r for r in others if self.builder.phase(r) == "extend"]

        row, gen, cached = self.admit(prompt, len(prompt), NUM_NEW, seed)
        kv: dict[tuple[int, int], bytes] = {}
        logits: dict[int, bytes] = {}
        tokens: list[int] = []
        done = cached
        known = len(prompt)
        while len(tokens) < NUM_NEW:
            extends = []
            if done < known:
                take = min(chunk, known - done)
                extends = [(row, take)]
                done += take
                if waiting:  # another prompt in the same step
                    mate = waiting.pop()
                    extends.insert(0, (mate, self.builder.num_tokens(mate) - self.builder.planned_len(mate)))
            out = self.step(extends)
            if row in out:
                tokens.append(out[row])
            self.read_kv(row, kv)
            if retract_at and len(tokens) == retract_at:
                retract_at = 0
                logits |= self.logits.pop((row, gen))
                self.builder.release(row)
                if flush:
                    self.cache.flush()
                so_far = np.concatenate([prompt, np.array(tokens)])
                row, gen, done = self.admit(so_far, len(prompt), NUM_NEW, seed)
                assert (done == 0) == flush
                known = len(so_far)
        logits |= self.logits.pop((row, gen))
        for other in [*others, row]:
            self.builder.release(other)
        self.cache.check_invariants()
        return Bits(tokens, logits, kv)


def _prompt() -> np.ndarray:
    return np.random.default_rng(7).integers(3, VOCAB, PROMPT_LEN)


def assert_same(got: Bits, want: Bits, min_kv: int = 2 * 70) -> None:
    assert got.tokens == want.tokens
    assert set(got.logits) <= set(want.logits)
    assert max(got.logits) == max(want.logits)
    for position, bits in got.logits.items():
        assert bits == want.logits[position], f"logits of position {position} differ"
    assert len(got.kv) >= min_kv
    for key, bits in got.kv.items():
        assert bits == want.kv[key], f"KV of (layer, position) {key} differs"


@functools.cache
def _alone(model_dir: str, dtype: str, kv: str, isa: str) -> Bits:
    """The reference: the request alone, prompt in one chunk, one thread, page size 16."""
    rig = Rig(model_dir, dtype=dtype, kv_cache_dtype=kv, cpu_isa=isa, num_threads=1, page_size=16)
    try:
        bits = rig.generate(_prompt(), seed=5)
        rig.cache.flush()
        # Pages that slide out of a window within one chunk are gone before they can be read: small chunks have them.
        bits.kv = rig.generate(_prompt(), seed=5, chunk=7).kv | bits.kv
    finally:
        rig.close()
    assert len(bits.logits) == NUM_NEW
    assert all(np.isfinite(np.frombuffer(b, np.float32)).all() for b in bits.logits.values())
    assert len(set(bits.logits.values())) == NUM_NEW
    return bits


@pytest.fixture(params=list(CONFIGS))
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.getbasetemp() / f"bitwise-{request.param}"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    return str(directory)


@pytest.mark.parametrize("isa", _core.isa_levels())
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_company(model_dir: str, dtype: str, kv: str, isa: str) -> None:
    want = _alone(model_dir, dtype, kv, isa)
    for threads in (1, 2):
        rig = Rig(model_dir, dtype=dtype, kv_cache_dtype=kv, cpu_isa=isa, num_threads=threads, page_size=16)
        try:
            for chunk in (10**6, 64, 7, 1):
                assert_same(rig.generate(_prompt(), seed=5, chunk=chunk), want)  # the second onwards hit the cache
                rig.cache.flush()
                assert_same(rig.generate(_prompt(), seed=5, chunk=chunk), want)
            _, _, cached = hit = rig.admit(_prompt(), PROMPT_LEN, NUM_NEW, 5)
            assert cached == (PROMPT_LEN - 1) // 16 * 16
            rig.builder.release(hit[0])
            assert_same(rig.generate(_prompt(), seed=5), want)
            assert_same(rig.generate(_prompt(), seed=5, mates=63, chunk=64), want)
            rig.cache.flush()
            assert_same(rig.generate(_prompt(), seed=5, mates=63, chunk=10**6), want)
            for flush in (False, True):
                assert_same(rig.generate(_prompt(), seed=5, retract_at=6, flush=flush), want)
        finally:
            rig.close()


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [32, 64])
def test_bits_do_not_depend_on_page_size(model_dir: str, dtype: str, kv: str, page_size: int) -> None:
    isa = _core.best_isa()
    want = _alone(model_dir, dtype, kv, isa)
    rig = Rig(model_dir, dtype=dtype, kv_cache_dtype=kv, cpu_isa=isa, num_threads=2, page_size=page_size)
    try:
        for chunk in (10**6, 7):
            assert_same(rig.generate(_prompt(), seed=5, chunk=chunk), want)
            assert_same(rig.generate(_prompt(), seed=5, chunk=chunk, mates=20), want)
    finally:
        rig.close()
