"""The scores of a run: of the global model, and of each client's rows."""

from __future__ import annotations

from dataclasses import replace

from fedsb.methods.base import State
from fedsb.server.server import Server
from fedsb.training.score import Score, mean_of


def score_global(server: Server, state: State) -> Score | None:
    """Returns the metric on the test rows, of the global model or the mean over the clients' own; None without rows."""
    method, data, policy = server.method, server.data, server.policy
    if not data.test or not (data.test_is_public or policy.may_release("scores")):
        return None
    if method.spec.global_model:
        score = server.trainer.evaluate(method.model(state), data.test)
        hides = policy and not data.test_is_public  # how many private rows each class has
        return replace(score, confusion=None) if hides else score
    own = server.opened.local.client_model
    return mean_of({c.name: server.trainer.evaluate(own(method, state, c.name), data.test) for c in server.clients})


def score_clients(server: Server, state: State) -> dict[str, Score]:
    """Returns the metric on each client's held-out rows, of its own or the global model.

    Clients that never take part are included.
    """
    method = server.method
    if not server.channel.spec.holds_rows or not server.policy.may_release("scores"):
        return {}
    own = server.opened.local.client_model
    return {
        c.name: server.trainer.evaluate(own(method, state, c.name), c.held_out)
        for c in server.data.clients
        if c.held_out and (method.spec.global_model or not c.unseen)
    }


def final_scores(server: Server, state: State) -> dict[str, Score]:
    """Ends the run at every client, and returns their scores of the final model."""
    if server.channel.spec.holds_rows:
        return score_clients(server, state)
    spec = server.method.spec
    card = {
        "Method": f"{spec.id} ({spec.paper}), rank {server.method.rank}",
        "Sites": str(len(server.clients)),
        "Rounds": str(state.round),
    }
    return server.finish(state, card)
