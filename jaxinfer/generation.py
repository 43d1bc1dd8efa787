"""Prefill, the decode loop and scoring: pure functions over arrays, written for one shard.

The same functions run alone (ParallelContext without axes) and inside one shard_map over a mesh. With a pipeline of P stages there
are M = P micro-batches of B sequences in flight: at tick t stage s works on micro-batch (t - s) mod M, and the one that leaves the
last stage gets its token and enters the first stage at the next tick. Activations in flight are part of the state, so stopping
after a few tokens and going on does not drain the pipe.

Shapes: M micro-batches, B sequences in each, T prompt tokens, S cached tokens, D embed, E tokens that one call may emit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.layout import Plan
from jaxinfer.models.decoder import LayerSpec, cached_layers, embed, head_logits, head_token, prefill_layers
from jaxinfer.sampling import Choice, NumberedProcessors, Past, SamplingArrays, choose_tokens, vocab_shards
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.sampling import argmax, log_probs, top_log_probs


def _pytree(cls):
    fields = tuple(f.name for f in dataclasses.fields(cls))
    return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=())


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Prompts that were read: their fresh caches per layer slot [rows, K, T, H], tokens int32 [rows, T], lengths int32 [rows]; of every
    sequence that continues one of them the first new token, and how the next ones are chosen. row: int32 [sequences], the prompt of each;
    None where each prompt has one. prompt: the prompts' own tokens [rows, T] with their log-probabilities, the first of each row without
    one; None unless asked for, and not for `insert`."""

    caches: tuple[LayerCache, ...]
    tokens: jax.Array
    lengths: jax.Array
    first: Choice
    sampling: SamplingArrays
    row: jax.Array | None = None
    prompt: Choice | None = None


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a decode step changes; donated to it.

    caches: per layer slot, rows ordered by micro-batch. hidden float32 [B, D], valid bool [B]: what waits at this stage's door.
    tick: int32, since the beginning, modulo M. tokens (last ones), lengths (tokens in the cache), generated: int32 [M, B]. history: int32
    [M, B, S], prompt and text, of which lengths + 1 are real. active: bool [M, B]. sampling: of every slot, [M, B].
    """

    caches: tuple[LayerCache, ...]
    hidden: jax.Array
    valid: jax.Array
    tick: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    generated: jax.Array
    history: jax.Array
    active: jax.Array
    sampling: SamplingArrays


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Emitted:
    """What a decode call produced. choices: [M, B, E], alternatives [M, B, E, n]; counts int32 [M, B]: the real ones of E. done [M, B]."""

    choices: Choice
    counts: jax.Array
    done: jax.Array


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """logprobs float32 [B, T]: of each token given those before it, 0 for the first and for padding. greedy int32 [B, T]: the most
    likely token at that place."""

    logprobs: jax.Array
    greedy: jax.Array


def _of(array, m, count: int):
    """Micro-batch m of [M, ...]; free of a slice where there is one."""
    return array[0] if count == 1 else lax.dynamic_index_in_dim(array, m, 0, keepdims=False)


def _used(plan: Plan):
    """Which layer slots this stage uses, bool [slots], or None where every stage uses all."""
    used = plan.used
    return None if all(map(all, used)) else jnp.asarray(used)[plan.context.stage_index()]


def _pipeline(
    weights, x, lengths, plan: Plan, spec: LayerSpec, chunk: int | None = None
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Rows [B, T, D] through all stages -> (the last stage's output [B, T, D], zeros elsewhere; this stage's fresh caches [B, K, T, H])."""
    ctx, T = plan.context, x.shape[1]
    x = ctx.enter_stages(x)  # only the first stage reads it
    if chunk is not None and chunk < T:
        return _chunks(weights, x, lengths, plan, spec, chunk)
    if not ctx.split_tokens:
        return _stages(weights, x, lengths, plan, spec, T)
    x, caches = _stages(weights, ctx.own_tokens(x), lengths, plan, spec, T)
    return ctx.join_tokens(x, T), caches


def _stages(weights, x, lengths, plan: Plan, spec: LayerSpec, tokens: int) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """`_pipeline`, of this tensor shard's tokens where they are split; tokens: T, of all shards together."""
    ctx, P = plan.context, plan.context.stages
    run = functools.partial(prefill_layers, config=plan.config, spec=spec, ctx=ctx, used=_used(plan), tokens=tokens)
    if P == 1:
        return run(weights.layers, x, lengths)
    rows = x.shape[0]
    parts = P if rows % P == 0 else 1  # micro-batches, so that stages work side by side
    stage, size = ctx.stage_index(), rows // parts
    shapes = jax.eval_shape(lambda: run(weights.layers, x[:size], lengths[:size]))[1]

    def tick(t, carry):
        waiting, out, caches = carry
        m = jnp.clip(t - stage, 0, parts - 1)
        live = (t >= stage) & (t - stage < parts)
        start = m * size
        mine = jnp.where(stage == 0, lax.dynamic_slice_in_dim(x, start, size), waiting)
        y, new = run(weights.layers, mine, lax.dynamic_slice_in_dim(lengths, start, size))

        def put(whole, part):
            old = lax.dynamic_slice_in_dim(whole, start, size)
            return lax.dynamic_update_slice_in_dim(whole, jnp.where(live, part, old), start, 0)

        out = put(out, jnp.where(stage == P - 1, y, 0))
        return ctx.next_stage(y), out, jax.tree.map(put, caches, new)

    empty = jax.tree.map(lambda s: jnp.zeros((rows, *s.shape[1:]), s.dtype), shapes)
    start = (jnp.zeros((size, *x.shape[1:]), x.dtype), jnp.zeros_like(x), empty)
    _, out, caches = lax.fori_loop(0, parts + P - 1, tick, start)
    return out, caches


def _chunks(weights, x, lengths, plan: Plan, spec: LayerSpec, chunk: int) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """`_pipeline`, a chunk of tokens at a time, each over the cache of those before it: matrices are no longer than a chunk, and stages
    work side by side on chunks of one row. Work w is chunk w mod n of micro-batch w div n; at tick t stage s does work t - s."""
    ctx, P, used = plan.context, plan.context.stages, _used(plan)
    (rows, T), n = x.shape[:2], -(-x.shape[1] // chunk)
    parts = P if rows % P == 0 else 1
    stage, size = ctx.stage_index(), rows // parts
    x = jnp.pad(x, ((0, 0), (0, n * chunk - T), (0, 0)))
    fresh = functools.partial(prefill_layers, config=plan.config, spec=spec, ctx=ctx, used=used)
    shapes = jax.eval_shape(lambda: fresh(weights.layers, x[:size, :chunk], lengths[:size]))[1]

    def tick(t, carry):
        waiting, out, caches = carry
        work = t - stage
        live = (work >= 0) & (work < parts * n)
        start = jnp.where(live, work // n, 0) * size
        first = jnp.where(live, work % n, n) * chunk  # a stage without work writes behind all chunks, where nothing is read
        at = jnp.minimum(first, (n - 1) * chunk)
        mine = lax.dynamic_slice(x, (start, at, 0), (size, chunk, x.shape[2]))
        mine = mine if P == 1 else jnp.where(stage == 0, mine, waiting)
        positions = jnp.broadcast_to(first + jnp.arange(chunk, dtype=jnp.int32), (size, chunk))
        own = lax.dynamic_slice_in_dim(lengths, start, size)
        order = start + jnp.arange(size, dtype=jnp.int32)
        y, caches = cached_layers(
            weights.layers, mine, caches, positions, plan.config, spec, ctx, rows=order, used=used, lengths=own
        )
        old = lax.dynamic_slice(out, (start, at, 0), y.shape)
        out = lax.dynamic_update_slice(out, jnp.where(live & (stage == P - 1), y, old), (start, at, 0))
        return ctx.next_stage(y), out, caches

    room = lambda s: jnp.zeros((rows, s.shape[1], (n + 1) * chunk, *s.shape[3:]), s.dtype)
    begin = (jnp.zeros((size, chunk, x.shape[2]), x.dtype), jnp.zeros_like(x), jax.tree.map(room, shapes))
    _, out, caches = lax.fori_loop(0, parts * n + P - 1, tick, begin)
    return out[:, :T], jax.tree.map(lambda a: a[:, :, :T], caches)


def prefill(
    weights,
    tokens,
    lengths,
    sampling: SamplingArrays,
    row=None,
    *,
    plan: Plan,
    cache_dtype,
    top: int,
    prompt: int | None = None,
    processors: NumberedProcessors = (),
    chunk: int | None = None,
) -> Prefix:
    """Read prompts.

    tokens int32 [B, T], padded on the right; lengths int32 [B]. row: int32 [N], which of them each of N sequences continues, whose
    `sampling` is [N]; None: each prompt is continued by one. cache_dtype: of the caches. top, processors: see `choose_tokens`. prompt:
    alternatives to report for the prompts' own tokens (static); None reports nothing of them. chunk: tokens of a row that are read at once.
    """
    ctx = plan.context
    x, caches = _pipeline(weights, embed(weights, tokens, ctx), lengths, plan, plan.layer_spec.kept_in(cache_dtype), chunk)
    own = None
    if prompt is not None:
        x = ctx.from_last_stage(x)
        own = _prompt_choices(weights, x, tokens, lengths, plan, prompt)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)[:, 0]
    logits = head_logits(weights, ctx.from_last_stage(last) if prompt is None else last, plan.config, ctx)
    each = (lambda a: a) if row is None else (lambda a: a[row])
    first = choose_tokens(
        each(logits),
        sampling,
        sampling.said,
        lambda: Past(tokens=each(tokens), lengths=each(lengths), edits=sampling.edits),
        ctx,
        vocab=plan.config.vocab,
        top=top,
        processors=processors,
    )
    like = LayerCache.zeros(rows=0, kv_heads=0, tokens=0, head_dim=0, dtype=cache_dtype)
    encoded = tuple(like.encode_rows(c.k, c.v, lengths) for c in caches)
    return Prefix(caches=encoded, tokens=tokens, lengths=lengths, first=first, sampling=sampling, row=row, prompt=own)


def empty_state(plan: Plan, *, batch: int, tokens: int, cache_dtype) -> State:
    """A state without sequences, as one shard sees it: `batch` sequences per micro-batch, `tokens` cached tokens each."""
    M, B = plan.context.stages, batch
    whole = (M, B)
    cache = functools.partial(
        LayerCache.zeros,
        rows=M * B,
        kv_heads=len(plan.heads.kv[0]),
        tokens=tokens,
        head_dim=plan.config.attention.head_dim,
        dtype=cache_dtype,
    )
    return State(
        caches=tuple(cache() for _ in range(plan.slots)),
        hidden=jnp.zeros((B, plan.config.embed), jnp.float32),
        valid=jnp.zeros((B,), bool),
        tick=jnp.int32(0),
        tokens=jnp.zeros(whole, jnp.int32),
        lengths=jnp.zeros(whole, jnp.int32),
        generated=jnp.zeros(whole, jnp.int32),
        history=jnp.zeros((*whole, tokens), jnp.int32),
        active=jnp.zeros(whole, bool),
        sampling=SamplingArrays.zeros(whole),
    )


def _corner(whole, part):
    """`part` at the beginning of every axis of `whole`."""
    return lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)


def grow(state: State, *, plan: Plan, batch: int, tokens: int, cache_dtype) -> State:
    """The same sequences in a state of more sequences per micro-batch, or of more cached tokens; a slot keeps its place (m, b). The caches
    are left out, before and after: they grow one by one, so that no two of all are there at a time."""
    new = empty_state(plan, batch=batch, tokens=tokens, cache_dtype=cache_dtype)
    return jax.tree.map(_corner, dataclasses.replace(new, caches=()), state)


def grow_cache(cache: LayerCache, *, plan: Plan, batch: int, tokens: int, cache_dtype) -> LayerCache:
    """The cache of a layer slot for a state that has grown."""
    M = plan.context.stages
    by_slot = lambda tree: jax.tree.map(lambda a: a.reshape(M, a.shape[0] // M, *a.shape[1:]), tree)
    new = empty_state(plan, batch=batch, tokens=tokens, cache_dtype=cache_dtype).caches[0]
    grown = jax.tree.map(_corner, by_slot(new), by_slot(cache))
    return jax.tree.map(lambda a: a.reshape(M * batch, *a.shape[2:]), grown)


def _marked(state: State, slots):
    """Which slots are among `slots`, int32 [n], of which -1 is none: bool [M, B]."""
    M, B = state.tokens.shape
    return jnp.zeros((M * B,), bool).at[jnp.where(slots >= 0, slots, M * B)].set(True, mode="drop").reshape(M, B)


def _forget(state: State, slots, plan: Plan):
    """`valid` without what is in flight for some slots, bool [M, B]: it belongs to their former sequences."""
    M = plan.context.stages
    return state.valid & ~_of(slots, jnp.mod(state.tick - plan.context.stage_index(), M), M)


def insert(prefix: Prefix, state: State, slots, *, plan: Plan) -> State:
    """Put the sequences of a prefix into slots, int32 [sequences of the prefix]; -1 leaves one out."""
    M, B, S = state.history.shape
    rows, width = slots.shape[0], prefix.tokens.shape[1]
    each = (lambda a: a) if prefix.row is None else (lambda a: a[prefix.row])
    tokens, lengths = each(prefix.tokens), each(prefix.lengths)
    caches = state.caches
    for i in range(rows):
        start, keep = jnp.maximum(slots[i], 0), slots[i] >= 0

        def put_row(cache, fresh, i=i, start=start, keep=keep):
            at = (start, *[0] * (cache.ndim - 1))
            fresh = fresh[:, :, : cache.shape[2]]
            part = fresh[i : i + 1] if prefix.row is None else lax.dynamic_slice_in_dim(fresh, prefix.row[i], 1)
            old = lax.dynamic_slice(cache, at, part.shape)
            return lax.dynamic_update_slice(cache, jnp.where(keep, part, old), at)

        caches = jax.tree.map(put_row, caches, prefix.caches)

    def put(whole, values):
        flat = whole.reshape(M * B, *whole.shape[2:])
        return flat.at[jnp.where(slots >= 0, slots, M * B)].set(values, mode="drop").reshape(whole.shape)

    first, sampling = prefix.first.token, prefix.sampling
    # no `.at[:, :width].set`: where width is S that is a scatter without an index, which crashes XLA's partitioner
    history = jnp.pad(tokens[:, :S], ((0, 0), (0, max(S - width, 0))))
    return State(
        caches=caches,
        hidden=state.hidden,
        valid=_forget(state, _marked(state, slots), plan),
        tick=state.tick,
        tokens=put(state.tokens, first),
        lengths=put(state.lengths, lengths),
        generated=put(state.generated, sampling.said + 1),
        history=put(state.history, history.at[jnp.arange(rows), lengths].set(first, mode="drop")),
        active=put(state.active, (sampling.limit > sampling.said + 1) & ~jnp.any(first[:, None] == sampling.stop_tokens, -1)),
        sampling=jax.tree.map(put, state.sampling, sampling),
    )


def free(state: State, slots, *, plan: Plan) -> State:
    """Stop the sequences in slots, int32 [n]; -1 is none."""
    gone = _marked(state, slots)
    return dataclasses.replace(state, active=state.active & ~gone, valid=_forget(state, gone, plan))


def decode(weights, state: State, steps, *, plan: Plan, top: int, processors: NumberedProcessors = ()) -> tuple[State, Emitted]:
    """Up to `steps` tokens for every active sequence, int32 scalar, at most as many as the cache holds; ends when none is active.

    top, processors: see `choose_tokens`.
    """
    M, B = state.tokens.shape
    capacity = state.caches[0].tokens
    choices = Choice(
        token=jnp.zeros((M, B, capacity), jnp.int32),
        logprob=jnp.zeros((M, B, capacity), jnp.float32),
        top_logprobs=jnp.zeros((M, B, capacity, top), jnp.float32),
        top_ids=jnp.zeros((M, B, capacity, top), jnp.int32),
    )
    emitted = Emitted(choices=choices, counts=jnp.zeros((M, B), jnp.int32), done=~state.active)
    ticks = jnp.minimum(steps, capacity) * M

    def more(carry):
        n, state, _ = carry
        going = jnp.any(state.active)
        if plan.context.rows:  # every shard runs as many ticks as the longest: one count of them serves all
            going = plan.context.max_over_rows(going.astype(jnp.int32)) > 0
        return (n < ticks) & going

    def body(carry):
        n, state, emitted = carry
        state, emitted = _tick(weights, state, emitted, plan, top, processors)
        return n + 1, state, emitted

    _, state, emitted = lax.while_loop(more, body, (jnp.int32(0), state, emitted))
    return state, emitted


def _tick(
    weights, state: State, emitted: Emitted, plan: Plan, top: int, processors: NumberedProcessors
) -> tuple[State, Emitted]:
    """One micro-batch forward on every stage, and a token for the one that leaves the last."""
    ctx, config = plan.context, plan.config
    M, B = state.tokens.shape
    stage, t = ctx.stage_index(), state.tick
    enters, here, leaves = jnp.mod(t, M), jnp.mod(t - stage, M), jnp.mod(t + 1, M)  # leaves: t - (M - 1)

    x = embed(weights, _of(state.tokens, enters, M), ctx, positions=_of(state.lengths, enters, M))
    valid = _of(state.active, enters, M)
    if M > 1:
        x, valid = jnp.where(stage == 0, x, state.hidden), jnp.where(stage == 0, valid, state.valid)
    positions = jnp.minimum(_of(state.lengths, here, M), state.caches[0].tokens - 1)  # a row that is full has ended
    rows = None if M == 1 else here * B + jnp.arange(B, dtype=jnp.int32)
    y, caches = cached_layers(
        weights.layers,
        x[:, None],
        state.caches,
        positions[:, None],
        config,
        plan.layer_spec,
        ctx,
        rows=rows,
        used=_used(plan),
    )
    y = y[:, 0]

    accepted = valid
    last = y
    if M > 1:
        # validity travels with the activations: one collective for both
        joined = ctx.from_last_stage(jnp.concatenate([y, valid[:, None].astype(y.dtype)], -1))
        last, accepted = joined[:, :-1], joined[:, -1] > 0
    # edits are large and seldom used: they, and the history, are taken from the state only where a row asks for them
    taken = lambda tree: jax.tree.map(lambda a: _of(a, leaves, M), tree)
    sampling = taken(dataclasses.replace(state.sampling, edits=None))  # type: ignore[arg-type]
    generated, active, lengths = taken((state.generated, state.active, state.lengths))
    past = lambda: Past(tokens=taken(state.history), lengths=lengths + 1, edits=taken(state.sampling.edits))
    logits = lambda: head_logits(weights, last, config, ctx)
    likeliest = None
    if weights.uses_sketch(B) and not top:
        likeliest = lambda: head_token(weights, last, config, vocab_shards(ctx, weights.table.shape[0]))
    choice = choose_tokens(
        logits() if likeliest is None else logits,
        sampling,
        generated,
        past,
        ctx,
        vocab=config.vocab,
        top=top,
        processors=processors,
        live=active,
        likeliest=likeliest,
    )

    accepted = accepted & active
    generated = generated + accepted
    ended = jnp.any(choice.token[:, None] == sampling.stop_tokens, -1) | (generated >= sampling.limit)
    counts = _of(emitted.counts, leaves, M)
    place = jnp.where(accepted, counts, emitted.choices.token.shape[2])  # past the end: dropped

    said = jnp.where(accepted, lengths + 1, state.history.shape[2])

    def emit(whole, value, place=place):
        return whole.at[leaves, jnp.arange(B), place].set(value, mode="drop")

    def put(whole, value):
        return whole.at[leaves].set(value)

    if M > 1:
        moved = ctx.next_stage(jnp.concatenate([y, valid[:, None].astype(y.dtype)], -1))
        hidden, waiting = moved[:, :-1], moved[:, -1] > 0
    else:
        hidden, waiting = state.hidden, state.valid
    still = active & ~(accepted & ended)
    new_state = State(
        caches=caches,
        hidden=hidden,
        valid=waiting,
        tick=jnp.mod(t + 1, M),
        tokens=put(state.tokens, jnp.where(accepted, choice.token, _of(state.tokens, leaves, M))),
        lengths=put(state.lengths, lengths + accepted),
        generated=put(state.generated, generated),
        history=emit(state.history, choice.token, said),
        active=put(state.active, still),
        sampling=state.sampling,
    )
    return new_state, Emitted(
        choices=jax.tree.map(emit, emitted.choices, choice),
        counts=put(emitted.counts, counts + accepted),
        done=put(emitted.done, ~still),
    )


def forward(weights, tokens, lengths, *, plan: Plan) -> jax.Array:
    """Logits float32 [B, T, V] of whole rows: the module's call on placed weights, with gradients that are right inside shard_map.

    tokens int32 [B, T], padded on the right; lengths int32 [B]. Gradients of weights that several shards hold whole are whole on each;
    under data and expert axes they are of the local rows, to be summed over both, but for those of split experts, which have the rows of
    all expert shards.
    """
    ctx = plan.context
    x, _ = _pipeline(weights, embed(weights, tokens, ctx), lengths, plan, plan.layer_spec)
    logits = head_logits(weights, ctx.from_last_stage(x), plan.config, ctx)
    return ctx.gather_vocab(logits)[..., : plan.config.vocab]


SCORE_CHUNK = 128  # tokens of a row whose logits are in memory at once
SCORE_TOKENS = 512  # of all rows together, where a row has one at least


def _over_tokens(look, weights, x, tokens, plan: Plan):
    """look(logits [N, V] of this shard, the tokens int32 [N] that follow them) -> a tree of [N, ...], for all tokens but the first of each
    row, a few at a time: a tree of [B, T, ...], 0 for the first. x float32 [B, T, D], whole on every stage; tokens int32 [B, T]."""
    B, T = tokens.shape
    x, targets = x[:, :-1], tokens[:, 1:]
    chunk = max(1, min(SCORE_CHUNK, SCORE_TOKENS // B, T - 1))
    pad = -(T - 1) % chunk
    x, targets = jnp.pad(x, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))
    split = lambda a: jnp.swapaxes(a.reshape(B, -1, chunk, *a.shape[2:]), 0, 1)

    def part(xs):
        h, target = xs
        found = look(head_logits(weights, h.reshape(B * chunk, -1), plan.config, plan.context), target.reshape(-1))
        return jax.tree.map(lambda a: a.reshape(B, chunk, *a.shape[1:]), found)

    def join(a):
        a = jnp.swapaxes(a, 0, 1).reshape(B, T - 1 + pad, *a.shape[3:])[:, : T - 1]
        return jnp.pad(a, ((0, 0), (1, 0), *[(0, 0)] * (a.ndim - 2)))

    return jax.tree.map(join, lax.map(part, (split(x), split(targets))))


def _prompt_choices(weights, x, tokens, lengths, plan: Plan, top: int) -> Choice:
    """The tokens of prompts [B, T] as if they had been chosen, with `top` alternatives; 0 for the first of a row and for padding."""

    def look(logits, token):
        shards = vocab_shards(plan.context, logits.shape[-1])
        none = (jnp.zeros((*token.shape, 0), jnp.float32), jnp.zeros((*token.shape, 0), jnp.int32))
        values, ids = top_log_probs(logits, top, shards) if top else none
        return Choice(token=token, logprob=log_probs(logits, token, shards), top_logprobs=values, top_ids=ids)

    found = dataclasses.replace(_over_tokens(look, weights, x, tokens, plan), token=tokens)
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jax.tree.map(lambda a: jnp.where(real.reshape(*real.shape, *[1] * (a.ndim - 2)), a, 0), found)


def score(weights, tokens, lengths, *, plan: Plan, chunk: int | None = None) -> Scores:
    """Log-probability of every token given those before it. tokens int32 [B, T], padded on the right; lengths int32 [B]. chunk: see
    `prefill`."""
    x, _ = _pipeline(weights, embed(weights, tokens, plan.context), lengths, plan, plan.layer_spec, chunk)

    def look(logits, token):
        shards = vocab_shards(plan.context, logits.shape[-1])
        return Scores(logprobs=log_probs(logits, token, shards), greedy=argmax(logits, shards))

    found = _over_tokens(look, weights, plan.context.from_last_stage(x), tokens, plan)
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jax.tree.map(lambda a: jnp.where(real, a, 0), found)
