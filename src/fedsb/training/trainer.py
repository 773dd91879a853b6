"""What trains and scores, whoever holds it: the task, and the base model with the method's adapter on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from fedsb.adapters.adapted import AdaptedModel, Tensors, block_layers, find_targets, left_out
from fedsb.adapters.basis import Basis
from fedsb.adapters.export import BaseModelInfo, merged_plan
from fedsb.adapters.layer import linear_shape
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.tasks.base import Example, Task, Tokenizer, ids, pad_token
from fedsb.methods.base import Method
from fedsb.models.heads import head_start
from fedsb.models.limits import check_positions, check_tokens
from fedsb.models.load import load_base, matmul_precision
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.payload import unpack
from fedsb.protocol.traffic import Direction, TrafficRecord
from fedsb.training.base_info import base_model_info
from fedsb.training.basis import Sums, Tell, build_basis, no_sums
from fedsb.training.joint import Member, join_tensors, train_together
from fedsb.training.local import LocalTraining
from fedsb.training.preflight import made_up_adapter, preflight, try_with_peft
from fedsb.training.resolved import end_choices, targets_choice
from fedsb.training.score import Score
from fedsb.training.scoring import forward, measured


class Trainer:
    """Of a task whose classes are known. Raises UserError for a model that does not load or does not fit."""

    def __init__(self, config: Config, method: Method, tokenizer: Tokenizer, task: Task) -> None:
        self.config, self.method, self.tokenizer, self.task = config, method, tokenizer, task
        self.base = load_base(
            config.model,
            auto_class=task.auto_class,
            num_labels=len(task.label_names),
            pad_token=pad_token(tokenizer),
        )
        positions = check_positions(self.base.model, config.model)
        targets = find_targets(self.base.model, config.model.target_modules, self.base.head)
        blocks = block_layers(self.base.model, self.base.head) or targets
        self.block_shapes = {name: linear_shape(self.base.model.get_submodule(name)) for name in blocks}
        without = left_out(self.base.model, self.base.head)
        self.adapted = self._adapt(targets)
        self.shapes = self.adapted.shapes
        self.head = head_start(self.adapted.head_tensors(), config.seed)
        self.preflight = preflight(
            self.adapted,
            task,
            self.head,
            private_rows=config.privacy.unit == "example",
            batch=config.train.batch_size,
        )
        factors, head, inputs, logits = made_up_adapter(self.adapted, task, self.head)
        facts, model = self.base_model_info(), self.adapted.unwrap()
        try_with_peft(model, inputs, logits, factors, head, facts)
        mergeable, why = merged_plan(facts, model)
        self.adapted = self._adapt(targets, one_by_one=self.preflight.unroutable is not None)
        self.trainer_settings: tuple[ResolvedSetting, ...] = (
            *self.base.choices,
            *positions,
            *self._date(),
            targets_choice(config, targets, without),
            *end_choices(task),
            *self.preflight.choices,
            ResolvedSetting(key="export --merged", value="available" if mergeable else "not available", reason=why),
        )

    def _adapt(self, targets: Sequence[str], *, one_by_one: bool = False) -> AdaptedModel:
        method, base = self.method, self.base
        adapted = AdaptedModel(base.model, kind=method.adapter, targets=targets, head=base.head, scale=method.scale)
        adapted.routing.one_by_one = one_by_one
        return adapted

    def base_model_info(self) -> BaseModelInfo:
        """Returns what an adapter of this run must say of its base, and of how it is used."""
        return base_model_info(self.base, self.task, self.adapted.layers, self.config.model.revision)

    def _date(self) -> tuple[ResolvedSetting, ...]:
        if not hasattr(self.tokenizer, "fixed_date"):
            return ()
        reason = "the chat template writes a date into every prompt: fixed when the run started"
        return (ResolvedSetting(key="model.template_date", value=self.tokenizer.fixed_date, reason=reason),)

    def check_rows(self, examples: Iterable[Example]) -> None:
        """Raises UserError where the examples hold a token that the base model does not know."""
        check_tokens(self.base.model, self.tokenizer, (ids(example, "input_ids") for example in examples))

    def make_basis(
        self,
        start: Tensors,
        local: LocalTraining,
        rows: int,
        *,
        seen: Sequence[Example] = (),
        sums: Sums = no_sums,
        tell: Tell = dict,
        round: int = 0,
    ) -> Basis:
        """The basis of `round`; `rows` are those of a client, for the rate of its first step.

        A basis that looks at no data needs no more; what the others ask for is in federation/basis_round.py.
        """
        config = self.config
        eta = config.basis.eta
        return build_basis(
            config.basis,
            self.method,
            self.adapted,
            self.task,
            start,
            seen=seen,
            sums=sums,
            tell=tell,
            eta=local.lr * local.lr_factor(round, 0, local.steps_for(rows)) if eta == "auto" else eta,
            sign=local.optimizer == "adamw",
            seed=config.seed,
            round=round,
            batch_size=config.train.batch_size,
        )

    def train_group(
        self,
        method: Method,
        group: Sequence[Member],
        local: LocalTraining,
        round: int,
        policy: PrivacyPolicy,
    ) -> list[Member]:
        """Clients of one rank after a round of local training, all in one forward; `method` is at their rank."""
        with matmul_precision(self.config.model.float32_matmul_precision):
            return train_together(
                self.adapted,
                self.task,
                group,
                method.trainable(group[0].tensors, round),
                local,
                seed=self.config.seed,
                round=round,
                penalty=method.penalty,
                mechanisms=policy.of_rows(),
                watch=policy.shows("loss"),
            )

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> Score:
        """The task's metric over the examples, with one client's tensors in the adapter."""
        self._load_one(tensors)
        with matmul_precision(self.config.model.float32_matmul_precision):
            found, confusion = measured(self.adapted.model, self.task, examples, self.config.eval.batch_size)
        return Score(value=found.pop(self.task.metric), count=len(examples), extra_metrics=found, confusion=confusion)

    @torch.no_grad()
    def logits(self, tensors: Tensors, examples: Sequence[Example]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The examples as inputs, and the model's logits for them, to compare an exported adapter with."""
        self._load_one(tensors)
        logits, batch = forward(self.adapted.model, self.task, list(examples))
        return {key: value for key, value in batch.items() if key != "labels"}, logits

    def _count(
        self,
        envelope: bytes,
        round: int,
        client: str,
        direction: Direction,
        kind: Literal["round", "basis"] = "round",
        wire: int | None = None,  # bytes that it travelled in; default: its own
    ) -> TrafficRecord:
        payload = unpack(envelope)
        return TrafficRecord(
            round=round,
            client=client,
            direction=direction,
            kind=kind,
            values=payload.values,
            head_values=sum(array.size for key, array in payload.tensors.items() if key in self.head),
            bytes=payload.values_bytes,
            wire_bytes=wire or len(envelope),
        )

    def _load_one(self, tensors: Tensors) -> None:
        self.adapted.load(join_tensors(self.adapted, [tensors]))
