"""The trainer of the server and of every client: the task, and the base model with the method's adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.basis import Basis
from fedsb.adapters.export import BaseModelInfo
from fedsb.adapters.merge import merged_plan
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.tasks.base import Example, Task, ids, inputs_of
from fedsb.data.tasks.tokens import Tokenizer, pad_token
from fedsb.methods.base import Method, State
from fedsb.models.heads import head_start
from fedsb.models.hub import quiet, read_generation_config
from fedsb.models.layers import block_layers, find_targets, left_out, linear_shape
from fedsb.models.limits import check_positions, check_tokens
from fedsb.models.load import BaseModel, load_base, matmul_precision
from fedsb.models.placement import Placement
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.training.base_info import base_model_info
from fedsb.training.basis import BasisSource, build_basis
from fedsb.training.joint import ClientTraining, JointTrainer, RoundTraining, Team, join_tensors
from fedsb.training.local import LocalTraining
from fedsb.training.preflight import Preflight, made_up_adapter, preflight, try_with_peft
from fedsb.training.resolved import end_choices, local_training, targets_choice
from fedsb.training.score import Score
from fedsb.training.scoring import forward, measured
from fedsb.utils.errors import UserError
from fedsb.utils.tensors import Tensors

NO_PREFLIGHT = Preflight(unroutable=None, mixing=None, untouched=(), seconds=0.0)  # without weights


class Trainer:
    """For a task whose classes are known. Raises UserError for a model that does not load or does not fit.

    Args:
        shapes_only: builds the model from its config, without weights, for a coordinator that only aggregates and
            exports. Such a trainer has no preflight, and cannot train, score or compute logits.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        tokenizer: Tokenizer,
        task: Task,
        local: LocalTraining | None = None,
        *,
        placement: Placement | None = None,
        shapes_only: bool = False,
    ) -> None:
        self.config, self.method, self.tokenizer, self.task = config, method, tokenizer, task
        self.shapes_only = shapes_only
        self.local = local or local_training(config)
        if config.model.dtype == "float16":
            raise UserError(
                "model.dtype = 'float16' cannot be trained: gradients below 6e-8 become 0, and fedsb does not scale "
                "the loss. Use bfloat16 or float32."
            )
        placement = placement or Placement()
        with placement.loading(config.model) as model_config:
            base = load_base(
                model_config,
                auto_class=task.auto_class,
                num_labels=len(task.label_names),
                pad_token=pad_token(tokenizer),
                shapes_only=shapes_only,
            )
            if shapes_only:
                _refuse_shipped_config(base, task)
                with quiet():
                    read_generation_config(base.model, base.name, config.model.revision)
            positions = check_positions(base.model, config.model)
            targets = find_targets(base.model, config.model.target_modules, base.head)
            blocks = block_layers(base.model, base.head) or targets
            self.block_shapes = {name: linear_shape(base.model.get_submodule(name)) for name in blocks}
            without = left_out(base.model, base.head)
            if not shapes_only:  # reads the weights, as `find_targets` does, so it comes before they are divided
                mergeable = merged_plan(base_model_info(base, task, {}, config.model.revision), base.model)
            self.base = placement.place(base)
        self.adapted = self._adapt(targets)
        self.shapes = self.adapted.shapes
        self.head = head_start(self.adapted.head_tensors(), config.seed)
        self.preflight, tried = (NO_PREFLIGHT, [_no_weights()]) if shapes_only else self._try(targets, *mergeable)
        self._joint = JointTrainer(self.adapted, task, self.local, config.seed, compiled=config.model.compile)
        self._data_free: dict[int, Basis] = {}
        self.settings: tuple[ResolvedSetting, ...] = (
            *self.base.choices,
            *positions,
            *self._date(),
            targets_choice(config, targets, without),
            *end_choices(task),
            *tried,
        )

    def base_model_info(self) -> BaseModelInfo:
        """Returns what an adapter of this run states about its base, and about its use."""
        return base_model_info(self.base, self.task, self.adapted.layers, self.config.model.revision)

    def check_rows(self, examples: Iterable[Example]) -> None:
        """Raises UserError where the examples contain a token that the base model does not know."""
        check_tokens(self.base.model, self.tokenizer, (ids(example, "input_ids") for example in examples))

    # --- the start ---

    def start_state(self, basis: Basis | None) -> State:
        """Returns the state before the first round."""
        return self.method.start(self.shapes, basis, self.head, self.config.seed)

    def data_free_basis(self, round: int) -> Basis:
        """Returns the basis of this round where it looks at no data; every client derives the same."""
        if round not in self._data_free:
            self._data_free = {round: self.make_basis(BasisSource(start=self.head, round=round))}
        return self._data_free[round]

    def make_basis(self, source: BasisSource) -> Basis:
        """Returns the basis that the configuration asks for."""
        return build_basis(self.config, self.method, self.adapted, self.task, self.local, source)

    # --- rounds ---

    def join(self, team: Team | None) -> None:
        """Makes this process one of several that train the same clients; None: alone."""
        self._joint.team = team

    def train(
        self, clients: Sequence[ClientTraining], method: Method, round: int, policy: PrivacyPolicy
    ) -> list[ClientTraining]:
        """Returns clients of one rank after a round of local training in one forward; `method` is at their rank."""
        how = RoundTraining(
            round=round,
            trainable=method.trainable(clients[0].tensors, round),
            penalty=method.penalty,
            mechanisms=policy.row_mechanisms(),
            watch=policy.may_release("loss"),
        )
        with matmul_precision(self.config.model.float32_matmul_precision):
            return self._joint.train(clients, how)

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> Score:
        """Returns the task's metric over the examples, with one client's tensors in the adapter."""
        self._load_one(tensors)
        with matmul_precision(self.config.model.float32_matmul_precision):
            found, confusion = measured(self.adapted.model, self.task, examples, self.config.eval.batch_size)
        return Score(value=found.pop(self.task.metric), count=len(examples), extra_metrics=found, confusion=confusion)

    @torch.no_grad()
    def logits(self, tensors: Tensors, examples: Sequence[Example]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Returns the examples as inputs, and the model's logits for them, to compare an exported adapter with."""
        self._load_one(tensors)
        logits, batch = forward(self.adapted.model, self.task, list(examples), whole=True)
        return inputs_of(batch), logits

    # --- private ---

    def _try(self, targets: Sequence[str], mergeable: bool, why: str) -> tuple[Preflight, list[ResolvedSetting]]:
        """Tries the model, and PEFT with a made-up adapter. Returns the findings, also as settings to show."""
        config, task = self.config, self.task
        found = preflight(
            self.adapted,
            task,
            self.head,
            private_rows=config.privacy.unit == "example",
            batch=config.train.batch_size,
        )
        factors, head, inputs, logits = made_up_adapter(self.adapted, task, self.head)
        facts, model = self.base_model_info(), self.adapted.unwrap()
        try_with_peft(model, inputs, logits, factors, head, facts)
        self.adapted = self._adapt(targets, one_by_one=found.unroutable is not None)
        available = "available" if mergeable else "not available"
        return found, [*found.choices, ResolvedSetting(key="export --merged", value=available, reason=why)]

    def _adapt(self, targets: Sequence[str], *, one_by_one: bool = False) -> AdaptedModel:
        method, base = self.method, self.base
        adapted = AdaptedModel(
            base.model,
            kind=method.adapter,
            targets=targets,
            head=base.head,
            scale=method.scale,
            fingerprint=base.fingerprint,
        )
        adapted.routing.one_by_one = one_by_one
        return adapted

    def _date(self) -> tuple[ResolvedSetting, ...]:
        if not hasattr(self.tokenizer, "fixed_date"):
            return ()
        reason = "the chat template writes a date into every prompt: fixed when the run started"
        return (ResolvedSetting(key="model.template_date", value=self.tokenizer.fixed_date, reason=reason),)

    def _load_one(self, tensors: Tensors) -> None:
        self.adapted.load(join_tensors(self.adapted, [tensors]))


def _refuse_shipped_config(base: BaseModel, task: Task) -> None:
    """Raises UserError for a classifier built from shipped shapes: its adapter's folder contains the config itself."""
    if task.label_names and any(choice.key == "model.shapes" for choice in base.choices):
        raise UserError(
            f"The config.json of {base.name!r} is not on this machine, and the adapter of a classifier contains it. "
            f"Fetch it without the weights: hf download {base.name} config.json"
        )


def _no_weights() -> ResolvedSetting:
    reason = "the model was built from its config; every site loads the weights and runs the preflight"
    return ResolvedSetting(key="server.load_base_model", value=False, reason=reason)
