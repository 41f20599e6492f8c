"""Bytes on one accelerator by part, in each phase of an iteration."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlmod.commands.plan import activations
from rlmod.commands.plan.run import Model, Run
from rlmod.model.logprobs import ENTRIES_PER_CHUNK
from rlmod.sampler._sampling import CACHE_GROWTH

PARTS = (
    "parameters",
    "gradients",
    "optimizer state",
    "weights gathered",
    "16-bit copies",
    "ddp buckets",
    "activations",
    "log-probability chunks",
    "backward pass",
    "update",
    "KV cache",
    "prefill and logits",
    "engine",
    "guide",
    "reference",
)


@dataclass(frozen=True)
class Phase:
    """The moment of a phase at which memory peaks."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def phases(run: Run) -> list[Phase]:
    """Return validation and the log-prob pass (if the run has them), sampling, training, and the optimizer's update."""
    validates = run.validation_rows and not run.sampling.engine
    sampled = min(run.sampling.rows_per_batch or run.on_policy_rows, run.on_policy_rows)
    return [
        *([_peak_moment("validation", _sampling(run, run.validation_rows))] if validates else []),
        _peak_moment("sampling", _sampling(run, sampled)),
        *([_peak_moment("log-prob pass", _logprob_pass(run))] if needs_logprob_pass(run) else []),
        _peak_moment("training", _training(run)),
        _peak_moment("update", [_update(run)]),
    ]


def peak(run: Run) -> Phase:
    """Return the phase that needs the most memory."""
    return max(phases(run), key=lambda phase: phase.total)


def fits(run: Run, phase: str | None = None) -> bool:
    """Return True if every phase fits, or only the phase of that name if one is given and exists."""
    available = (run.hardware.memory_gib - run.hardware.reserve_gib) * 2**30
    named = [p for p in phases(run) if p.name == phase] or phases(run)
    return all(p.total <= available for p in named)


def needs_logprob_pass(run: Run) -> bool:
    """Return True if a reference, the guide's rows or an engine (which gives no entropies) need forward passes without gradients."""
    return run.reference is not None or run.guide_rows > 0 or run.sampling.engine


def persistent_memory(run: Run) -> dict[str, float]:
    """Return the bytes that every phase holds, by part.

    Gradients are among them: Lightning frees them only before the next backward pass, so they are held while the policy samples.
    """
    shards, on_device = run.shards, not run.offload
    weights = run.shape.parameters * run.weight_width + (run.trained_parameters * 4 if run.adapter else 0)
    trained = run.trained_parameters * run.trained_width
    return {
        "parameters": on_device * weights / shards,
        "gradients": on_device * trained / shards,
        "optimizer state": on_device * run.optimizer_states * trained / shards,
        "weights gathered": weights if run.strategy == "fsdp" else 0,  # the copy used for sampling is kept
        "ddp buckets": trained if run.strategy == "ddp" and run.ranks > 1 else 0,
        "guide": _model_bytes(run.guide),
        "reference": _model_bytes(run.reference),
    }


def _model_bytes(model: Model | None) -> int:
    return 0 if model is None else model.shape.parameters * model.width


def _sampling(run: Run, rows: int) -> Iterator[dict[str, float]]:
    """Yield the memory of sampling ``rows`` rows at once, from gathering the weights to the last token. The guide samples afterwards."""
    base = persistent_memory(run) | {"engine": run.sampling.share * run.hardware.memory_gib * 2**30}
    if run.strategy == "fsdp":
        yield _add(base, {"weights gathered": run.shape.parameters * run.weight_width})
    if run.strategy == "fsdp2":
        base = _add(base, {"weights gathered": run.shape.parameters * run.gathered_width})
    if run.casts_weights and run.adapter is None:
        base = _add(base, {"16-bit copies": _autocast_copies(run)})
    yield base
    if not run.sampling.engine:
        yield from _generation(run, base, rows, run)
    if run.guide is not None and run.guide.rows:
        yield from _generation(run, base, run.guide.rows, run.guide)


def _generation(run: Run, base: dict[str, float], rows: int, model: Run | Model) -> Iterator[dict[str, float]]:
    """Yield the memory at the prompts and at the last token."""
    s = model.shape
    c = run.compute_width if isinstance(model, Run) else 2 if run.autocast else model.width
    residual = run.residual_width if isinstance(model, Run) else model.width
    # The rotary embedding converts keys to the precision of the residual stream; values keep that of the product.
    per_token = s.layers * s.keys * (max(c, residual) + c)
    tokens = rows * run.prompt
    prefill = tokens * (3 * s.intermediate * c + 2 * s.hidden * max(residual, 4))
    yield _add(base, {"KV cache": tokens * per_token, "prefill and logits": prefill})
    cache = rows * (run.length + CACHE_GROWTH) * per_token
    # A full cache copies the keys of one layer. Next to it are the logits, their log-softmax, the probabilities and copies for sampling.
    logits = cache / s.layers / 2 + rows * s.vocabulary * (c + 6 * 4)
    yield _add(base, {"KV cache": cache, "prefill and logits": logits})


def _logprob_pass(run: Run) -> Iterator[dict[str, float]]:
    """Yield the memory of one layer and of the head for a micro-batch. Policy and reference run one after the other."""
    base = persistent_memory(run) | {"engine": _engine_memory(run)}
    if run.strategy == "fsdp2":
        base["weights gathered"] = run.shape.parameters * run.gathered_width
    if run.casts_weights and run.adapter is None:
        base = _add(base, {"16-bit copies": _autocast_copies(run)})
    n, s = run.rows * run.length, run.shape
    working = n * (3 * s.intermediate * run.compute_width + 2 * s.hidden * max(run.residual_width, 4))
    yield _add(base, {"activations": working})
    hidden = n * s.hidden * run.residual_width
    yield _add(base, {"activations": hidden, "log-probability chunks": head_buffers(run, entropy=True)[0]})


def _training(run: Run) -> Iterator[dict[str, float]]:
    """Yield the memory after the forward pass, then in the backward pass of head, last layer, first layer and embedding."""
    s = run.shape
    base = persistent_memory(run) | {"engine": _engine_memory(run), "weights gathered": _gathered_for_training(run)}
    if run.casts_weights:
        base["16-bit copies"] = _autocast_copies(run)
    forward, backward = head_buffers(run, entropy=run.entropy)
    saved = activations.saved_bytes(run)
    last = run.rows * run.length * s.hidden * run.compute_width  # the head's full input; only completions are saved
    yield _add(base, {"activations": saved + last, "log-probability chunks": forward})

    full = run.adapter is None
    head_gradient = s.embedding * run.compute_width if full else 0
    accumulated = s.embedding * 4 if full and run.compute_width != 4 else 0  # summed over the chunks in float32
    converted = s.embedding * run.gathered_width if full and run.casts_weights else 0
    pending = s.embedding * run.gathered_width if full and (s.tied or run.sharded) else 0
    several = run.micro_batches > 1
    if not several:  # freed before the only backward pass, which fills them layer by layer
        base = base | {"gradients": 0, "ddp buckets": base["ddp buckets"]}
    head = max(backward + head_gradient + accumulated, head_gradient + converted)
    yield _add(base, {"activations": saved, "log-probability chunks": head})

    layer_gradient = _gradient_in_flight(run)
    recomputed = activations.layer_bytes(run) if run.checkpointing else 0
    working = max(activations.backward_bytes(run), layer_gradient)
    head_accumulated = (s.parameters - s.layers * s.layer - s.embedding) * run.weight_width / run.shards if full else 0
    yield _add(
        base,
        {
            "activations": saved + recomputed,
            "backward pass": working + pending,
            "gradients": 0 if several or run.offload else head_accumulated,
        },
    )
    per_layer = (
        s.hidden * run.rows * run.length * run.residual_width if run.checkpointing else activations.layer_bytes(run)
    )
    filled = 0 if several else persistent_memory(run)["gradients"]
    yield _add(base, {"activations": per_layer + recomputed, "backward pass": working + pending, "gradients": filled})
    embedding = s.embedding * run.gathered_width if full else 0
    reduced = s.root * (4 if run.reduced else run.gathered_width) if run.sharded and full else 0
    yield _add(base, {"backward pass": embedding + pending + reduced, "gradients": filled})


def _update(run: Run) -> dict[str, float]:
    """Return the memory of the optimizer's update.

    On a GPU it updates all weights at once and holds a square root for each. On a CPU it holds two tensors of the size of the largest.
    """
    width, s = run.trained_width, run.shape
    if run.hardware.kind == "cuda":
        temporary = run.trained_parameters * width / run.shards if run.optimizer_states else 0
    else:
        largest = max(s.embedding, s.hidden * s.intermediate)
        temporary = 2 * width * (largest if run.adapter is None else run.adapter.rank * s.intermediate) / run.shards
    base = persistent_memory(run) | {"engine": _engine_memory(run)}
    if run.strategy == "fsdp2" and not run.offload:
        base["weights gathered"] = 0
    return _add(base, {"update": 0 if run.offload else temporary})


def head_buffers(run: Run, *, entropy: bool) -> tuple[float, float]:
    """Return the bytes of logits that rlmod/model/logprobs.py holds at once, in the forward and in the backward pass.

    All buffers have the entries of one chunk and are in float32. Forward: the chunk and a copy inside log-sum-exp, or the previous chunk;
    with entropies also the log-probabilities, the probabilities and their negative. Backward: a chunk and the previous one; with
    entropies also the probabilities. In 16 bits there is also the product itself, and backward the gradient passed on.
    """
    tokens, v = run.rows * run.completion, run.shape.vocabulary
    entries = min(max(ENTRIES_PER_CHUNK // v, 1), tokens) * v
    low_precision = 0 if run.compute_width == 4 else run.compute_width
    forward = entries * (4 * (4 if entropy else 2) + low_precision)
    backward = entries * (4 * (3 if entropy else 2) + 2 * low_precision)
    return forward, backward


def _autocast_copies(run: Run) -> float:
    """Return the bytes of autocast's weight copies. It caches them until it exits, and the backward pass needs them."""
    s = run.shape
    if run.adapter is not None and run.checkpointing:
        return 2 * (s.layer_products + s.embedding)
    return 2 * (s.layers * s.layer_products + s.embedding)


def _gathered_for_training(run: Run) -> float:
    """Return the bytes of weights gathered at once: those outside layers, a layer, the next layer and its buffer."""
    copy = persistent_memory(run)["weights gathered"]
    return copy + (run.gathered_width * (run.shape.root + 3 * run.shape.layer) if run.sharded else 0)


def _gradient_in_flight(run: Run) -> float:
    """Return the bytes of weight gradients not yet accumulated: of one linear layer, or of a sharded layer with its send buffer."""
    s = run.shape
    if run.adapter is not None:
        return 0
    if run.sharded:
        return s.layer * (run.gathered_width + (4 if run.reduced else run.gathered_width))
    linear = s.hidden * s.intermediate * (run.compute_width + (run.weight_width if run.casts_weights else 0))
    return linear + run.rows * run.length * s.intermediate * run.compute_width


def _engine_memory(run: Run) -> float:
    """Return the bytes that an engine holds outside sampling."""
    return 0 if run.sampling.sleeps else run.sampling.share * run.hardware.memory_gib * 2**30


def _add(base: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Return the sum of both, part by part."""
    return {**base, **{name: base.get(name, 0) + value for name, value in more.items()}}


def _peak_moment(name: str, moments: Iterator[dict[str, float]] | list[dict[str, float]]) -> Phase:
    best = max(moments, key=lambda parts: sum(parts.values()))
    return Phase(name, {part: best[part] for part in PARTS if best.get(part)})
