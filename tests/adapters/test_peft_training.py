"""LoraSBConfig under other trainers: two processes with DDP, FSDP and FSDP2, and TRL's SFT followed by DPO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsb import LoraSBConfig

STEPS = 3


def base(vocabulary: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows() -> torch.Tensor:
    return torch.arange(4 * 6).reshape(4, 6) % 50


def losses_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The losses of a few SGD steps on the same rows."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def train_in_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = rows()[2 * rank : 2 * rank + 2]
    found: dict[str, Any] = {}
    model = get_peft_model(base(), LoraSBConfig(r=8, basis="weights"))
    parallel: nn.Module = DistributedDataParallel(model)
    found["broadcast"] = [name for name, _ in parallel.named_buffers() if "lorasb" in name]
    found["bytes"] = sum(buffer.nbytes for buffer in parallel.modules_buffers)
    found["ddp"] = losses_of(parallel, mine)
    found["R"] = {name: parameter.detach() for name, parameter in model.named_parameters() if "lorasb_R" in name}
    model = get_peft_model(base(), LoraSBConfig(r=8, basis="weights"))
    policy = fsdp_auto_wrap_policy(model)
    parallel = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu")
    )
    found["fsdp"] = losses_of(parallel, mine)
    model = get_peft_model(base(), LoraSBConfig(r=8, basis="weights"))
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found["fsdp2"] = losses_of(model, mine)
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_agree_with_one_and_broadcast_no_basis(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_a_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["broadcast"] == []
    assert first["bytes"] == sum(buffer.nbytes for buffer in base().buffers())  # none of A and B, in no forward
    model = get_peft_model(base(), LoraSBConfig(r=8, basis="weights"))
    expected = losses_of(model, rows())
    for kind in ("ddp", "fsdp", "fsdp2"):
        torch.testing.assert_close((first[kind] + second[kind]) / 2, expected, rtol=1e-4, atol=0)
    assert expected[-1] < expected[0] - 0.01
    for name, R in first["R"].items():
        assert torch.equal(R, second["R"][name])
        torch.testing.assert_close(R, model.get_parameter(name), rtol=1e-3, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("basis", ["random", "weights"])
def test_trl_sft_then_dpo(basis: str, tmp_path: Path) -> None:
    """DPO starts from its reference, a copy of the adapter from SFT: the first loss is ln 2."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(code): code - 29 for code in range(32, 127)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    common: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.03,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }

    def losses(trainer: Any) -> list[float]:
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    sft = trl.SFTTrainer(
        model=base(len(vocabulary)),
        args=trl.SFTConfig(str(tmp_path / "sft"), **common),
        train_dataset=Dataset.from_dict({"text": ["hello there", "good bye", "a cat sat", "a dog ran"]}),
        processing_class=tokenizer,
        peft_config=LoraSBConfig(r=8, basis=basis, task_type="CAUSAL_LM"),
    )
    first, *_, last = losses(sft)
    assert last < first - 0.1
    sft.model.save_pretrained(tmp_path / "adapter")

    pairs = {"prompt": ["say ", "go "], "chosen": ["yes", "on"], "rejected": ["no", "off"]}
    dpo = trl.DPOTrainer(
        model=PeftModel.from_pretrained(base(len(vocabulary)), tmp_path / "adapter", is_trainable=True),
        args=trl.DPOConfig(str(tmp_path / "dpo"), **common),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )
    first, *_, last = losses(dpo)
    assert first == pytest.approx(math.log(2), abs=1e-3)
    assert 0 < last < first - 0.05
