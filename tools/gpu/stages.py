"""Stages of device.py: ``python -m tools.gpu.stages NAME``. Findings are said line by line, so that a stopped stage has said something.

``SMALL=1`` is a rehearsal on a CPU: tiny sizes, same code.
"""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SMALL = bool(os.environ.get("SMALL"))
TMP = Path(tempfile.gettempdir())
REAL = TMP / "real.gguf"
"""SmolLM2-135M-Instruct, as device.py has joined it from its pieces."""


def say(**findings: Any) -> None:
    with open(os.environ.get("ANSWER", "/dev/stdout"), "a") as stream:
        stream.write(json.dumps(findings) + "\n")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(work: Callable[[], object], times: int = 5) -> float:
    """Return the median seconds of a call, after two calls to warm up."""
    if device().type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    for _ in range(2):
        work()
    taken = []
    for _ in range(times):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        taken.append(first.elapsed_time(last) / 1e3)
    return statistics.median(taken)


def core() -> None:
    import importlib.metadata as metadata

    names = ("torch", "transformers", "lightning", "numpy", "hydra-core", "math-verify", "peft", "triton")
    there = {(found.metadata["Name"] or "").lower() for found in metadata.distributions()}
    say(versions={name: metadata.version(name) if name in there else None for name in names})
    memory = torch.cuda.mem_get_info() if torch.cuda.is_available() else None
    say(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", memory=memory)
    import rlmod.sampler.hf
    import rlmod.strategy.fsdp2
    import rlmod.train
    import rlmod.training.module  # noqa: F401

    say(imports="ok")


def ceilings() -> None:
    n = 256 if SMALL else 8192
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    say(bf16_tflops=round(2 * n**3 / timed(lambda: a @ b) / 1e12, 1))
    x = torch.randn(2**20 if SMALL else 2**30, device=device(), dtype=torch.float32)
    y = torch.empty_like(x)
    say(copy_tb_per_s=round(2 * x.numel() * 4 / timed(lambda: y.copy_(x)) / 1e12, 2))


def exact() -> None:
    """Compare the head on the device with float64, sampling with the log-prob pass, and shared prompts with separate ones."""
    from dataclasses import replace

    from rlmod.data.arithmetic import Arithmetic
    from rlmod.model.logprobs import chunked_logprobs_and_entropy, logprobs_and_entropy
    from rlmod.model.policy import HFPolicy
    from rlmod.rollout.prompts import PromptEncoder
    from rlmod.sampler.hf import HF

    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(5000, 64) / 8
    ids, gradient = torch.randint(5000, (300,)), torch.randn(300)

    def head_in(dtype: torch.dtype, place: torch.device) -> list[torch.Tensor]:
        layer = torch.nn.Linear(64, 5000, bias=False, dtype=dtype, device=place)
        layer.weight.data.copy_(weight)
        x = hidden.to(place, dtype, copy=True).requires_grad_()
        logprobs, entropy = chunked_logprobs_and_entropy(x, layer, ids.to(place), 0.7, entries_per_chunk=2**18)
        assert entropy is not None
        ((logprobs + entropy) * gradient.to(place, logprobs.dtype)).sum().backward()
        found = [logprobs, entropy, x.grad, layer.weight.grad]
        return [tensor.detach().double().cpu() for tensor in found if tensor is not None]

    correct = head_in(torch.float64, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        pairs = zip(head_in(dtype, device()), correct, strict=True)
        say(**{f"head_{dtype}".replace("torch.", ""): [float((a - b).norm() / b.norm()) for a, b in pairs]})
    for dtype in ("float32", "bfloat16"):
        specification = HFPolicy(path="tiny", dtype=dtype)
        tokenizer = specification.tokenizer()
        policy = specification.model(tokenizer).to(device()).eval()  # pyright: ignore[reportArgumentType]
        problems = PromptEncoder().encode(Arithmetic(split="held_out", size=16)(), tokenizer)
        prompts = problems.batch(range(16)).to(device())
        sampler = HF(completions_per_prompt=8, max_new_tokens=40)
        rows = sampler(policy, prompts, 0)
        assert rows.logprobs is not None and rows.entropy is not None
        with torch.no_grad():
            logprobs, entropy = logprobs_and_entropy(policy, rows, 1.0)
            apart = replace(rows, group=torch.arange(len(rows), device=rows.device))
            alone, _ = logprobs_and_entropy(policy, apart, 1.0)
        assert entropy is not None
        difference = [float((logprobs - rows.logprobs).abs().max()), float((entropy - rows.entropy).abs().max())]
        say(
            **{
                f"sampled_against_pass_{dtype}": difference,
                f"shared_against_alone_{dtype}": float((logprobs - alone).abs().max()),
                f"mean_length_{dtype}": float(rows.mask.sum(1).float().mean()),
                f"mean_logprob_{dtype}": float(rows.logprobs[rows.mask].mean()),
                f"same_seed_{dtype}": bool(
                    torch.equal(sampler(policy, prompts, 0).completion_ids, rows.completion_ids)
                ),
            }
        )


def bench() -> None:
    from tools import bench_gpu

    began, old = time.perf_counter(), bench_gpu.Stages.on_train_epoch_start

    def told(self: Any, trainer: Any, module: Any) -> None:
        old(self, trainer, module)
        last = {stage: [round(taken, 3) for taken in seconds[-1:]] for stage, seconds in self.seconds.items()}
        at = round(time.perf_counter() - began, 1)
        say(**{f"bench_iteration_{trainer.current_epoch}": {**last, "peak": self.peaks[-1:], "at": at}})

    bench_gpu.Stages.on_train_epoch_start = told  # pyright: ignore[reportAttributeAccessIssue]
    bench_gpu.quiet()
    say(table=bench_gpu.table(bench_gpu.SMOKE if SMALL else bench_gpu.FULL, device(), 1, None))


def head() -> None:
    """Time the head by the size of a chunk, beside a product alone: 16,384 tokens of a 0.5 B and a 7 B policy."""
    from rlmod.model.logprobs import chunked_logprobs_and_entropy

    tokens = 16 if SMALL else 16_384
    for width, vocabulary in ((64, 997),) if SMALL else ((896, 151_936), (3584, 152_064)):
        hidden = torch.randn(tokens, width, device=device(), dtype=torch.bfloat16, requires_grad=True)
        layer = torch.nn.Linear(width, vocabulary, bias=False, device=device(), dtype=torch.bfloat16)
        ids = torch.randint(vocabulary, (tokens,), device=device())
        say(
            **{
                f"product_{width}": round(
                    timed(lambda h=hidden, w=layer.weight: (h.detach() @ w.detach().T, None)[1], 3), 4
                )
            }
        )
        for power in (25, 26, 27, 28, 29):
            for entropy in (False, True):

                def step(h: Any = hidden, w: Any = layer, i: Any = ids, e: bool = entropy, n: int = power) -> None:
                    logprobs, entropies = chunked_logprobs_and_entropy(h, w, i, entropy=e, entries_per_chunk=2**n)
                    (logprobs.sum() if entropies is None else logprobs.sum() + entropies.sum()).backward()
                    h.grad = w.weight.grad = None

                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                found = {"seconds": round(timed(step, 3), 4)}
                if torch.cuda.is_available():
                    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                say(**{f"head_{width}_2^{power}_{'entropy' if entropy else 'plain'}": found})


def attention() -> None:
    """Time forward and backward of the 0.5 B policy: rows of one length, padded rows, one packed row, compiled layers."""
    from rlmod.model.shared_prompts import compile_layers
    from tools.bench_gpu import FULL, SMOKE

    size = SMOKE if SMALL else FULL
    rows, length = (2, 24) if SMALL else (16, 1152)
    policy: Any = size.policy(device())
    ids = torch.randint(3, size.vocabulary, (rows, length), device=device())
    full, places = torch.ones_like(ids), torch.arange(length, device=device()).expand(rows, -1)
    padded = full.clone()
    padded[::2, : length // 8] = 0

    def step(input_ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> float:
        def work() -> None:
            call = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1, "use_cache": False}
            policy(input_ids=input_ids, **call).logits.sum().backward()
            policy.zero_grad(set_to_none=True)

        return round(timed(work, 3), 4)

    say(equal=step(ids, full, places), none=step(ids, None, places), padded=step(ids, padded, places))
    say(packed_one_row=step(ids.view(1, -1), None, places.reshape(1, -1)))
    if not SMALL:  # compiling takes half a minute of a CPU
        compile_layers(policy)
        say(compiled_equal=step(ids, full, places), compiled_padded=step(ids, padded, places))


def memory() -> None:
    """Measure the peak of a step with micro-batches of 4 and of 32 rows, to be held against rlmod-plan's."""
    from dataclasses import replace

    from tools import bench_gpu

    bench_gpu.quiet()
    for rows in (4,) if SMALL else (4, 32):
        small = replace(bench_gpu.SMOKE, micro_batch=rows)
        size = small if SMALL else replace(bench_gpu.FULL, micro_batch=rows, prompts=4, completion=256)
        stages, _ = bench_gpu.measured(size, device(), 0)
        say(
            **{
                f"rows_{rows}": {
                    "peak_gib": [round(p / 2**30, 2) for p in stages.peaks],
                    "stage_seconds": stages.seconds,
                }
            }
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def sampler() -> None:
    """Measure tokens per second of sampler=hf with the 0.5 B policy, by rows."""
    from rlmod.sampler.hf import HF
    from rlmod.types import Problem, Prompts
    from tools.bench_gpu import FULL, SMOKE

    size = SMOKE if SMALL else FULL
    policy: Any = size.policy(device()).eval()
    for prompts in (1, 4) if SMALL else (1, 16, 64):
        ids = torch.randint(3, size.vocabulary, (prompts, size.prompt), device=device())
        problems = (Problem(prompt="", answer="", source="random"),) * prompts
        asked = Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), problems=problems)
        tokens = 8 if SMALL else 128
        hf = HF(completions_per_prompt=8, max_new_tokens=tokens)
        seconds = timed(lambda asked=asked, hf=hf: hf(policy, asked, 0), 1)
        per_second, per_token = round(8 * prompts * tokens / seconds), round(1e3 * seconds / tokens, 2)
        say(**{f"rows_{8 * prompts}": {"tokens_per_s": per_second, "ms_per_token": per_token}})


def run(name: str, *overrides: str, seconds: float = 90) -> Path:
    """Run a short training with its own limit, and say how it ended and where its time went."""
    folder = TMP / "runs" / f"{name}-{os.getpid()}"
    where = "gpu" if device().type == "cuda" else "cpu"
    short = ("experiment=quickstart", "debug=short", "trainer.max_epochs=3", "data.validation.size=64")
    command = [
        sys.executable,
        "-m",
        "rlmod.train",
        *short,
        f"trainer.accelerator={where}",
        f"output={folder}",
        *overrides,
    ]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds * (20 if SMALL else 1))
    except subprocess.TimeoutExpired as error:
        say(**{name: {"stopped": seconds, "end": str(error.stdout)[-600:]}})
        return folder
    print(done.stdout[-3000:], done.stderr[-6000:], flush=True)
    result = folder / "result.json"
    said = json.loads(result.read_text()) if result.is_file() else {}
    rows = list(csv.DictReader((folder / "metrics.csv").open())) if (folder / "metrics.csv").is_file() else []
    times = [
        {key: round(float(row[key]), 3) for key in ("time/collect", "time/train")}
        for row in rows
        if row.get("time/train")
    ]
    end = done.stderr[-500:] if done.returncode else ""
    took = round(time.perf_counter() - began, 1)
    say(**{name: {"rc": done.returncode, "took": took, "held_out": said.get("held_out"), "times": times, "end": end}})
    if done.returncode and SMALL:
        raise SystemExit(f"{name}: exit status {done.returncode}")
    return folder


def precision() -> None:
    """Compare float32 with bf16-mixed, iteration by iteration."""
    run("float32")
    if SMALL:  # the other strategies' runs follow
        return
    run("bf16_mixed", "trainer.precision=bf16-mixed")


def train() -> None:
    gloo = ("trainer.strategy.process_group_backend=gloo",) if device().type == "cpu" else ()
    reduced = "trainer.strategy.reduced_precision=bfloat16"
    run("fsdp2_bf16", "strategy=fsdp2", reduced, "policy.gradient_checkpointing=true", *gloo, seconds=40)
    run("fsdp2_offload", "strategy=fsdp2", "trainer.strategy.cpu_offload=true", *gloo, seconds=40)
    if SMALL:
        return
    run("compile", "policy.compile=true", seconds=60)
    run("fsdp", "strategy=fsdp", seconds=40)


def real_convert() -> None:
    """Convert GGUF to a Hugging Face folder; a greedy answer and the likelihood of a sentence show whether it is the real one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlmod.model import gguf

    began = time.perf_counter()
    folder = gguf.convert(REAL)
    say(convert_seconds=round(time.perf_counter() - began, 1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = loaded.to(device()).eval()
    question = [{"role": "user", "content": "What is 7 + 7?"}]
    asked: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    asked = asked.to(device())
    answer = policy.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    sentence = (
        "The capital of France is Paris. It is the largest city in the country and is known for the Eiffel Tower."
    )
    ids = tokenizer(sentence, return_tensors="pt").input_ids.to(device())
    with torch.no_grad():
        nats = round(float(policy(ids, labels=ids).loss), 3)
    say(greedy=tokenizer.decode(answer), nats_per_token=nats, expected=["The answer is 14.<|im_end|>", 1.598])


def real(name: str, *overrides: str, seconds: float, several: bool = False) -> None:
    """Train the real policy on small sums, once or several times. Results are kept even if a run is cut off."""
    where = "gpu" if device().type == "cuda" else "cpu"
    full = ("batch.prompts=64", "batch.micro_batch=128", "trainer.max_epochs=20", "trainer.precision=bf16-mixed")
    tiny = ("batch.prompts=2", "batch.micro_batch=16", "data.validation.largest=6", "trainer.max_epochs=1")
    folder = TMP / "runs" / f"{name}-{os.getpid()}"
    command = [
        sys.executable, "-m", "rlmod.train", *(["-m"] if several else []), "experiment=real", f"policy.path={REAL}",
        "filter.max_generation_batches=3", f"trainer.accelerator={where}", "validation.prompts_per_batch=167",
        "callbacks.completions.recorded=128", "callbacks.progress_bar.lines=20",
        f"hydra.sweep.dir={folder}" if several else f"output={folder}", *(tiny if SMALL else full), *overrides,
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        code: int | str = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it finishes its iteration
        try:
            code = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "killed"
    say(**{name: {"rc": code, "took": round(time.perf_counter() - began, 1)}})
    for metrics in sorted(file for file in folder.rglob("metrics.csv") if "checkpoints" not in file.parts):
        place = metrics.parent.relative_to(folder).as_posix().replace("/", "_").replace(".", "") or "run"
        result_file = metrics.parent / "result.json"
        result = json.loads(result_file.read_text()) if result_file.is_file() else {}
        kept = {key: result.get(key) for key in ("held_out", "steps", "tokens", "seconds")}
        say(**{f"{name}_{place}": kept})
        with open(Path(os.environ["OUT"]) / "real_runs.txt", "a") as stream:  # one file: few come back
            stream.write(f"==== {name} {place}\n{(metrics.parent / 'config.yaml').read_text()}{metrics.read_text()}")


def real_train() -> None:
    """Train GTPO without the entropy clip and token-mean GRPO, one seed each: both must learn."""
    real("gtpo", "shaper=token_entropy", seconds=600 if SMALL else 110)
    if not SMALL:
        real("grpo", "shaper=uniform", seconds=110)


def real_compare() -> None:
    """Train the same two, four seeds each, in one process."""
    real("compare", "shaper=token_entropy,uniform", "seed=1,2,3,4", seconds=600 if SMALL else 380, several=True)


def vllm_import() -> None:
    import vllm  # pyright: ignore[reportMissingImports]

    from rlmod.sampler import _vllm_worker

    _vllm_worker.register()
    from vllm.vllm_flash_attn import flash_attn_interface as flash  # pyright: ignore[reportMissingImports]

    say(vllm=vllm.__version__, fa3=flash.FA3_AVAILABLE, fa2=flash.FA2_AVAILABLE, torch=torch.__version__)


def vllm_train() -> None:
    engine = (
        "sampler=vllm", "sampler.gpu_memory_utilization=0.2", "sampler.max_model_len=256", "+sampler.engine.enforce_eager=true",
    )  # fmt: skip
    run("vllm_float32", *engine, seconds=140)
    run("vllm_bf16_sleep", *engine, "trainer.precision=bf16-mixed", "sampler.sleep_while_training=true", seconds=140)
    run("vllm_fsdp2", *engine, "strategy=fsdp2", "trainer.precision=bf16-mixed", seconds=140)


def vllm_speed() -> None:
    """Measure tokens per second of sampler=vllm with the 0.5 B policy, and the time of a sync, of sleeping and of waking."""
    from rlmod.sampler.vllm import VLLM
    from rlmod.types import Problem, Prompts
    from tools.bench_gpu import FULL

    policy: Any = FULL.policy(device()).eval()
    for sleep in (False, True):
        share = {"gpu_memory_utilization": 0.35, "max_model_len": 1024}
        engine = VLLM(completions_per_prompt=8, max_new_tokens=512, sleep_while_training=sleep, **share)  # pyright: ignore[reportArgumentType]
        began = time.perf_counter()
        engine.sync(policy)
        say(**{f"first_sync_sleep_{sleep}": round(time.perf_counter() - began, 1)})
        for prompts in (16, 64):
            ids = torch.randint(3, FULL.vocabulary, (prompts, FULL.prompt), device=device())
            problems = (Problem(prompt="", answer="", source="random"),) * prompts
            asked = Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), problems=problems)
            began = time.perf_counter()
            engine(policy, asked, 0)
            torch.cuda.synchronize()
            say(**{f"rows_{8 * prompts}_sleep_{sleep}": round(8 * prompts * 512 / (time.perf_counter() - began))})
            before = torch.cuda.mem_get_info()[0]
            began = time.perf_counter()
            engine.sleep()
            slept, freed = time.perf_counter() - began, torch.cuda.mem_get_info()[0] - before
            began = time.perf_counter()
            engine.sync(policy)
            torch.cuda.synchronize()
            took = [round(slept, 2), round(time.perf_counter() - began, 2)]
            say(**{f"sleep_sync_{prompts}_sleep_{sleep}": took, f"freed_gib_{sleep}": round(freed / 2**30, 1)})


if __name__ == "__main__":
    globals()[sys.argv[1]]()
