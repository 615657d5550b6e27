"""engine/output.py: stop rules, held-back text, deltas."""

from __future__ import annotations

import random

import pytest

from sapwood import _core
from sapwood.engine.output import OutputProcessor, StopMatcher
from sapwood.request import FinishReason, RequestOutput, SamplingParams

STOP, LENGTH = _core.FINISHED_STOP, _core.FINISHED_LENGTH


class Pieces:
    """A detokenizer whose token i is pieces[i]."""

    def __init__(self, pieces: list[str], tail: str = "", fail_at: int = -1, fail_flush: bool = False) -> None:
        self.pieces, self.tail, self.fail_at, self.fail_flush = pieces, tail, fail_at, fail_flush

    def push(self, token_id: int) -> str:
        if token_id == self.fail_at:
            raise ValueError("no such piece")
        return self.pieces[token_id]

    def flush(self) -> str:
        if self.fail_flush:
            raise ValueError("cannot flush")
        return self.tail


def run(
    pieces: list[str], *, stream: bool = False, tail: str = "", last_flags: int = LENGTH, **params: object
) -> tuple[RequestOutput, list[RequestOutput]]:
    """All outputs of a request whose tokens are pieces in order: the joined one, and each."""
    output = OutputProcessor(
        "r",
        SamplingParams(**params),
        num_prompt=3,
        decoder=Pieces(pieces, tail),
        stream=stream,  # type: ignore[arg-type]
    )
    outputs = []
    for i in range(len(pieces)):
        ended = output.push(i, last_flags if i == len(pieces) - 1 else 0, -float(i))
        if stream or ended:
            outputs.append(output.take())
        if ended:
            break
    joined = RequestOutput(
        "r",
        "".join(o.text for o in outputs),
        [t for o in outputs for t in o.token_ids],
        outputs[-1].finish_reason,
        outputs[-1].usage,
        matched_stop=outputs[-1].matched_stop,
        logprobs=[p for o in outputs for p in o.logprobs or []],
    )
    return joined, outputs


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The oracle: character by character, the first moment a stop string is complete; the longest of several."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_stop_string_across_tokens_cuts_before_it() -> None:
    joined, outputs = run(["He", "llo S", "TO", "P there"], stream=True, stop="STOP")
    assert joined.text == "Hello "
    assert joined.finish_reason == FinishReason.STOP
    assert joined.matched_stop == "STOP"
    assert joined.token_ids == [0, 1, 2, 3]  # the tokens that made it are part of the request
    assert [o.text for o in outputs] == ["He", "llo ", "", ""]


def test_only_a_possible_stop_is_held_back() -> None:
    _, outputs = run(["a\n", "b", "\n\n", "c"], stream=True, stop=["\n\n"], last_flags=0 | LENGTH)
    assert [o.text for o in outputs] == ["a", "\nb", ""]
    _, outputs = run(["a\n", "b\n", "c\n"], stream=True, stop=["\n\n"])
    assert [o.text for o in outputs] == ["a", "\nb", "\nc\n"]  # the end releases what was held


def test_matcher_equals_the_oracle_however_the_text_is_cut() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 24)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        want, want_stop = first_stop(text, stops)
        matcher, said, stop, at = StopMatcher(stops), "", None, 0
        while at < len(text) and stop is None:
            size = rng.randrange(1, 5)
            new, stop = matcher.feed(text[at : at + size])
            said += new
            at += size
            assert want.startswith(said), (text, stops)  # nothing that a stop takes away was ever said
            if stop is None:
                held = text[:at][len(said) :]
                assert not held or any(s.startswith(held) and s != held for s in stops)  # never held without reason
        if stop is None:
            said += matcher.flush()
        assert (said, stop) == (want, want_stop), (text, stops)


@pytest.mark.parametrize("stream", [False, True])
def test_streamed_text_is_the_text(stream: bool) -> None:
    pieces = ["Once", " upon", " a", " ti", "me.", "\n", "\nThe"]
    joined, _ = run(pieces, stream=stream, stop=["\n\nX", "zz"], return_logprob=True, tail="\ufffd")
    assert joined.text == "".join(pieces) + "\ufffd"
    assert joined.token_ids == list(range(7))
    assert joined.logprobs == [-float(i) for i in range(7)]


def test_eos_is_a_token_but_no_text() -> None:
    joined, _ = run(["Hi", "</s>"], last_flags=STOP)
    assert (joined.text, joined.token_ids, joined.finish_reason, joined.matched_stop) == (
        "Hi",
        [0, 1],
        FinishReason.STOP,
        1,
    )
    assert joined.usage.completion_tokens == 2


def test_eos_releases_held_text() -> None:
    joined, outputs = run(["Hi S", "</s>"], stream=True, last_flags=STOP, stop="STOP")
    assert [o.text for o in outputs] == ["Hi ", "S"]
    assert joined.matched_stop == 1


def test_stop_strings_do_not_count_before_min_new_tokens() -> None:
    pieces = ["a", "b", "c", "b", "d"]
    assert run(pieces, stop="b")[0].text == "a"
    assert run(pieces, stop="b", min_new_tokens=2)[0].text == "abc"
    # A stop may begin among the first tokens and end behind them.
    assert run(pieces, stop="bc", min_new_tokens=2)[0].text == "a"
    assert run(pieces, stop="bc", min_new_tokens=3)[0].text == "abcbd"


def test_tail_of_the_detokenizer_can_complete_a_stop() -> None:
    joined, _ = run(["x", "y"], stop="y!", tail="!")
    assert (joined.text, joined.finish_reason, joined.matched_stop) == ("x", FinishReason.STOP, "y!")


def test_abort_keeps_the_text_so_far() -> None:
    output = OutputProcessor("r", SamplingParams(stop="STOP"), num_prompt=1, decoder=Pieces(["a ST"]), stream=False)
    output.push(0, 0, 0.0)
    output.finish(FinishReason.ABORT, "deadline")
    taken = output.take()
    assert (taken.text, taken.finish_reason, taken.error) == ("a ST", FinishReason.ABORT, "deadline")
    output.finish(FinishReason.STOP)  # the first end counts
    assert output.take().finish_reason == FinishReason.ABORT


def test_detokenizer_trouble() -> None:
    output = OutputProcessor("r", SamplingParams(), num_prompt=1, decoder=Pieces(["a", "b"], fail_at=1), stream=False)
    output.push(0, 0, 0.0)
    with pytest.raises(ValueError, match="no such piece"):
        output.push(1, 0, 0.0)
    output = OutputProcessor("r", SamplingParams(), num_prompt=1, decoder=Pieces(["a"], fail_flush=True), stream=False)
    assert output.push(0, LENGTH, 0.0)
    taken = output.take()
    assert taken.text == "a"
    assert taken.finish_reason == FinishReason.ABORT
    assert "cannot flush" in str(taken.error)


def test_without_a_detokenizer_there_is_no_text() -> None:
    output = OutputProcessor("r", SamplingParams(), num_prompt=1, decoder=None, stream=True, seed=5, index=2)
    assert not output.push(4, 0, 0.0)
    taken = output.take()
    assert (taken.text, taken.token_ids, taken.seed, taken.index) == ("", [4], 5, 2)
    assert output.push(6, LENGTH, 0.0)
    assert output.take().token_ids == [6]
