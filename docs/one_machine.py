"""LoRA-SB on one machine, with PEFT and the Hugging Face Trainer.

python docs/one_machine.py                a tiny Llama with random weights, no network, seconds on a CPU
python docs/one_machine.py MODEL_FOLDER   any causal language model in a local folder
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from fedsb.adapters.peft_export import save_as_lora
from fedsb.adapters.peft_tuner import LoraSBConfig

TEXT = """\
The lighthouse keeper counted the ships at dusk, and wrote each name in a green book.
On the ninth evening a ship without a name came in, and the keeper wrote a question mark.
By morning the ship was gone, the tide was low, and the question mark had become a bird.
"""


def base_model(folder: str | None) -> LlamaForCausalLM:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def token_rows(folder: str | None) -> list[dict[str, torch.Tensor]]:
    """Returns the lines of TEXT as token ids, or as bytes without a tokenizer."""
    encode = AutoTokenizer.from_pretrained(folder).encode if folder else lambda line: list(line.encode())
    return [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in map(encode, TEXT.splitlines())]


def main(folder: str | None, out: Path, steps: int = 100) -> tuple[float, float, float]:
    """Trains, saves, loads and merges. Returns the first and last loss, and the relative difference of logits."""
    rows = token_rows(folder)

    model = get_peft_model(base_model(folder), LoraSBConfig(r=16, basis="weights"))
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        out / "trainer",
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    print(f"loss of the first three steps {first:.3f}, of the last three {last:.3f}")

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=rows[0]["input_ids"][None]).logits

    trained = logits(model)
    model.save_pretrained(out / "adapter")  # A, B and R: loads where fedsb is installed
    save_as_lora(model, out / "plain-lora")  # an ordinary LoRA: loads anywhere
    others = {
        "loaded": PeftModel.from_pretrained(base_model(folder), out / "adapter"),
        "plain LoRA": PeftModel.from_pretrained(base_model(folder), out / "plain-lora"),
        "merged": model.merge_and_unload(),
    }
    differences = {
        name: float((logits(other) - trained).abs().max() / trained.abs().max()) for name, other in others.items()
    }
    print(
        "difference of logits, relative to the largest:",
        ", ".join(f"{name} {value:.0e}" for name, value in differences.items()),
    )
    for path in (out / "adapter", out / "plain-lora"):
        print(f"{path.name}: {(path / 'adapter_model.safetensors').stat().st_size:,} bytes")
    return first, last, max(differences.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else None, Path(scratch))
