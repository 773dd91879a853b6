"""Fed-SB with a personal core: each client keeps a part of what it learns, and shares the rest.

    W_k = W0 + s B (R + P_k) A        client k trains C_k, starting from R + P_k;   u_k = C_k - (R + P_k)
    R <- R + (1 - a) sum_k p_k u_k    P_k <- P_k + a u_k                            a = `personal`, P_k = 0 at first

With a = 0 this is Fed-SB, with a = 1 every client would train alone. Since R and P_k are added, training both with the
learning rates (1 - a) lr and a lr is training their sum with lr: no second pass, and nothing else is sent. The mixture
of a global and a local model is that of Hanzely and Richtarik (arXiv 2002.05516) and APFL (Deng, Kamani, Mahdavi,
arXiv 2003.13461), here on cores with a fixed share instead of a penalty or a trained weight.

Shapes, per layer: as in Fed-SB; P_k (h, r, r).
What travels: the core, up and down, as in Fed-SB. P_k stays with its client.
Limits: the global model, R alone, has learned only a part 1 - a of each step, so it needs a higher learning rate or
more rounds. A client that never takes part has no P_k. Noise that clients share is refused, because the server takes
the step then, and it has no P_k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fedsb.methods.base import MethodSpec
from fedsb.methods.fed_sb import FedSB
from fedsb.utils.tensors import Tensors


class FedSBPersonal(FedSB):
    spec: ClassVar[MethodSpec] = replace(
        FedSB.spec,
        id="fed-sb-personal",
        travels="the core R, up and down; a personal core stays with each client",
        exact=False,
        client_state="its personal core",
        own_models=True,
    )
    personal: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Fraction of the change of its core that a client keeps for itself."""

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        own = super().init_client(shared, message, client_state, round)
        cores = {key: R for key, R in own.items() if key.endswith(".R")}
        personal = {f"{key[:-2]}.P": torch.zeros_like(R) for key, R in cores.items()}
        return {**own, **personal, **client_state}

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(key for key in super().trainable(tensors, round) if not key.endswith(".P"))

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        sent, _ = super().upload(received, trained, round)
        change = {key: trained[key] - received[key] for key in sent if key.endswith(".R")}
        sent |= {key: received[key] + (1 - self.personal) * u for key, u in change.items()}
        return sent, {f"{key[:-2]}.P": received[f"{key[:-2]}.P"] + self.personal * u for key, u in change.items()}
