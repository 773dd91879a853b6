"""A client's checks of a server's tensors and package versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fedsb.utils.environment import versions
from fedsb.utils.errors import RefusalError
from fedsb.utils.tensors import Shapes, Tensors

SAME = ("fedsb", "torch", "transformers")  # versions that must equal the coordinator's: others compute other numbers
LARGEST = 1e6  # of the values that a client receives
ORTHONORMAL = 1e-3  # by which the entries of A A' and B'B may differ from those of the identity


def refuse_values(tensors: Tensors) -> None:
    """Raises RefusalError if a server sent values that are not finite or out of range."""
    for key, x in tensors.items():
        if x.is_floating_point() and x.numel() and not float(x.abs().max()) <= LARGEST:
            raise RefusalError(
                f"The broadcast contains values of {key!r} that are NaN, infinite or above {LARGEST:g}. It was "
                "discarded. The coordinator may lower its learning rate."
            )


def refuse_basis(shared: Tensors, shapes: Shapes) -> None:
    """Raises RefusalError if a layer's B or A is missing, has a wrong shape, or is not orthonormal.

    A basis of a different scale would scale every row's gradient. A coordinator without the base model checks the basis
    that a site sends in the same way.
    """
    for layer, (m, n) in shapes.items():
        B, A = shared.get(f"{layer}.B"), shared.get(f"{layer}.A")
        if A is None or B is None or A.ndim != 2 or A.shape[1] != n or B.shape != (m, len(A)):
            raise RefusalError(f"The tensors of the basis do not fit layer {layer!r}. It does not belong to this run.")
        for gram in (A @ A.T, B.T @ B):
            if not float((gram - torch.eye(len(A))).abs().max()) <= ORTHONORMAL:
                raise RefusalError(
                    f"The basis is not orthonormal in layer {layer!r}. Only orthonormal ones are accepted."
                )


@contextmanager
def fitting() -> Iterator[None]:
    """Raises RefusalError if the names or shapes of a broadcast differ from those of this run."""
    try:
        yield
    except RefusalError:
        raise
    except (ValueError, KeyError, RuntimeError) as error:
        raise RefusalError(f"The broadcast does not belong to this run: {type(error).__name__}: {error}.") from error


def refuse_versions(theirs: Mapping[str, str]) -> None:
    """Raises RefusalError if a package's version differs from the coordinator's. Build suffixes are ignored."""
    ours = versions()
    other = [
        f"{name} {ours[name]} here, {theirs.get(name, 'none')} at the coordinator"
        for name in SAME
        if ours[name].partition("+")[0] != theirs.get(name, "none").partition("+")[0]
    ]
    if other:
        raise RefusalError(
            "Different versions from the coordinator's: " + "; ".join(other) + ". Install the same ones."
        )


def refuse_base(model: tuple[str, str | None], tokenizer: tuple[str, str]) -> None:
    """Raises RefusalError if the fingerprints of the base model or tokenizer, (here, at the coordinator), differ.

    A coordinator without the base model has no fingerprint of it.
    """
    for what, (here, there) in {"model": model, "tokenizer": tokenizer}.items():
        if there is not None and here != there:
            raise RefusalError(
                f"A different {what} from the coordinator's: {here} here, {there} there. Set model = 'FOLDER' in "
                "site.toml to where the right one is."
            )
