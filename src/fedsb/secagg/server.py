"""The server of secure aggregation; protocol.py describes the protocol."""

from __future__ import annotations

import numpy as np

from fedsb.secagg.fixed_point import Ring
from fedsb.secagg.keys import (
    Keys,
    advert_bytes,
    distinct,
    mask_private,
    pair_mask,
    public_key,
    read_advert,
    require_agreement,
    sealed_bytes,
    self_check,
    self_mask,
    signed_survivors,
)
from fedsb.secagg.messages import SERVER, KeyPlan, MessageError, Phase, Plan, SumError, SumPlan, pack_list, read
from fedsb.secagg.primitives import KEY_BYTES, SEED_BYTES, SIGNATURE_BYTES, combine


class _Phases:
    """Phases that collect one message from each client: `receive` them, then close the phase.

    Closing a phase raises SumError if fewer than t messages have arrived. The phase then stays open, so that the caller
    may continue to wait.
    """

    plan: Plan

    def __init__(self, first: Phase) -> None:
        self._phase: Phase | None = first
        self._got: dict[str, bytes] = {}  # bodies of this phase, by client
        self._lists: list[tuple[str, ...]] = [self.plan.names]  # who may send in each phase so far

    @property
    def silent(self) -> tuple[str, ...]:
        """The clients whose message of this phase is missing."""
        return tuple(name for name in self._lists[-1] if name not in self._got)

    def receive(self, client: str, data: bytes) -> None:
        """Takes a message from `client`, as the transport authenticated it. Raises MessageError with what is wrong."""
        if self._phase is None:
            raise MessageError(f"a message from {client!r:.60}, but the sum is over")
        if client not in self._lists[-1]:
            why = "has left this round" if client in self.plan.names else "is not one of its clients"
            raise MessageError(f"a message from {client!r:.60}, which {why}")
        body = read(self.plan, data, self._phase, client, self._size(self._phase))
        if client in self._got:
            raise MessageError(f"a second message {self._phase!r} from {client}")
        self._got[client] = self._checked(self._phase, client, body)

    def _size(self, phase: Phase) -> int:
        """Returns the bytes of a body in this phase."""
        raise NotImplementedError

    def _checked(self, phase: Phase, client: str, body: bytes) -> bytes:
        """Returns what is kept of a body. Raises MessageError for a bad one."""
        raise NotImplementedError

    def _needed(self, phase: Phase) -> int:
        """Returns the number of messages without which a phase cannot be closed."""
        return self.plan.threshold

    def _close(self, phase: Phase, following: Phase | None) -> dict[str, bytes]:
        """Closes a phase and returns its bodies by name, sorted."""
        if self._phase != phase:
            now = f"it is in {self._phase!r}" if self._phase else "it is over"
            raise SumError(f"round {self.plan.round + 1}: the sum cannot close {phase!r}, {now}")
        needed, t = self._needed(phase), self.plan.threshold
        if len(self._got) < needed:
            why = f"the threshold is {t}" if needed == t else f"without signatures all {needed} with keys must"
            raise SumError(
                f"round {self.plan.round + 1}: {len(self._got)} of {len(self.plan.names)} clients sent {phase!r}; "
                f"{why}. Missing: {', '.join(self.silent)}. There is no sum without them."
            )
        got, self._got, self._phase = dict(sorted(self._got.items())), {}, following
        self._lists.append(tuple(got))
        return got


class KeyServer(_Phases):
    """The server of one agreement of keys. Without signatures all clients that send `advert` must send the rest."""

    plan: KeyPlan

    def __init__(self, plan: KeyPlan) -> None:
        self.plan = plan
        super().__init__("advert")
        self.keys: dict[str, Keys] = {}
        self.roster_message = b""  # as sent: signatures are bound to it

    @property
    def members(self) -> tuple[str, ...]:
        """The clients that have all others' shares, so that they can take part in sums; empty before `close`."""
        return self._lists[3] if len(self._lists) > 3 else ()

    def roster(self) -> dict[str, bytes]:
        """Closes `advert` and returns all keys, by recipient."""
        adverts = self._close("advert", "sealed")
        self.roster_message = pack_list(self.plan, "roster", SERVER, adverts, adverts.values())
        return dict.fromkeys(adverts, self.roster_message)

    def inboxes(self) -> dict[str, bytes]:
        """Closes `sealed` and returns what was sealed for each client."""
        sealed = self._close("sealed", "held")
        return {
            to: pack_list(
                self.plan,
                "inbox",
                SERVER,
                sealed,
                [self._item(sealed[name], name, to) for name in sealed if name != to],
            )
            for to in sealed
        }

    def close(self) -> None:
        """Closes `held`."""
        self._close("held", None)

    def _needed(self, phase: Phase) -> int:
        return self.plan.threshold if self.plan.signed or phase == "advert" else len(self._lists[1])

    def _size(self, phase: Phase) -> int:
        if phase == "advert":
            return advert_bytes(self.plan)
        return sealed_bytes(self.plan) * (len(self._lists[1]) - 1) if phase == "sealed" else 0

    def _checked(self, phase: Phase, client: str, body: bytes) -> bytes:
        if phase == "advert":
            keys = read_advert(self.plan, client, body)
            if not distinct([keys, *self.keys.values()]):
                raise MessageError(f"the message 'advert' from {client} has a key twice, or that of a different client")
            self.keys[client] = keys
        return body

    def _item(self, body: bytes, sender: str, to: str) -> bytes:
        """Returns what `sender` sealed for `to`: an item for each other client of U1."""
        place, width = [name for name in self._lists[1] if name != sender].index(to), sealed_bytes(self.plan)
        return body[width * place : width * (place + 1)]


class SumServer(_Phases):
    """The server of the sum of one round.

    Args:
        keys: the agreement of the plan, after `close`. SumError if it cannot be used for this sum.
    """

    plan: SumPlan

    def __init__(self, plan: SumPlan, keys: KeyServer) -> None:
        require_agreement(plan, keys.plan, keys.members)
        self.plan, self._keys = plan, keys
        super().__init__("masked")
        self._checks: dict[str, bytes] = {}
        self._sum: Ring = np.zeros(plan.size + 1, np.uint32)

    @property
    def survivors(self) -> tuple[str, ...]:
        """U3, whose vectors are in the sum; empty before `survivors_lists`."""
        return self._lists[1] if len(self._lists) > 1 else ()

    def survivors_lists(self) -> dict[str, bytes]:
        """Closes `masked` and returns the survivors, by recipient."""
        names = self._close("masked", "confirm" if self.plan.signed else "shares")
        return dict.fromkeys(names, pack_list(self.plan, "survivors", SERVER, names))

    def confirmations(self) -> dict[str, bytes]:
        """Closes `confirm` and returns the signatures, by recipient."""
        signatures = self._close("confirm", "shares")
        return dict.fromkeys(signatures, pack_list(self.plan, "confirmed", SERVER, signatures, signatures.values()))

    def total(self) -> Ring:
        """Returns the sum over `survivors` (size + 1,), for plan.grid.decode. Raises SumError if a share was false."""
        answers = self._close("shares", None)
        helpers, places = list(answers)[: self.plan.threshold], self.plan.keys.places
        for i, name in enumerate(self.plan.names):
            part = slice(SEED_BYTES * i, SEED_BYTES * (i + 1))
            seed = combine({places[helper]: answers[helper][part] for helper in helpers})
            if not (self._subtract_own if name in self.survivors else self._subtract_pairs)(name, seed):
                raise SumError(
                    f"round {self.plan.round + 1}: the shares of {name}'s seed do not fit together. A false one is "
                    f"from {name}, or from one of {', '.join(helpers)}. This round has no sum."
                )
        return self.plan.grid.reduce(self._sum)

    def _size(self, phase: Phase) -> int:
        match phase:
            case "masked":
                return KEY_BYTES + self.plan.grid.packed_bytes(self.plan.size + 1)
            case "confirm":
                return SIGNATURE_BYTES
            case _:
                return SEED_BYTES * len(self.plan.names)

    def _checked(self, phase: Phase, client: str, body: bytes) -> bytes:
        if phase == "masked":  # only the sum of the vectors is kept
            self._checks[client] = body[:KEY_BYTES]
            self._sum += self.plan.grid.unpack(body[KEY_BYTES:], self.plan.size + 1)
            return b""
        if phase == "confirm" and not signed_survivors(
            self.plan, client, body, self.survivors, self._keys.roster_message
        ):
            raise MessageError(f"the message 'confirm' from {client} is not a valid signature of the survivors")
        return body

    def _subtract_own(self, name: str, seed: bytes) -> bool:
        """Subtracts the own mask of a client that stayed. Returns False without a change if the seed is wrong."""
        if self_check(self.plan, seed) != self._checks[name]:
            return False
        self._sum -= self_mask(self.plan, seed)
        return True

    def _subtract_pairs(self, name: str, seed: bytes) -> bool:
        """Removes the masks that a client that left shares with the survivors. Returns False if the seed is wrong."""
        private, place = mask_private(self.plan.keys, name, seed), self.plan.place
        if public_key(private) != self._keys.keys[name].masks[place]:
            return False
        for peer in self.survivors:
            self._sum += pair_mask(self.plan, private, name, peer, self._keys.keys[peer].masks[place])
        return True
