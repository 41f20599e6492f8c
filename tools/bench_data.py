"""Measures how long a run with many problems takes to start, and the memory that it needs.

``python tools/bench_data.py --problems 1000000 --pairs 2`` prints a table. Each row is the median over processes of their own:

    bare tokenizer  the tokenizer alone, in batches of 2000 prompts; the CPU time of everything else is left out
    first start     file to first batch of prompts with an empty cache: convert, tokenize, write, check, shuffle
    second start    the same with the cache of the first

CPU seconds count all threads, and leave out the imports. The prompts are synthetic text of about 200 tokens, and the tokenizer is a
byte-level BPE that is trained on them.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

TOKENS = 200
STAGES = ("bare tokenizer", "first start", "second start")
BATCH = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=3, help="number of runs of each stage")
    parser.add_argument(
        "--folder", type=Path, help="place for the files, about 3 GB for a million problems; default: a temporary one"
    )
    parser.add_argument("--stage", choices=("make", *STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.folder, arguments.problems)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        compare(Path(folder), arguments.problems, arguments.pairs)


def compare(folder: Path, problems: int, pairs: int) -> None:
    """Print the medians. This process stays small: a child's peak memory counts from that of its parent."""
    made = in_process("make", folder, problems)
    print(f"{problems} prompts of {made['tokens']:.0f} tokens, a file of {made['bytes'] / 1e6:.0f} MB")
    results: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES}
    for _ in range(pairs):
        for file in (folder / "cache").glob("*"):
            file.unlink()
        for stage in STAGES:
            results[stage].append(in_process(stage, folder, problems))
            print(f"  {stage}: {results[stage][-1]}", flush=True)
    print("\n| | CPU seconds | against the tokenizer | seconds | peak memory, GiB |\n|---|---|---|---|---|")
    medians = {
        stage: {name: statistics.median(r[name] for r in rows) for name in rows[0]} for stage, rows in results.items()
    }
    for stage, median in medians.items():
        ratio = statistics.median(a["cpu"] / b["cpu"] for a, b in zip(results[stage], results[STAGES[0]], strict=True))
        print(f"| {stage} | {median['cpu']:.1f} | {ratio:.2f} | {median['wall']:.1f} | {median['peak']:.2f} |")


def in_process(stage: str, folder: Path, problems: int) -> dict[str, float]:
    """Run a stage in a process of its own, and return what it measured."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--problems", str(problems)]
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "RLMOD_CACHE": str(folder / "cache"), "PYTHONPATH": root, "TOKENIZERS_PARALLELISM": "true"}
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_stage(stage: str, folder: Path, problems: int) -> dict[str, float]:
    """Run a stage in this process."""
    if stage == "make":
        return make_files(folder, problems)
    run = measure_tokenizer if stage == STAGES[0] else measure_start
    cpu, wall = run(folder)
    return {"cpu": cpu, "wall": wall, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def make_files(folder: Path, problems: int) -> dict[str, float]:
    """Train the tokenizer and write the problems."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = make_texts()
    sample = [next(texts) for _ in range(BATCH)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder / "tokenizer")
    words = TOKENS * sum(len(text.split()) for text in sample) // sum(len(ids) for ids in fast(sample)["input_ids"])
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number, text in zip(range(problems), make_texts(words), strict=False):
            file.write(json.dumps({"prompt": text, "answer": str(number % 9973)}) + "\n")
    ids = fast([text for _, text in zip(range(BATCH), make_texts(words), strict=False)])["input_ids"]
    return {"tokens": sum(map(len, ids)) / len(ids), "bytes": (folder / "train.jsonl").stat().st_size}


def make_texts(words: int = TOKENS) -> Iterator[str]:
    """Yield texts of so many words, of which few are frequent, as in a natural language."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    vocabulary = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(50_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    pool = generator.choices(vocabulary, weights, k=1_000_000)
    while True:
        start = generator.randrange(len(pool) - words)
        yield f"{' '.join(pool[start : start + words - 2])} {generator.randrange(1000)} + {generator.randrange(1000)} ="


def measure_tokenizer(folder: Path) -> tuple[float, float]:
    """Return the CPU seconds and the seconds in the tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    cpu = wall = 0.0
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        while batch := [json.loads(line)["prompt"] for _, line in zip(range(BATCH), file, strict=False)]:
            before = time.process_time(), time.perf_counter()
            _ = tokenizer(batch)["input_ids"]
            cpu, wall = cpu + time.process_time() - before[0], wall + time.perf_counter() - before[1]
    return cpu, wall


def measure_start(folder: Path) -> tuple[float, float]:
    """Return the CPU seconds and the seconds from the file to the first batch of prompts."""
    from transformers import AutoTokenizer

    from rlmod import PromptEncoder, RLData
    from rlmod.data._large import load_problems
    from rlmod.data.problem_file import ProblemFile
    from rlmod.reward.math_verify import MathVerify
    from rlmod.training.answers import readable_problems

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    before = time.process_time(), time.perf_counter()
    problems = load_problems(ProblemFile(path=folder / "train.jsonl"))
    encoded = PromptEncoder(max_tokens=10 * TOKENS).encode(problems, tokenizer)
    with tempfile.TemporaryDirectory() as run:
        encoded = readable_problems(encoded, MathVerify(), "error", Path(run) / "answers.json", {}, 60.0)
    encoded.check_max_model_len(SimpleNamespace(max_model_len=4096, max_new_tokens=1024), "sampler")
    encoded.check_token_ids(len(tokenizer))
    data = RLData(train=encoded)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=SimpleNamespace(seed=0))  # pyright: ignore
    for _ in range(10):
        data.next_prompts(64)
    return time.process_time() - before[0], time.perf_counter() - before[1]


if __name__ == "__main__":
    main()
