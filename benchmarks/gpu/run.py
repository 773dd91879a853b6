"""Measures fedsb on one GPU with 80 GB or more, in less than ten minutes: time and memory against PEFT's LoRA.

    python benchmarks/gpu/run.py                             on a GPU; writes results.json and results.md
    python benchmarks/gpu/run.py --tiny --device cpu         tries every row on a small model; writes nothing
    python benchmarks/gpu/run.py --tiny --device pretend     the same on the pretended accelerator of tests/support

Models have the shapes of Llama 3.2 1B, Llama 3.2 3B and Llama 2 7B, with random bfloat16 weights that are made on the
device. fed-sb has r = 64, fedit and PEFT's LoRA have r = 16, on all linear layers of the blocks. A step is collating, a
forward, a backward, the clip and AdamW; its time is the median of steps, between CUDA events at their starts. PEFT is
a plain loop with float32 adapters, fused AdamW and a batch that is on the device before the first step. K clients of
fedsb in one forward are compared with K steps of PEFT. Peak memory is torch's, with the base model and above it.

A row that does not fit into memory, and rows after the time limit, are written as skipped. A row that fails is written
with its error, and the others are run; the exit status is then 1. Results are written after every row.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "training_step"), str(HERE.parents[1] / "tests")]

from sides import FedsbSide, PeftSide, examples_of  # noqa: E402

from fedsb.config.inputs import ModelConfig  # noqa: E402
from fedsb.data.tasks import open_task  # noqa: E402
from fedsb.data.tasks.base import Example, Task, TaskOptions  # noqa: E402
from fedsb.methods.base import Method  # noqa: E402
from fedsb.methods.fed_sb import FedSB  # noqa: E402
from fedsb.methods.fedit import FedIT  # noqa: E402
from fedsb.models.load import load_base  # noqa: E402
from fedsb.privacy.ledger import Ledger  # noqa: E402
from fedsb.privacy.mechanism import DPMechanism  # noqa: E402
from fedsb.privacy.noise import SecretNoise  # noqa: E402
from fedsb.privacy.plan import PrivacyPlan  # noqa: E402
from fedsb.training.generation import Prompt, write_answers  # noqa: E402
from fedsb.utils.environment import describe_machine, git_hash  # noqa: E402

LIMIT_SECONDS = 560.0
LEAST_SECONDS = 15.0  # left for a new row; less skips it
WARM_UP, STEPS, FEWEST = 2, 7, 3  # steps that are not counted, steps that are, and those that a long row counts
LONG_SECONDS = 8.0  # after which FEWEST steps are enough
WORDS = 50  # of the tokenizer; the model's vocabulary is larger
RANKS = {"fed-sb": 64, "fedit": 16, "PEFT LoRA": 16}

COMMON: dict[str, Any] = {"max_position_embeddings": 2048, "num_key_value_heads": 8, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {  # in the order in which they are measured
    "1B": {
        **COMMON,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "7B": {
        **COMMON,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "3B": {
        **COMMON,
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "tiny": {
        **COMMON,
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
}


class EnoughError(Exception):
    """Ends a row's training when it has enough steps, or when the time is over."""


@dataclass
class Clock:
    """The starts of steps, as CUDA events on a GPU, else in seconds of the host."""

    device: torch.device
    ends: float  # of the benchmark, by time.monotonic
    began: float = field(default_factory=time.monotonic)
    stamps: list[Any] = field(default_factory=list)

    def stamp(self) -> None:
        """Records the start of a step, which is the end of the one before. Raises EnoughError after the last."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.stamps.append(event)
        else:
            self.stamps.append(time.perf_counter())
        counted, now = len(self.stamps) - 1 - WARM_UP, time.monotonic()
        if counted >= STEPS or now > self.ends or (counted >= FEWEST and now - self.began > LONG_SECONDS):
            raise EnoughError

    def seconds(self) -> list[float]:
        """Returns the seconds of each counted step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            pairs = zip(self.stamps, self.stamps[1:], strict=False)
            found = [first.elapsed_time(second) / 1000 for first, second in pairs]
        else:
            found = [second - first for first, second in zip(self.stamps, self.stamps[1:], strict=False)]
        return found[WARM_UP:]


class Recorder:
    """Runs rows until the time is over, and records what each found."""

    def __init__(self, device: torch.device, ends: float, write: Callable[[list[dict[str, Any]]], None]) -> None:
        self.device, self.ends, self.write = device, ends, write
        self.rows: list[dict[str, Any]] = []
        self.base_bytes = 0  # on the device, with a base model and before an adapter

    def row(self, name: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs one row, and records its results, the reason why it was skipped, or its error."""
        started = time.monotonic()
        if self.ends - started < LEAST_SECONDS:
            found: dict[str, Any] = {"skipped": "no time was left"}
        else:
            try:
                found = measured()
            except torch.OutOfMemoryError as error:
                found = {"skipped": " ".join(str(error).split(". GPU ")[0].split())}
            except Exception as error:
                found = {"failed": _first_line(error)}
        self.clean()
        self.rows.append({**name, **found, "row_seconds": round(time.monotonic() - started, 1)})
        print(json.dumps(self.rows[-1]), flush=True)
        self.write(self.rows)
        return self.rows[-1]

    def part(self, model: str, run: Callable[[], None]) -> None:
        """Runs several rows. If something fails between them, it is recorded, and the other parts are run."""
        try:
            run()
        except Exception as error:
            about = {"what": "part", "model": model, "method": None, "rank": None, "batch": None, "clients": None}
            self.rows.append({**about, "failed": _first_line(error)})
            print(json.dumps(self.rows[-1]), flush=True)
            self.write(self.rows)
        self.clean()

    def clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def base(self, model: nn.Module) -> dict[str, Any]:
        """Records the memory that is in use with a base model. Returns the size of its weights."""
        if self.device.type == "cuda":
            self.base_bytes = torch.cuda.memory_allocated(self.device)
        return {"base_gib": round(sum(p.nbytes for p in model.parameters()) / 2**30, 2)}

    def timed(self, run: Callable[[Callable[[], None]], Any], clients: int, tokens: int) -> dict[str, Any]:
        """Returns the step's time and the peak memory of `run`, which calls its argument at the start of each step."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = Clock(self.device, self.ends)
        with suppress(EnoughError):
            run(clock.stamp)
        seconds = clock.seconds()
        if not seconds:
            return {"skipped": "no time was left for a step"}
        median = statistics.median(seconds)
        found: dict[str, Any] = {
            "step_seconds": round(median, 5),
            "slowest_seconds": round(max(seconds), 5),
            "fastest_seconds": round(min(seconds), 5),
            "steps": len(seconds),
            "tokens_per_second": round(clients * tokens / median),
        }
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device)
            found |= {"peak_gib": round(peak / 2**30, 2), "above_base_gib": round((peak - self.base_bytes) / 2**30, 2)}
        return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Subject:
    """A model with random weights, and its task."""

    def __init__(self, recorder: Recorder, name: str, shape: dict[str, Any], task: Task) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.recorder, self.name, self.task = recorder, name, task
        torch.manual_seed(0)
        config = LlamaConfig(**shape, use_cache=False)
        pretended = recorder.device.type not in ("cpu", "cuda")  # it cannot draw weights
        with torch.device("cpu" if pretended else recorder.device):
            self.model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model.to(recorder.device).eval().requires_grad_(False)

    @contextmanager
    def fedsb(self, method: Method) -> Iterator[FedsbSide]:
        side = FedsbSide(self.model, self.task, method, head=())
        try:
            yield side
        finally:
            side.adapted.unwrap()

    @contextmanager
    def peft(self) -> Iterator[PeftSide]:
        side = PeftSide(self.model, self.task, rank=RANKS["PEFT LoRA"], head=())
        try:
            yield side
        finally:
            side.optimizer.zero_grad()
            side.model.unload()
            if hasattr(self.model, "peft_config"):
                del self.model.peft_config


def measure_steps(subject: Subject, sizes: list[tuple[int, int]], counts: tuple[int, ...]) -> None:
    """Measures PEFT's step, and those of fedsb for each number of clients; the sizes are (rows, tokens)."""
    recorder, task = subject.recorder, subject.task
    texts = {size: [examples_of(task, *size, seed) for seed in range(max(counts))] for size in sizes}
    theirs: dict[tuple[int, int], float | None] = {}

    def name(method: str, size: tuple[int, int], clients: int) -> dict[str, Any]:
        return {
            "what": "step",
            "model": subject.name,
            "method": method,
            "rank": RANKS[method],
            "batch": f"{size[0]} x {size[1]}",
            "clients": clients,
        }

    with subject.peft() as peft:
        for size in sizes:

            def plain(size: tuple[int, int] = size) -> dict[str, Any]:
                return recorder.timed(lambda stamp: peft_loop(peft, texts[size][0], stamp), 1, size[0] * size[1])

            theirs[size] = recorder.row(name("PEFT LoRA", size, 1), plain).get("step_seconds")
    for method, made in (("fed-sb", FedSB(rank=RANKS["fed-sb"])), ("fedit", FedIT(rank=RANKS["fedit"]))):
        with subject.fedsb(made) as side:
            for clients in counts:
                for size in sizes:

                    def joint(size: tuple[int, int] = size, clients: int = clients) -> dict[str, Any]:
                        rows = texts[size][:clients]
                        try:
                            found = recorder.timed(lambda stamp: endless(side, rows, stamp), clients, size[0] * size[1])
                        finally:
                            side.release()
                        reference = theirs[size]
                        if reference and "step_seconds" in found:
                            found["times_peft"] = round(found["step_seconds"] / (clients * reference), 3)
                        return found

                    recorder.row(name(method, size, clients), joint)


def peft_loop(side: PeftSide, rows: list[Example], stamp: Callable[[], None]) -> None:
    """Takes steps until `stamp` raises."""
    batch = side.batch_of(rows)
    while True:
        stamp()
        side.step(batch)


def endless(
    side: FedsbSide,
    rows: list[list[Example]],
    stamp: Callable[[], None],
    mechanisms: dict[str, DPMechanism] | None = None,
) -> None:
    """Takes steps until `stamp` raises, which it does before the round ends."""
    side.train(rows, WARM_UP + STEPS + 1, stamp, mechanisms)


def measure_private(subject: Subject, size: tuple[int, int]) -> None:
    """Measures a step of DP-SGD with a row as its unit: each row's gradient is clipped, and the sum gets noise."""
    recorder, (rows, tokens) = subject.recorder, size

    def private() -> dict[str, Any]:
        # Every row is drawn in every step (q = 1), so that steps are alike.
        plan = PrivacyPlan(
            unit="example",
            clip=1.0,
            delta=1e-5,
            batch=rows,
            rows=rows,
            steps=WARM_UP + STEPS + 1,
            rounds=1,
            sigma=1.0,
        )
        with tempfile.TemporaryDirectory() as folder, subject.fedsb(FedSB(rank=RANKS["fed-sb"])) as side:
            path = Path(folder) / "ledger.jsonl"
            with Ledger.create(path, run="benchmark", client="0", unit="example") as ledger:
                own = {"0": DPMechanism(plan=plan, ledger=ledger, noise=SecretNoise())}
                texts = [examples_of(subject.task, rows, tokens, 0)]
                return recorder.timed(lambda stamp: endless(side, texts, stamp, own), 1, rows * tokens)

    name = {"what": "private step", "model": subject.name, "method": "fed-sb", "rank": RANKS["fed-sb"]}
    recorder.row({**name, "batch": f"{rows} x {tokens}", "clients": 1}, private)


def measure_same_seed(subject: Subject, size: tuple[int, int], clients: int) -> None:
    """Trains the same round twice, and one client alone, and compares the adapters."""
    rows, tokens = size
    steps = 3

    def twice() -> dict[str, Any]:
        texts = [examples_of(subject.task, rows, tokens, seed) for seed in range(clients)]
        with subject.fedsb(FedSB(rank=RANKS["fed-sb"])) as side:
            first, second, alone = (side.train(own, steps) for own in (texts, texts, texts[:1]))
        trained = [key for key in first[0].tensors if key.endswith(".R")]
        pairs = [(a.tensors[key], b.tensors[key]) for a, b in zip(first, second, strict=True) for key in trained]
        largest = max(float(a.abs().max()) for a, _ in pairs)
        joint = max(float((first[0].tensors[key] - alone[0].tensors[key]).abs().max()) for key in trained)
        return {
            "equal_bit_for_bit": all(torch.equal(a, b) for a, b in pairs),
            "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
            "joint_against_alone": joint,  # of the first client's values
            "largest_value": largest,
            "steps": steps,
        }

    name = {"what": "same seed twice", "model": subject.name, "method": "fed-sb", "rank": RANKS["fed-sb"]}
    subject.recorder.row({**name, "batch": f"{rows} x {tokens}", "clients": clients}, twice)


def measure_generation(subject: Subject, tokenizer: Any, batch: int, prompt: int, new: int) -> None:
    """Measures greedy generation with each adapter, and with the base model alone."""
    recorder = subject.recorder
    tokens = tuple(int(i) for i in torch.arange(prompt) % WORDS + 3)

    def written(model: nn.Module) -> dict[str, Any]:
        prompts = [Prompt(tokens=tokens, new_tokens=new)] * batch
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            # Without end tokens, all texts have the same length. Reading them waits for the device.
            made = [answer for _, answer in write_answers(model, tokenizer, prompts, ends=[], batch_size=batch)]
            seconds.append(time.perf_counter() - started)
            if time.monotonic() > recorder.ends:
                break
        count = sum(answer.tokens for answer in made)
        best = min(seconds[1:] or seconds)
        return {"tokens_per_second": round(count / best, 1), "tokens": count}

    def with_fedsb() -> dict[str, Any]:
        with subject.fedsb(FedSB(rank=RANKS["fed-sb"])) as side:
            side.release()
            return written(side.adapted.model)

    def with_peft() -> dict[str, Any]:
        with subject.peft() as side:
            return written(side.model)

    for method, run in (
        ("base model", lambda: written(subject.model)),
        ("PEFT LoRA", with_peft),
        ("fed-sb", with_fedsb),
    ):
        name = {"what": "generation", "model": subject.name, "method": method, "rank": RANKS.get(method)}
        recorder.row({**name, "batch": f"{batch} x ({prompt} + {new})", "clients": 1}, run)


def measure_4bit(subject: Subject, tokenizer: Any, size: tuple[int, int]) -> None:
    """Measures a step on the same base in 4 bits, loaded as a run loads it."""
    recorder, (rows, tokens) = subject.recorder, size
    texts = examples_of(subject.task, rows, tokens, 0)
    plain, name = subject.model, subject.name

    def prepared() -> dict[str, Any]:
        if importlib.util.find_spec("bitsandbytes") is None:
            return {"skipped": "bitsandbytes is not installed"}
        if recorder.device.type not in ("cpu", "cuda"):
            return {"skipped": f"bitsandbytes has no kernels for the device {recorder.device}"}
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            plain.save_pretrained(folder)
            config = ModelConfig(name=folder, dtype="bfloat16", device=str(recorder.device), quantize="4bit")
            subject.model = load_base(
                config, auto_class="AutoModelForCausalLM", num_labels=0, pad_token=tokenizer.pad_token_id
            ).model
        return recorder.base(subject.model)

    about = {"model": f"{name} in 4 bits", "batch": f"{rows} x {tokens}", "clients": 1}
    try:
        if "base_gib" not in recorder.row({"what": "4-bit base", **about, "method": None, "rank": None}, prepared):
            return

        def with_fedsb() -> dict[str, Any]:
            with subject.fedsb(FedSB(rank=RANKS["fed-sb"])) as side:
                return recorder.timed(lambda stamp: endless(side, [texts], stamp), 1, rows * tokens)

        def with_peft() -> dict[str, Any]:
            with subject.peft() as side:
                return recorder.timed(lambda stamp: peft_loop(side, texts, stamp), 1, rows * tokens)

        for method, run in (("PEFT LoRA", with_peft), ("fed-sb", with_fedsb)):
            recorder.row({"what": "step", **about, "method": method, "rank": RANKS[method]}, run)
    finally:
        subject.model = plain
        recorder.clean()


def tiny_tokenizer() -> Any:
    """Returns a tokenizer of WORDS words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[EOS]", *(f"word{i}" for i in range(WORDS))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the rows as a table in Markdown."""
    lines = [
        "| what | model | method | r | batch | clients | step, ms | times PEFT | tokens/s | peak, GiB | above base | "
        "remark |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step = f"{row['step_seconds'] * 1000:.1f}" if "step_seconds" in row else ""
        remark = next((f"{word}: {row[word]}" for word in ("skipped", "failed") if word in row), "")
        if "slowest_seconds" in row and not remark:
            remark = f"{row['steps']} steps of {row['fastest_seconds'] * 1000:.1f} to "
            remark += f"{row['slowest_seconds'] * 1000:.1f} ms"
        if "equal_bit_for_bit" in row:
            same = "equal bit for bit" if row["equal_bit_for_bit"] else "not equal"
            remark = f"{same}; largest difference {row['largest_difference']:.2g}, jointly against alone "
            remark += f"{row['joint_against_alone']:.2g}, of values up to {row['largest_value']:.2g}"
        if "base_gib" in row:
            remark = f"the base has {row['base_gib']} GiB"
        cells = [row["what"], row["model"], row["method"], row["rank"], row["batch"], row["clients"], step]
        cells += [row.get(key) for key in ("times_peft", "tokens_per_second", "peak_gib", "above_base_gib")]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in [*cells, remark]) + " |")
    return lines


def measure(recorder: Recorder, *, tiny: bool) -> None:
    """Runs all rows. The first model has all kinds of rows, the others only steps."""
    sizes = [(4, 16), (1, 16)] if tiny else [(4, 512), (1, 512)]
    counts = (1, 2, 3) if tiny else (1, 8, 32)
    tokenizer = tiny_tokenizer()
    task = open_task("text", tokenizer=tokenizer, options=TaskOptions(), max_tokens=sizes[0][1])
    for position, (name, shape) in enumerate((TINY if tiny else SHAPES).items()):
        made: list[Subject] = []

        def build(name: str = name, shape: dict[str, Any] = shape, made: list[Subject] = made) -> dict[str, Any]:
            made.append(Subject(recorder, name, shape, task))
            return recorder.base(made[0].model)

        about = {"what": "base", "model": name, "method": None, "rank": None, "batch": None, "clients": None}
        if "base_gib" not in recorder.row(about, build):
            continue
        subject = made.pop()
        parts: list[Callable[[], None]] = [partial(measure_steps, subject, sizes, counts)]
        if position == 0:
            parts += [
                partial(measure_private, subject, sizes[0]),
                partial(measure_same_seed, subject, sizes[1], counts[1]),
                partial(measure_generation, subject, tokenizer, *((2, 4, 6) if tiny else (8, 64, 128))),
                partial(measure_4bit, subject, tokenizer, sizes[0]),
            ]
        for run in parts:
            recorder.part(name, run)
        del subject, parts, run
        recorder.clean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model; nothing is written")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds after which rows are skipped")
    given = parser.parse_args()
    pretend: Any = nullcontext()
    if given.device == "pretend":
        from support.accelerator import accelerator

        pretend = accelerator()
    elif given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("This machine has no CUDA device. Try --tiny --device cpu.")
    facts: dict[str, Any] = {"commit": git_hash(), "machine": describe_machine(), "device": given.device}
    if given.device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}

    def write(rows: list[dict[str, Any]]) -> None:
        if given.tiny:
            return
        (HERE / "results.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        said = f"Commit {facts['commit']}, {facts.get('gpu', given.device)}, torch {torch.__version__}, "
        said += f"peft {facts['machine']['peft']}. See run.py for what is measured."
        (HERE / "results.md").write_text("\n".join([*table(rows), "", said]) + "\n")

    with pretend:
        recorder = Recorder(torch.device(given.device), time.monotonic() + given.limit, write)
        measure(recorder, tiny=given.tiny)
    if given.tiny:
        print("\n".join(table(recorder.rows)))
    if any("failed" in row for row in recorder.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
