"""Makes what benchmarks/addition compares on: a tiny Llama trained here, its tokenizer, train.jsonl and test.jsonl.

    python benchmarks/addition/make_base.py

A row is {"question": "07+45", "answer": "The answer is: 052", "client": "0-24"}. All 10,000 sums of two numbers of
0..99 are cut at random into test and train; a client has 2,000 rows whose first operand is in its own quarter. The
base has only seen sums of two numbers below 50, and of any number with one below 10 (no test row is among them): it
reads digits and carries, but has never added to a ten above four. Some 45 seconds of one core's work.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANSWER = "The answer is:"
TEST_ROWS = 500
TRAIN_ROWS = 2000  # a client's
CHAT = "{% for m in messages %}{{ m['content'] }}{{ '=' if m['role'] == 'user' else eos_token }}{% endfor %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with a token for each digit or sign and for "The answer is:". Its template asks "07+45="."""
    symbols = ["[PAD]", "[EOS]", "[UNK]", *"0123456789+= "]
    inner = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_tokens([AddedToken(ANSWER, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        chat_template=CHAT,
        model_max_length=16,
        clean_up_tokenization_spaces=False,
    )


def row_of(a: int, b: int) -> dict[str, str]:
    low = a // 25 * 25
    return {"question": f"{a:02}+{b:02}", "answer": f"{ANSWER} {a + b:03}", "client": f"{low}-{low + 24}"}


def is_small(a: int, b: int) -> bool:
    """Returns whether the base model sees such sums."""
    return max(a, b) < 50 or min(a, b) < 10


def make_rows(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Returns the rows (train, test, the base model's). No test row is in the others."""
    pairs = [divmod(int(i), 100) for i in np.random.default_rng(seed).permutation(10_000)]
    test, rest = pairs[:TEST_ROWS], pairs[TEST_ROWS:]
    train = [pair for quarter in range(4) for pair in [p for p in rest if p[0] // 25 == quarter][:TRAIN_ROWS]]
    small = [pair for pair in rest if is_small(*pair)]
    return [row_of(*p) for p in train], [row_of(*p) for p in test], [row_of(*p) for p in small]


def encode(tokenizer: Any, rows: list[dict[str, str]]) -> torch.Tensor:
    """Returns the tokens (rows, t), int64: question, "=", answer, end. All rows have the same length."""
    texts = [f"{row['question']}={row['answer']}{tokenizer.eos_token}" for row in rows]
    return torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])


def train_base(tokenizer: Any, rows: list[dict[str, str]], *, args: argparse.Namespace) -> LlamaForCausalLM:
    """Trains all weights on the answers, by AdamW with a cosine schedule."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * args.hidden,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    tokens_nt = encode(tokenizer, rows)
    read = len(rows[0]["question"]) + 1  # tokens before the answer
    started = time.monotonic()
    for step in range(args.steps):
        batch_bt = tokens_nt[torch.randint(len(tokens_nt), (args.batch_size,))]
        labels_bt = batch_bt.clone()
        labels_bt[:, :read] = -100
        loss = model(input_ids=batch_bt, labels=labels_bt).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Returns the share of sums whose digits are all the likeliest, each given the digits before it."""
    tokens_nt = encode(tokenizer, rows)
    read = len(rows[0]["question"]) + 1
    likeliest_nt = model(input_ids=tokens_nt).logits[:, read - 1 : -1].argmax(-1)
    return float((likeliest_nt == tokens_nt[:, read:]).all(1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    train, test, small = make_rows(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = train_base(tokenizer, small, args=args)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    seen = [row for row in test if is_small(*map(int, row["question"].split("+")))]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} weights; accuracy on the {len(test)} test rows "
        f"{accuracy(model, tokenizer, test):.3f}, on the {len(seen)} of the kind it saw "
        f"{accuracy(model, tokenizer, seen):.3f}"
    )


if __name__ == "__main__":
    main()
