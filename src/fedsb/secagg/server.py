"""The server of secure aggregation; protocol.py describes the protocol."""

from __future__ import annotations

import numpy as np

from fedsb.secagg.fixed_point import Ring
from fedsb.secagg.keys import (
    ADVERT_BYTES,
    SEALED_BYTES,
    Keys,
    mask_private,
    pair_mask,
    public_key,
    read_advert,
    self_check,
    self_mask,
    signed_survivors,
)
from fedsb.secagg.messages import SERVER, MessageError, Phase, SumError, SumPlan, pack_list, read
from fedsb.secagg.primitives import KEY_BYTES, SEED_BYTES, SIGNATURE_BYTES, combine


class SumServer:
    """The server of one round: `receive` the clients' messages, then close the phase to get the next messages.

    Closing a phase raises SumError if fewer than t messages have arrived. The phase then stays open, so that the caller
    may continue to wait.
    """

    def __init__(self, plan: SumPlan) -> None:
        self.plan = plan
        self._phase: Phase | None = "advert"
        self._got: dict[str, bytes] = {}  # bodies of this phase, by client
        self._lists: list[tuple[str, ...]] = [plan.names]  # then U1, U2, ...; the last may send in this phase
        self._roster = b""  # distinguishes this attempt from earlier ones
        self._keys: dict[str, Keys] = {}
        self._checks: dict[str, bytes] = {}
        self._sum: Ring = np.zeros(plan.size + 1, np.uint32)

    @property
    def silent(self) -> tuple[str, ...]:
        """The clients whose message of this phase is missing."""
        return tuple(name for name in self._lists[-1] if name not in self._got)

    @property
    def survivors(self) -> tuple[str, ...]:
        """U3, whose vectors are in the sum; empty before `survivors_lists`."""
        return self._lists[3] if len(self._lists) > 3 else ()

    def receive(self, client: str, data: bytes) -> None:
        """Takes a message from `client`, as the transport authenticated it. Raises MessageError with what is wrong."""
        if self._phase is None:
            raise MessageError(f"a message from {client!r:.60}, but the sum is over")
        if client not in self._lists[-1]:
            why = "has left this round" if client in self.plan.sites else "is not one of its clients"
            raise MessageError(f"a message from {client!r:.60}, which {why}")
        body = read(self.plan, data, self._phase, client, self._size())
        if client in self._got:
            raise MessageError(f"a second message {self._phase!r} from {client}")
        if self._phase == "advert":
            self._keys[client] = self._new_keys(client, body)
        elif self._phase == "masked":
            self._sum += np.frombuffer(body, "<u4")
            body = b""  # only the sum of the vectors is kept
        elif self._phase == "confirm" and not signed_survivors(self.plan, client, body, self.survivors, self._roster):
            raise MessageError(f"the message 'confirm' from {client} is not a valid signature of the survivors")
        self._got[client] = body

    def roster(self) -> dict[str, bytes]:
        """Closes `advert` and returns all keys, by recipient."""
        adverts = self._close("advert", "sealed")
        self._roster = pack_list(self.plan, "roster", SERVER, adverts, adverts.values())
        return dict.fromkeys(adverts, self._roster)

    def inboxes(self) -> dict[str, bytes]:
        """Closes `sealed` and returns what was sealed for each client."""
        sealed = self._close("sealed", "masked")
        self._checks = {name: body[:KEY_BYTES] for name, body in sealed.items()}
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

    def survivors_lists(self) -> dict[str, bytes]:
        """Closes `masked` and returns the survivors, by recipient."""
        names = self._close("masked", "confirm")
        return dict.fromkeys(names, pack_list(self.plan, "survivors", SERVER, names))

    def confirmations(self) -> dict[str, bytes]:
        """Closes `confirm` and returns the signatures, by recipient."""
        signatures = self._close("confirm", "shares")
        return dict.fromkeys(signatures, pack_list(self.plan, "confirmed", SERVER, signatures, signatures.values()))

    def total(self) -> Ring:
        """Returns the sum over `survivors` (size + 1,), for plan.grid.decode. Raises SumError if a share was false."""
        answers = self._close("shares", None)
        helpers = list(answers)[: self.plan.threshold]
        for i, name in enumerate(self._lists[2]):
            part = slice(SEED_BYTES * i, SEED_BYTES * (i + 1))
            seed = combine({self.plan.places[helper]: answers[helper][part] for helper in helpers})
            if not (self._subtract_own if name in self.survivors else self._subtract_pairs)(name, seed):
                raise SumError(
                    f"round {self.plan.round + 1}: the shares of {name}'s seed do not fit together. A false one is "
                    f"from {name}, or from one of {', '.join(helpers)}. This round has no sum."
                )
        return self._sum

    def _subtract_own(self, name: str, seed: bytes) -> bool:
        """Subtracts the own mask of a client that stayed. Returns False without a change if the seed is wrong."""
        if self_check(self.plan, seed) != self._checks[name]:
            return False
        self._sum -= self_mask(self.plan, seed)
        return True

    def _subtract_pairs(self, name: str, seed: bytes) -> bool:
        """Removes the masks that a client that left shares with the survivors. Returns False if the seed is wrong."""
        private = mask_private(self.plan, name, seed)
        if public_key(private) != self._keys[name].mask:
            return False
        for peer in self.survivors:
            self._sum += pair_mask(self.plan, private, name, peer, self._keys[peer].mask)
        return True

    def _new_keys(self, client: str, advert: bytes) -> Keys:
        keys = read_advert(self.plan, client, advert)
        known = [key for pair in (keys, *self._keys.values()) for key in pair]
        if len(set(known)) < len(known):
            raise MessageError(f"the message 'advert' from {client} has a key twice, or that of a different client")
        return keys

    def _size(self) -> int:
        """Returns the bytes of a body in this phase."""
        match self._phase:
            case "advert":
                return ADVERT_BYTES
            case "sealed":
                return KEY_BYTES + SEALED_BYTES * (len(self._lists[1]) - 1)
            case "masked":
                return 4 * (self.plan.size + 1)
            case "confirm":
                return SIGNATURE_BYTES
            case _:
                return SEED_BYTES * len(self._lists[2])

    def _item(self, body: bytes, sender: str, to: str) -> bytes:
        """Returns what `sender` sealed for `to`: after the check, an item for each other client of U1."""
        place = [name for name in self._lists[1] if name != sender].index(to)
        return body[KEY_BYTES + SEALED_BYTES * place : KEY_BYTES + SEALED_BYTES * (place + 1)]

    def _close(self, phase: Phase, following: Phase | None) -> dict[str, bytes]:
        """Closes a phase and returns its bodies by name, sorted."""
        if self._phase != phase:
            now = f"it is in {self._phase!r}" if self._phase else "it is over"
            raise SumError(f"round {self.plan.round + 1}: the sum cannot close {phase!r}, {now}")
        if len(self._got) < self.plan.threshold:
            raise SumError(
                f"round {self.plan.round + 1}: {len(self._got)} of {len(self.plan.names)} clients sent {phase!r}; the "
                f"threshold is {self.plan.threshold}. Missing: {', '.join(self.silent)}. There is no sum without them."
            )
        got, self._got, self._phase = dict(sorted(self._got.items())), {}, following
        self._lists.append(tuple(got))
        return got
