"""One StepPlan: the scheduler's decisions carried out on rows and pages, in a handful of native calls.

Receives requests through engine/scheduler.py and, from engine/engine.py, the moment to plan; hands a `_core.BuiltStep`
back, and the requests that turned out to be impossible. The BatchBuilder does all that is per row, per token or per
page: nothing here loops over decoding rows, except when memory has run out.
"""

from __future__ import annotations

from collections.abc import Sequence

from sapwood import _core
from sapwood.engine.request_state import Phase, RequestState
from sapwood.engine.scheduler import MAX_FOLLOWERS, Scheduler, StepBudget
from sapwood.errors import InternalError
from sapwood.memory.prefix_cache import PagePool
from sapwood.request import ErrorType

# The batch builder's top_k is an int32; no vocabulary is larger.
MAX_TOP_K = 2**31 - 1


class Planner:
    """Rows and the step that is being built. Not thread safe; owned by the loop.

    Invariants (between calls): by_row[row] is the request of phase EXTEND, DECODE or DRAINING that has the row, or
    None; `extending` holds those of phase EXTEND, foremost first; decode_kv is the sum of num_tokens over those of
    phase DECODE.
    """

    def __init__(
        self,
        builder: _core.BatchBuilder,
        cache: _core.CacheManager,
        pool: PagePool,
        scheduler: Scheduler,
        max_rows: int,
    ) -> None:
        self._builder = builder
        self._cache = cache
        self._pool = pool
        self._scheduler = scheduler
        self.max_rows = max_rows
        self.by_row: list[RequestState | None] = [None] * max_rows
        self.extending: list[RequestState] = []
        self.draining: list[RequestState] = []
        self.num_rows = 0
        self.num_decoding = 0
        self.decode_kv = 0
        self.num_retractions = 0
        self._now = 0.0  # of the step that is being planned
        self._starved = False
        # Admission failed for this request with so many pages to be had and to be reserved: not tried again before that
        # changes.
        self._no_room: tuple[RequestState, int, int] | None = None
        # Requests found impossible during build(), with the reason; engine.py ends them.
        self.failures: list[tuple[RequestState, str, ErrorType]] = []

    def has_work(self) -> bool:
        return self.num_rows > 0 or len(self._scheduler) > 0

    def running(self) -> list[RequestState]:
        """Requests that have a row. O(rows)."""
        return [req for req in self.by_row if req is not None]

    def build(self, step_id: int, now: float, num_in_flight: int) -> _core.BuiltStep | None:
        """Plan a step; None when there is nothing to compute now.

        Decodes first, then prompts already begun, then newcomers: a newcomer is admitted after its leader's chunk was
        planned, so that it finds the leader's pages; only an urgent one goes first. `failures` lists who cannot go on.
        """
        self._now = now
        builder = self._builder
        builder.begin_step(step_id)
        num_decodes = builder.add_decodes() if self.num_decoding else 0
        self._starved = False
        if self.extending or len(self._scheduler):
            budget = self._scheduler.budget(num_decodes, self.decode_kv)
            self._admit_urgent()
            self._continue_prompts(budget)
            if len(self._scheduler):
                if not self._starved and budget.tokens > 0 and not self.draining:
                    self._admit_waiting(budget, now)
                self._scheduler.end_pass()
        built = builder.end_step()
        if built.blocked or self._starved:
            self._relieve(built, num_in_flight)
        elif (
            built.plan is None
            and num_in_flight == 0
            and self.num_rows == 0
            and len(self._scheduler)
            and not self.failures
        ):
            # Nothing runs, nothing is on its way, and still the first in the queue was not admitted.
            refused = self._no_room[0] if self._no_room is not None else self._scheduler.peek()
            if refused is not None and refused.phase == Phase.WAITING:
                self.failures.append((refused, self._too_large(refused), ErrorType.CAPACITY))
            self._no_room = None
        return built if built.plan is not None else None

    # --- prompts

    def _continue_prompts(self, budget: StepBudget) -> None:
        """Every prompt begun gets its share, foremost first; each leaves some to those behind it."""
        if not self.extending:
            return
        others = sum(len(r.known) - r.planned_len for r in self.extending)
        waiting = self._scheduler.peek()
        # Who waits for a prefix that is being computed takes nothing: the sooner its leader is done, the better.
        if (
            waiting is not None
            and self._builder.num_free_rows > 0
            and self._builder.pending_prefix(waiting.ns, waiting.known) <= 0
        ):
            others += len(waiting.known)
        for req in list(self.extending):  # who gets its last token leaves the list
            others -= len(req.known) - req.planned_len
            share = self._scheduler.share(budget, req, others)
            if share <= 0 or self._starved:
                return
            self._extend(req, share, budget)

    def _extend(self, req: RequestState, num_tokens: int, budget: StepBudget) -> None:
        if num_tokens <= 0:
            return
        granted = self._builder.add_extend(req.row, num_tokens)
        if granted < num_tokens:
            self._starved = True
        if granted <= 0:
            return
        budget.charge(req.planned_len, granted)
        req.planned_len += granted
        if req.planned_len >= len(req.known):
            req.phase = Phase.DECODE
            self.extending.remove(req)
            self.num_decoding += 1
            self.decode_kv += req.num_tokens

    def _admit_urgent(self) -> None:
        """Who precedes every prompt begun gets its row, and so its share, before they take theirs. One a step."""
        if not self.extending or self.draining or self._builder.num_free_rows <= 0:
            return
        req = self._scheduler.urgent(self.extending[0])
        if req is not None and self._builder.pending_prefix(req.ns, req.known) <= 0:
            self._admit(req)

    def _admit_waiting(self, budget: StepBudget, now: float) -> None:
        if self._builder.num_free_rows <= 0:
            return
        num_followers = 0
        for req in self._scheduler.candidates(now, self._match_many):
            if self._builder.num_free_rows <= 0 or budget.tokens <= 0:
                return
            if self.extending and self._builder.pending_prefix(req.ns, req.known) > 0:
                # Its prefix is being computed: a step's wait is cheaper than computing it twice.
                num_followers += 1
                if num_followers > MAX_FOLLOWERS:
                    return
                continue
            if budget.allow(0, 1) <= 0:
                return
            if not self._admit(req):
                return
            allowed = budget.allow(req.planned_len, len(req.known) - req.planned_len)
            self._extend(req, allowed, budget)
            if self._starved:
                return

    def _match_many(self, reqs: Sequence[RequestState]) -> list[int]:
        return self._cache.match_many([r.ns for r in reqs], [r.known for r in reqs])

    def _admit(self, req: RequestState) -> bool:
        """Give req a row, if the pages its prompt still needs are there beside one for every running row."""
        pool = self._pool
        reserve = self._scheduler.reserve_pages(req, self.num_rows)
        # What prompts in flight have been admitted for and not yet reserved.
        reserve += sum(pool.pages_for(len(r.known) + 1) - pool.pages_for(r.planned_len) for r in self.extending)
        tried = (req, self._cache.available_pages(), reserve)
        if tried == self._no_room and self.num_rows:
            return False
        # Room for the token after the last known one, so that a row never stops before its first output.
        total = pool.pages_for(len(req.known) + 1)
        # Pages found in the cache may count among the evictable now and no longer once locked: sure only after the
        # fact.
        certain = pool.has_room(total, reserve)
        if not certain:
            matched = self._cache.match(req.ns, req.known)
            if not pool.has_room(total - matched // pool.page_size, reserve):
                self._no_room = tried
                return False
        p = req.params
        try:
            row, _, cached = self._builder.admit(
                req.ns,
                req.known,
                prompt_len=req.num_prompt,
                max_len=req.max_len,
                min_len=min(req.min_len, req.max_len),
                temperature=p.temperature,
                top_k=min(max(0, p.top_k), MAX_TOP_K),
                top_p=p.top_p,
                min_p=p.min_p,
                seed=req.seed,
                stream=req.choice,
                rope_mode=req.rope_mode,
                return_logprob=p.return_logprob,
                stop_ids=req.stop_ids,
            )
        except (TypeError, ValueError, OverflowError) as error:  # _core.InvalidArgument is a ValueError
            # Whatever the native call cannot take is this request's own trouble: the others go on.
            self.failures.append((req, f"refused by the batch builder: {error}", ErrorType.INTERNAL))
            return False
        if not certain and not pool.has_room(total - cached // pool.page_size, reserve):
            self._builder.release(row, keep=False)
            self._no_room = (req, self._cache.available_pages(), reserve)
            return False
        self._no_room = None
        self._scheduler.remove(req)
        req.row = row
        req.planned_len = cached
        if req.cached_len < 0:
            req.cached_len = cached
            req.admitted_s = self._now
            if req.output is not None:
                req.output.cached_len = cached
        req.phase = Phase.EXTEND
        holder = self.by_row[row]
        if holder is not None:
            raise InternalError(f"row {row} was given to {req.id!r} while {holder.id!r} has it")
        self.by_row[row] = req
        self.num_rows += 1
        self._insert_extending(req)
        return True

    def _insert_extending(self, req: RequestState) -> None:
        """Foremost first: in the queue's order, so that a prompt of higher priority passes one that is half done."""
        at = len(self.extending)
        while at > 0 and self.extending[at - 1].order > req.order:
            at -= 1
        self.extending.insert(at, req)

    # --- giving rows back

    def forget(self, req: RequestState, *, keep: bool = True, failed: bool = False) -> None:
        """Release req's row. Pages a launched step names come free when that step retires."""
        self._builder.release(req.row, keep, failed)
        self.by_row[req.row] = None
        self.num_rows -= 1
        self._leave(req)
        if req.phase == Phase.DRAINING:
            self.draining.remove(req)
        req.row = -1

    def _leave(self, req: RequestState) -> None:
        if req.phase == Phase.DECODE:
            self.num_decoding -= 1
            self.decode_kv -= req.num_tokens
        elif req.phase == Phase.EXTEND:
            self.extending.remove(req)

    def drain(self, req: RequestState) -> None:
        """Leave req out of new plans; requeue() it once no launched step names it."""
        self._builder.pause(req.row)
        self._leave(req)
        req.phase = Phase.DRAINING
        self.draining.append(req)

    def requeue_drained(self) -> bool:
        """Send drained requests back to the queue with their tokens so far; whether there were any."""
        done = [r for r in self.draining if self._builder.in_flight(r.row) == 0]
        for req in done:
            # Computed pages stay in the cache, evictable: on return it recomputes only what was evicted meanwhile. A
            # row whose shared prefix was invalidated has none worth keeping.
            failed = not self._builder.valid(req.row)
            self.forget(req, keep=not failed, failed=failed)
            req.known = req.all_tokens()
            req.planned_len = 0
            req.num_retractions += 1
            self.num_retractions += 1
            req.phase = Phase.WAITING
            self._scheduler.push_again(req)
        return bool(done)

    def drain_invalid(self) -> None:
        """A leader's computation was worthless: whoever shares its pages computes again. O(rows)."""
        for req in self.running():
            if req.phase != Phase.DRAINING and not self._builder.valid(req.row):
                self.drain(req)

    def _relieve(self, built: _core.BuiltStep, num_in_flight: int) -> None:
        """Rows could not get a page. Wait where memory is on its way, else choose who gives some back."""
        if self.draining:
            return
        num_in_flight += built.plan is not None
        if num_in_flight and (self._pool.in_limbo() or not built.blocked):
            # A prompt may wait as long as others make progress: they end, or block and choose a victim themselves.
            return
        running = self.running()
        victims = self._scheduler.victims(running, max(1, len(built.blocked)))
        for victim in victims:
            self.drain(victim)
        if victims or num_in_flight:
            return
        # The last row has the whole pool to itself and still lacks a page.
        for req in running:
            self.failures.append((req, self._too_large(req), ErrorType.CAPACITY))

    def _too_large(self, req: RequestState) -> str:
        pool = self._pool
        return (
            f"KV pool exhausted: the request has {req.num_tokens} tokens and needs "
            f"{pool.pages_for(req.num_tokens + 1)} pages of {pool.page_size}, the pool has {min(pool.num_pages)} "
            f"({pool.capacity_tokens()} tokens); raise --max-total-tokens or lower max_new_tokens"
        )
