"""Bytes on one accelerator, by part, in each phase of an iteration."""

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
    """The moment of a phase at which most is held."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def phases(run: Run) -> list[Phase]:
    """Validation and scoring where there are any, sampling, training, and the optimizer's update."""
    held_out = run.validation_rows and not run.sampling.engine
    return [
        *([_highest("validation", _sampling(run, run.validation_rows))] if held_out else []),
        _highest("sampling", _sampling(run, min(run.sampling.rows_at_once or run.own_rows, run.own_rows))),
        *([_highest("scoring", _scoring(run))] if scores(run) else []),
        _highest("training", _training(run)),
        _highest("update", [_update(run)]),
    ]


def peak(run: Run) -> Phase:
    return max(phases(run), key=lambda phase: phase.total)


def fits(run: Run, phase: str | None = None) -> bool:
    """Return True if every phase fits, or the one of that name."""
    there = (run.hardware.memory_gib - run.hardware.reserve_gib) * 2**30
    named = [p for p in phases(run) if p.name == phase] or phases(run)
    return all(p.total <= there for p in named)


def scores(run: Run) -> bool:
    """Forward passes without gradients: of a reference, of the guide's rows, of what an engine sampled without entropies."""
    return run.reference is not None or run.guide_rows > 0 or run.sampling.engine


def standing(run: Run) -> dict[str, float]:
    """Memory that every phase holds.

    Gradients too: Lightning sets them free just before the next backward pass, so that they lie there while the policy samples.
    """
    shards, on_device = run.shards, not run.offload
    weights = run.shape.parameters * run.weight + (run.trained * 4 if run.adapter else 0)
    trained = run.trained * run.trained_width
    return {
        "parameters": on_device * weights / shards,
        "gradients": on_device * trained / shards,
        "optimizer state": on_device * run.optimizer_states * trained / shards,
        "weights gathered": weights if run.strategy == "fsdp" else 0,  # the copy that samples stays
        "ddp buckets": trained if run.strategy == "ddp" and run.ranks > 1 else 0,
        "guide": _bytes(run.guide),
        "reference": _bytes(run.reference),
    }


def _bytes(model: Model | None) -> int:
    return 0 if model is None else model.shape.parameters * model.width


def _sampling(run: Run, rows: int) -> Iterator[dict[str, float]]:
    """Memory of sampling so many rows together: as weights are gathered, at the prompts, at the last token. The guide samples later."""
    base = standing(run) | {"engine": run.sampling.share * run.hardware.memory_gib * 2**30}
    if run.strategy == "fsdp":
        yield _added(base, {"weights gathered": run.shape.parameters * run.weight})
    if run.strategy == "fsdp2":
        base = _added(base, {"weights gathered": run.shape.parameters * run.gathered})
    if run.casts and run.adapter is None:
        base = _added(base, {"16-bit copies": _cast_weights(run)})
    yield base
    if not run.sampling.engine:
        yield from _generating(run, base, rows, run)
    if run.guide is not None and run.guide.rows:
        yield from _generating(run, base, run.guide.rows, run.guide)


def _generating(run: Run, base: dict[str, float], rows: int, model: Run | Model) -> Iterator[dict[str, float]]:
    s = model.shape
    c = run.compute if isinstance(model, Run) else 2 if run.autocast else model.width
    s_width = run.residual if isinstance(model, Run) else model.width
    # The rotation takes keys to the width of the residual stream; values stay as the product gave them.
    a_token = s.layers * s.keys * (max(c, s_width) + c)
    tokens = rows * run.prompt
    prefill = tokens * (3 * s.intermediate * c + 2 * s.hidden * max(s_width, 4))
    yield _added(base, {"KV cache": tokens * a_token, "prefill and logits": prefill})
    grown = rows * (run.length + CACHE_GROWTH) * a_token
    # When there is no room left, a layer's keys are copied; and logits, log-softmax, probabilities, and what they are drawn from.
    logits = grown / s.layers / 2 + rows * s.vocabulary * (c + 6 * 4)
    yield _added(base, {"KV cache": grown, "prefill and logits": logits})


def _scoring(run: Run) -> Iterator[dict[str, float]]:
    """A layer at work for the rows of a micro-batch, or the head; by the policy or, one after the other, a reference."""
    base = standing(run) | {"engine": _engine_beside(run)}
    if run.strategy == "fsdp2":
        base["weights gathered"] = run.shape.parameters * run.gathered
    if run.casts and run.adapter is None:
        base = _added(base, {"16-bit copies": _cast_weights(run)})
    n, s = run.rows * run.length, run.shape
    working = n * (3 * s.intermediate * run.compute + 2 * s.hidden * max(run.residual, 4))
    yield _added(base, {"activations": working})
    hidden = n * s.hidden * run.residual
    yield _added(base, {"activations": hidden, "log-probability chunks": head_buffers(run, entropy=True)[0]})


def _training(run: Run) -> Iterator[dict[str, float]]:
    """The end of the forward pass, the head's backward pass, the last layer's, the first layer's, the embedding's gradient."""
    s = run.shape
    base = standing(run) | {"engine": _engine_beside(run), "weights gathered": _gathered_in_training(run)}
    if run.casts:
        base["16-bit copies"] = _cast_weights(run)
    forward, backward = head_buffers(run, entropy=run.entropy)
    whole = activations.kept(run)
    last = run.rows * run.length * s.hidden * run.compute  # what the head is given, of which only completions are kept
    yield _added(base, {"activations": whole + last, "log-probability chunks": forward})

    full = run.adapter is None
    head_gradient = s.embedding * run.compute if full else 0
    added_up = s.embedding * 4 if full and run.compute != 4 else 0  # over the chunks, in float32
    converted = s.embedding * run.gathered if full and run.casts else 0
    pending = s.embedding * run.gathered if full and (s.tied or run.sharded) else 0
    several = run.micro_batches > 1
    if not several:  # set free before the only backward pass, and filled as it goes
        base = base | {"gradients": 0, "ddp buckets": base["ddp buckets"]}
    head = max(backward + head_gradient + added_up, head_gradient + converted)
    yield _added(base, {"activations": whole, "log-probability chunks": head})

    layer_gradient = _gradient_in_flight(run)
    again = activations.of_layer(run) if run.checkpointing else 0
    working = max(activations.of_backward(run), layer_gradient)
    head_grown = (s.parameters - s.layers * s.layer - s.embedding) * run.weight / run.shards if full else 0
    yield _added(
        base,
        {
            "activations": whole + again,
            "backward pass": working + pending,
            "gradients": 0 if several or run.offload else head_grown,
        },
    )
    one = s.hidden * run.rows * run.length * run.residual if run.checkpointing else activations.of_layer(run)
    grown = 0 if several else standing(run)["gradients"]
    yield _added(base, {"activations": one + again, "backward pass": working + pending, "gradients": grown})
    embedding = s.embedding * run.gathered if full else 0
    reduced = s.root * (4 if run.reduced else run.gathered) if run.sharded and full else 0
    yield _added(base, {"backward pass": embedding + pending + reduced, "gradients": grown})


def _update(run: Run) -> dict[str, float]:
    """On a GPU the optimizer takes all weights at once and needs a root of each; on a CPU two of the largest."""
    width, s = run.trained_width, run.shape
    if run.hardware.kind == "cuda":
        needed = run.trained * width / run.shards if run.optimizer_states else 0
    else:
        largest = max(s.embedding, s.hidden * s.intermediate)
        needed = 2 * width * (largest if run.adapter is None else run.adapter.rank * s.intermediate) / run.shards
    base = standing(run) | {"engine": _engine_beside(run)}
    if run.strategy == "fsdp2" and not run.offload:
        base["weights gathered"] = 0
    return _added(base, {"update": 0 if run.offload else needed})


def head_buffers(run: Run, *, entropy: bool) -> tuple[float, float]:
    """Logits that rlmod/model/logprobs.py holds together: forward, and backward.

    b entries in a chunk, in float32. Forward: the chunk and a copy inside its log-sum-exp, or the chunk before it; with entropies the
    log-probabilities, the probabilities and their negative besides. Backward: a chunk and the one before it; with entropies the
    probabilities besides. In 16 bits the product itself, and backward the gradient that is handed on.
    """
    tokens, v = run.rows * run.completion, run.shape.vocabulary
    entries = min(max(ENTRIES_PER_CHUNK // v, 1), tokens) * v
    narrow = 0 if run.compute == 4 else run.compute
    forward = entries * (4 * (4 if entropy else 2) + narrow)
    backward = entries * (4 * (3 if entropy else 2) + 2 * narrow)
    return forward, backward


def _cast_weights(run: Run) -> float:
    """Autocast keeps its copy of every weight that it has cast for as long as it lasts, and the backward pass needs them."""
    s = run.shape
    if run.adapter is not None and run.checkpointing:
        return 2 * (s.layer_products + s.embedding)
    return 2 * (s.layers * s.layer_products + s.embedding)


def _gathered_in_training(run: Run) -> float:
    """Weights gathered together: those in no layer, a layer and the next one, and the buffer of the next one."""
    copy = standing(run)["weights gathered"]
    return copy + (run.gathered * (run.shape.root + 3 * run.shape.layer) if run.sharded else 0)


def _gradient_in_flight(run: Run) -> float:
    """Weight gradients before they are accumulated: of one linear layer, or of a sharded layer with its send buffer."""
    s = run.shape
    if run.adapter is not None:
        return 0
    if run.sharded:
        return s.layer * (run.gathered + (4 if run.reduced else run.gathered))
    own = s.hidden * s.intermediate * (run.compute + (run.weight if run.casts else 0))
    return own + run.rows * run.length * s.intermediate * run.compute


def _engine_beside(run: Run) -> float:
    return 0 if run.sampling.sleeps else run.sampling.share * run.hardware.memory_gib * 2**30


def _added(base: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    return {**base, **{name: base.get(name, 0) + value for name, value in more.items()}}


def _highest(name: str, moments: Iterator[dict[str, float]] | list[dict[str, float]]) -> Phase:
    best = max(moments, key=lambda parts: sum(parts.values()))
    return Phase(name, {part: best[part] for part in PARTS if best.get(part)})
