"""Secure aggregation: the server learns the sum of the clients' vectors, and of a single one only what the sum shows.

    y_u = q_u + M(b_u) + sum_{v > u} M(k_uv) - sum_{v < u} M(k_uv)     mod 2^bits,   v in U2
    sum_{u in U3} q_u = sum_{u in U3} (y_u - M(b_u)) - the left-over masks k_uv of u in U3 with v in U2 \\ U3

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", ACM CCS 2017 (eprint 2017/281): the variant with signatures of their Figure 4. q_u
is client u's vector in a ring of at most 32 bits (fixed_point.py), M a keystream, k_uv the X25519 secret of a pair, b_u
a secret of u alone. t is a threshold. This implementation has not been audited independently.

Keys are agreed on for many rounds at once; each round has an s_u and a b_u of its own:

    client                                                            server
    advertise    advert: public keys c_u and all s_u, signed    ->    U1 = the senders
    share_keys                                      roster      <-    all keys of U1
                 sealed: for each v in U1, encrypted from u     ->    U2 = the senders
                 to v, shares of the seeds of all s_u and b_u
    receive                                         inbox       <-    U2, and what its members sealed for this client
                 held                                           ->

Then each round, among the clients of U2 that take part in it:

    masked       masked: y_u                                    ->    U3 = the senders
    confirm                                         survivors   <-    U3
                 confirm: a signature of U3                     ->    U4 = the senders
    unmask                                          confirmed   <-    the signatures of U4
                 shares: of b_v for v in U3,                    ->    t answers give the sum
                 of the seed of s_v for the others

Without signatures (`KeyPlan.signed`) `unmask` answers the list of survivors itself. A round is one exchange shorter,
and a malicious server can show each client a different list. threshold.py has the number of clients that are in a sum
then. All of U1 must be in U2 and in every sum: a client cannot open what was sealed for a different U1, so that all
agree on the members of a sum.

Clients may vanish before any message as long as t remain. What is shared is a 16-byte seed. The server derives the key
again and compares it with what its owner sent, so that a false share ends the round instead of corrupting its sum.

A client sends 32 E + 96 bytes of keys for the E rounds of an agreement and 32 E + 28 sealed bytes for each other client
of U1; then, per round with n clients, ceil(bits (size + 1) / 8) + 32 bytes, 16 n of shares, and 64 of a signature. Each
message has a header of about 200 bytes. The server generates at most n + n^2 / 4 masks per round.

Why t > n/2, where n counts all clients of the agreement: anyone with both seeds of a client can read its vector of that
round. A client gives out one of the two, once, so obtaining both takes 2 t clients that answer. All clients with shares
count, because a malicious server can name a client as a member of two sums of one round, and as a survivor of only one.
If c sites collude with the server, the plan needs 2 t > n + c; the sum is then over at least t - c others.

Why signatures: without those of the keys, a malicious server can put its own keys in place of the sites'; without those
of U3, it can send each client a different list of survivors. A signature of U3 contains a hash of the roster, in which
the signer's own keys are fresh. Otherwise a server that repeats the plan of an agreement could use signatures of
different lists from the sums of an earlier one.

Limits
- The directory of site keys must be true: anyone who distributes it can impersonate any site. If that is the server,
  only a server that follows the protocol learns nothing but the sum.
- A sum of two clients is not secret between these two. Two sums over the same, or nearly the same, vectors with
  different survivors reveal their difference, so a vector is sent in one sum only. Only noise protects against what
  many rounds reveal together.
- Nobody can inspect a single update. A client must check its own (finite, shapes, norm) and the server the sum. A
  malicious site can poison the sum or, by what it seals or answers, end the round without one.
- Which clients took part in which phase is not secret.
- A client keeps the seeds and shares of an agreement in memory, and forgets those of a round when it uses them. Keys of
  a round are used once: a sum that fails is repeated with a new agreement. Callers ensure that a client which answered
  a list of survivors for a vector never answers a different list for the same vector.
- Without signatures, a client that leaves between advert and held ends the agreement. The others begin one without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.secagg.client import ClientKeys, SumClient
from fedsb.secagg.fixed_point import Doubles, Ring
from fedsb.secagg.messages import KeyPlan, MessageError, Phase, SumError, SumPlan
from fedsb.secagg.server import KeyServer, SumServer

__all__ = [
    "ClientKeys",
    "KeyPlan",
    "KeyServer",
    "MessageError",
    "Phase",
    "Simulated",
    "SumClient",
    "SumError",
    "SumPlan",
    "SumServer",
    "simulate",
]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A sum as the server learns it; each value is within plan.grid.bound(len(clients)) of the plain sum."""

    values: Doubles  # (size,): sum_k p_k clip(x_k)
    weight: float  # sum_k p_k
    clients: tuple[str, ...]  # U3
    up_bytes: Mapping[str, int]  # that each client sent, with its keys; down_bytes: that it received
    down_bytes: Mapping[str, int]


def simulate(
    plan: SumPlan,
    identities: Mapping[str, Ed25519PrivateKey],  # of all clients in the plan of the keys
    vectors: Mapping[str, Ring],  # (size + 1,) from plan.grid.encode; a client without one drops out before it is due
    vanish: Mapping[str, Phase] | None = None,  # name -> the first message that a client does not send
) -> Simulated:
    """Runs all parties in one process, without a network.

    Raises SumError below the threshold, or if a client of the sum vanishes before it has its keys.
    """
    leaves = dict[str, Phase]({name: "masked" for name in plan.names if name not in vectors}) | dict(vanish or {})
    names, gone = plan.keys.names, set[str]()
    up, down = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def ask(
        server: KeyServer | SumServer, phase: Phase, mail: Mapping[str, bytes], answer: Callable[[str, bytes], bytes]
    ) -> None:
        for name, message in mail.items():
            if leaves.get(name) == phase:
                gone.add(name)
            if name not in gone:
                reply = answer(name, message)
                server.receive(name, reply)
                up[name], down[name] = up[name] + len(reply), down[name] + len(message)

    keys, own = KeyServer(plan.keys), {name: ClientKeys(plan.keys, name, identities[name]) for name in names}
    ask(keys, "advert", dict.fromkeys(names, b""), lambda name, _: own[name].advertise())
    ask(keys, "sealed", keys.roster(), lambda name, roster: own[name].share_keys(roster))
    ask(keys, "held", keys.inboxes(), lambda name, inbox: own[name].receive(inbox))
    keys.close()
    server, clients = SumServer(plan, keys), dict[str, SumClient]()

    def masked(name: str, _: bytes) -> bytes:
        clients[name] = SumClient(plan, own[name])
        return clients[name].masked(vectors[name])

    ask(server, "masked", dict.fromkeys(plan.names, b""), masked)
    mail = server.survivors_lists()
    if plan.signed:
        ask(server, "confirm", mail, lambda name, survivors: clients[name].confirm(survivors))
        mail = server.confirmations()
    ask(server, "shares", mail, lambda name, message: clients[name].unmask(message))
    values, weight = plan.grid.decode(server.total())
    return Simulated(values=values, weight=weight, clients=server.survivors, up_bytes=up, down_bytes=down)
