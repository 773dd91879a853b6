"""The configuration of LoRA-SB as a PEFT tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig, PeftType

from fedsb.utils.errors import UserError, did_you_mean

BASES = ("random", "weights", "update", "given")


@dataclass
class LoraSBConfig(PeftConfig):  # type: ignore[misc]
    """The layers to adapt, the rank and the basis.

    Args:
        r: rank of one core. A layer trains blocks * r^2 values, and its change has rank blocks * r.
        basis: how A and B are made. "random": orthonormal, from `seed`. "weights": singular vectors of W0, from
            `weights_side`. "update": from the first full step, by calling `update_basis_` before training. "given": by
            calling `LoraSBLinear.set_basis`. With the last two, A and B are NaN until the call, so that a missing call
            is noticed.
        blocks: number h of cores per layer.
        scale: the scale s.
        target_modules: None for every linear layer of the transformer blocks, a regular expression that must match the
            whole name, a list of name endings, or "all-linear", as in PEFT.
        exclude_modules: names, or a regular expression, of layers to leave out.
        modules_to_save: modules that are trained and saved in full, such as a task head.
        layers_to_transform, layers_pattern: indices of the blocks to adapt, and the name of the list that contains the
            blocks. They work with a list of target_modules and with the default.
    """

    r: int = 64
    basis: str = "random"
    blocks: int = 1
    scale: float = 1.0
    seed: int = 0
    weights_side: Literal["leading", "trailing"] = "leading"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Only a config file contains the type. Its tensors are usually loaded next, so the basis can wait.
        self.from_file = getattr(self, "peft_type", None) is not None
        self.peft_type = PeftType.LORASB
        if self.r < 1 or self.blocks < 1:
            raise UserError(f"r = {self.r} and blocks = {self.blocks} are not valid. Both must be at least 1.")
        if self.basis not in BASES:
            raise UserError(f"there is no basis {self.basis!r}; {did_you_mean(self.basis, BASES)}")
        if self.weights_side not in ("leading", "trailing"):
            raise UserError(f"weights_side = {self.weights_side!r}: choose 'leading' or 'trailing'")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError(
                "`layers_to_transform` cannot be used when `target_modules` is a str. "
                f"Write target_modules = {self.target_modules!r} as a list of names, such as ['q_proj', 'v_proj']."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
                f"Add the indices of the blocks in {self.layers_pattern!r} that should be adapted."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    @property
    def total_rank(self) -> int:
        """The rank h r of the change and of the exported plain LoRA."""
        return self.blocks * self.r

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
