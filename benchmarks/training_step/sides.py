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
from fedsb.training.joint import ClientTraining, JointTrainer, RoundTraining, join_tensors
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
    """Joint training of clients, each with its own rows, as a round of a run does it."""

    def __init__(self, model: nn.Module, task: Task, method: Method, *, head: Sequence[str]) -> None:
        self.task, self.method = task, method
        self.adapted = AdaptedModel(
            model, kind=method.adapter, targets=find_targets(model, "blocks", head), head=head, scale=method.scale
        )
        shapes = self.adapted.shapes
        basis = None
        if method.adapter == "core":
            pairs = ((layer, random_pair(*shape, method.total_rank, 0, layer)) for layer, shape in shapes.items())
            basis = make_basis("random", pairs)
        self.tensors = method.model(method.start(shapes, basis, head_start(self.adapted.head_tensors(), 0), 0))

    def train(
        self,
        clients: Sequence[list[Example]],
        steps: int,
        at_start: Callable[[], None] | None = None,
        mechanisms: dict[str, DPMechanism] | None = None,
    ) -> list[ClientTraining]:
        """Trains a round of `steps` steps, each on all rows of each client. Returns the clients after it.

        Args:
            at_start: called at the start of each step.
            mechanisms: for a private round, by client: "0", "1", ...
        """
        task: Any = self.task if at_start is None else Watched(self.task, at_start)
        local = LocalTraining(steps=steps, batch_size=len(clients[0]), lr=LR, head_lr=LR)
        how = RoundTraining(
            round=0,
            trainable=self.method.trainable(self.tensors, 0),
            penalty=self.method.penalty,
            mechanisms=mechanisms,
            watch=False,
        )
        before = [ClientTraining(name=f"{k}", examples=own, tensors=self.tensors) for k, own in enumerate(clients)]
        return JointTrainer(self.adapted, task, local, 0).train(before, how)

    def release(self) -> None:
        """Loads one client's first tensors, so that the model keeps no views of a trainer's buffers."""
        self.adapted.routing.rows = self.adapted.routing.dropout = None
        self.adapted.load(join_tensors(self.adapted, [self.tensors]))

    def frozen(self) -> set[int]:
        """Returns the addresses of the base model's and the adapter's tensors."""
        named = [getattr(layer, name) for layer in self.adapted.layers.values() for name in layer.names]
        return _addresses([*self.adapted.model.parameters(), *self.adapted.model.buffers(), *named])


class PeftSide:
    """A plain loop with PEFT's LoRA, fused AdamW, and the loss that transformers computes."""

    def __init__(self, model: nn.Module, task: Task, *, rank: int, head: Sequence[str]) -> None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=find_targets(model, "blocks", head),
            task_type=task.peft_task_type,
            modules_to_save=[*head] or None,
        )
        self.task, self.model = task, get_peft_model(model, lora)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        fast: dict[str, bool] = {"fused": True} if self.device.type in ("cpu", "cuda") else {"foreach": False}
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0, **fast)  # type: ignore[arg-type]

    def batch_of(self, rows: list[Example]) -> dict[str, Tensor]:
        """Returns the rows as a batch on the device."""
        return {key: x.to(self.device) for key, x in self.task.collate(rows).items() if key != "targets"}

    def step(self, batch: dict[str, Tensor]) -> None:
        extra = {"use_cache": False} if batch["labels"].dim() == 2 else {}
        self.model(**batch, **extra).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=None if self.device.type == "cuda" else False)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def frozen(self) -> set[int]:
        """Returns the addresses of the model's tensors."""
        return _addresses([*self.model.parameters(), *self.model.buffers()])


@contextmanager
def saved_activations(excluded: Callable[[], set[int]]) -> Iterator[dict[int, int]]:
    """Yields the bytes of each storage that autograd saves for the backward pass, by address.

    The addresses in `excluded` are left out at the end.
    """
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
    for address in excluded():
        found.pop(address, None)


def _addresses(tensors: Sequence[Any]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}
