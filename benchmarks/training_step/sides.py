"""The two sides of a comparison of training steps: fedsb's joint training, and a plain loop with PEFT's LoRA.

Both train the same layers of the same base model, on the same rows, with AdamW and a clip of the gradients' norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.basis import make_basis, random_pair
from fedsb.data.tasks.base import Example, Task
from fedsb.methods.base import Method
from fedsb.models.heads import head_start
from fedsb.models.layers import find_targets
from fedsb.privacy.mechanism import DPMechanism
from fedsb.training.joint import ClientTraining, JointTrainer, RoundTraining
from fedsb.training.local import LocalTraining

LR = 1e-3


def examples_of(task: Task, rows: int, tokens: int, seed: int) -> list[Example]:
    """Returns random texts of exactly `tokens` tokens."""
    draw = np.random.default_rng(seed)
    made = [task.made_up(tokens, draw) for _ in range(rows)]
    lengths = {len(example["input_ids"]) for example in made}  # type: ignore[arg-type]
    if lengths != {tokens}:
        raise ValueError(f"The texts have {lengths} tokens. {tokens} were expected.")
    return made


class Watched:
    """A task that calls a function at the start of each forward pass, which is the start of a step here."""

    def __init__(self, task: Task, at_start: Callable[[], None]) -> None:
        self._task, self._at_start = task, at_start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def collate(self, examples: list[Example]) -> Any:
        self._at_start()
        return self._task.collate(examples)


class FedsbSide:
    """Joint training of some clients, each with its own rows, as a round of a run does it."""

    def __init__(
        self, model: nn.Module, task: Task, method: Method, *, head: Sequence[str], clients: Sequence[list[Example]]
    ) -> None:
        targets = find_targets(model, "blocks", head)
        self.task, self.method, self.rows = task, method, len(clients[0])
        self.adapted = AdaptedModel(model, kind=method.adapter, targets=targets, head=head, scale=method.scale)
        shapes = self.adapted.shapes
        basis = None
        if method.adapter == "core":
            basis = make_basis(
                "random", ((key, random_pair(*mn, method.total_rank, 0, key)) for key, mn in shapes.items())
            )
        state = method.start(shapes, basis, head_start(self.adapted.head_tensors(), 0), 0)
        tensors = method.model(state)
        self.clients = [ClientTraining(name=f"{k}", examples=own, tensors=tensors) for k, own in enumerate(clients)]
        self.trainable = method.trainable(tensors, 0)

    def train(
        self, steps: int, at_start: Callable[[], None] | None = None, mechanisms: dict[str, DPMechanism] | None = None
    ) -> list[ClientTraining]:
        """Trains a round of `steps` steps, each on all rows of a client. Returns the clients after it."""
        task: Any = self.task if at_start is None else Watched(self.task, at_start)
        local = LocalTraining(steps=steps, batch_size=self.rows, lr=LR, head_lr=LR)
        how = RoundTraining(
            round=0, trainable=self.trainable, penalty=self.method.penalty, mechanisms=mechanisms, watch=False
        )
        return JointTrainer(self.adapted, task, local, 0).train(self.clients, how)

    def frozen(self) -> set[int]:
        """Returns the addresses of the base model's and the adapter's tensors."""
        named = [getattr(layer, name, None) for layer in self.adapted.layers.values() for name in ("A", "B", "R")]
        return _addresses([*self.adapted.model.parameters(), *self.adapted.model.buffers(), *filter(_is_tensor, named)])


class PeftSide:
    """A plain loop with PEFT's LoRA, fused AdamW, and the loss that transformers computes."""

    def __init__(
        self, model: nn.Module, task: Task, *, rank: int, head: Sequence[str], rows: list[Example], device: Any
    ) -> None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=find_targets(model, "blocks", head),
            task_type=task.peft_task_type,
            modules_to_save=[*head] or None,
        )
        self.model = get_peft_model(model, lora)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
        self.trained = trained
        batch = {key: x.to(device) for key, x in task.collate(rows).items() if key != "targets"}
        self.batch: dict[str, Tensor] = batch  # ready on the device before the first step

    def step(self) -> None:
        loss = self.model(**self.batch, use_cache=False).loss if self.is_causal else self.model(**self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def is_causal(self) -> bool:
        return self.batch["labels"].dim() == 2

    def frozen(self) -> set[int]:
        """Returns the addresses of the model's tensors."""
        return _addresses([*self.model.parameters(), *self.model.buffers()])


@contextmanager
def saved_activations(excluded: Callable[[], set[int]]) -> Iterator[dict[int, int]]:
    """Yields the bytes of each storage that autograd saves for the backward pass, by address, without the model's own."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
    for address in excluded():
        found.pop(address, None)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _addresses(tensors: Sequence[Any]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}
