"""The process of a site that talks to the coordinator: a node of Flower that runs nobody's code.

Flower's own supernode takes a bundle of Python code from the coordinator and runs it, in a new process per message.
This one speaks the same protocol, with the same keys, and hands the bytes of each message to the site's resident
trainer instead: the coordinator can send requests to a site and nothing else. It never imports torch.

Flower hands a message out once. Whenever this node cannot know whether it missed one, it activates anew, and the
coordinator asks again what it has asked since (grid_channel.py).
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsb.channels.flower_wire import MAX_ANSWER_BYTES, PIECE_BYTES, pack, unpack
from fedsb.deployment import trainer
from fedsb.deployment.certificates import tls_client
from fedsb.deployment.child import run_child
from fedsb.deployment.join_file import KEPT, JoinFile, read_join_file
from fedsb.deployment.logs import say
from fedsb.protocol.channel import NoResponse
from fedsb.utils.errors import UserError
from fedsb.utils.files import write_atomic

BEAT_SECONDS = 7.0  # Flower takes a node for offline after 20 s without one
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0  # between tries to reach the coordinator
ELSEWHERE_SECONDS = 90.0  # Flower holds a node for present 20 s after its last sign; longer, it is another's
SAY_SECONDS = 60.0  # a trouble that lasts is a line in the log as often
CONNECT_SECONDS, WRITE_SECONDS, ANSWER_SECONDS = 10.0, 20.0, 60.0  # a network that swallows all is tried anew soon

Answer = Callable[[bytes], bytes | NoResponse]


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    token = bytes.fromhex(os.environ[trainer.TOKEN])
    FlowerNode(read_join_file(folder / KEPT), folder).serve(lambda request: trainer.ask(path, token, request))


def pause_after(failures: int) -> float:
    """Seconds before the next try: about twice as long each time, up to a few, and no two sites in step."""
    longest: float = min(SHORTEST_PAUSE_SECONDS * 2 ** min(failures, 10), LONGEST_PAUSE_SECONDS)
    return random.uniform(0.5, 1.0) * longest


class FlowerNode:
    """A site's end of Flower's fleet API."""

    def __init__(self, join: JoinFile, folder: Path) -> None:
        key = load_pem_private_key(join.node_key.encode(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        version, proof = RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())
        self._client = FleetHttpClient(
            f"https://{join.address}",
            interceptors=[version, proof],
            verify=tls_client(join.ca),
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, write=WRITE_SECONDS),  # type: ignore[arg-type]  # httpx takes it
        )
        self._address, self._public = join.address, public_key_to_bytes(key.public_key())
        # Remembered, so that a node that was killed can say that its former self has gone.
        self._memory = folder / "node.json"
        self._node = Node(node_id=json.loads(self._memory.read_text())["node"] if self._memory.exists() else 0)
        self._lock = threading.Lock()

    def serve(self, answer: Answer) -> None:
        """Answers requests until the coordinator refuses this site: raises UserError then."""
        active, failures, asked_at, said_at = False, 0, time.monotonic(), 0.0
        elsewhere: float | None = None  # since when another node with this site's key is there
        threading.Thread(target=self._beat, daemon=True).start()
        while True:
            try:
                if not active:
                    self._activate()
                    active, elsewhere, asked_at = True, None, time.monotonic()
                    print(f"at the coordinator, {self._address}", flush=True)
                asked = self._answer_next(answer)
                failures = 0
                if asked:
                    asked_at = time.monotonic()
                else:
                    time.sleep(min(3.0, max(0.05, (time.monotonic() - asked_at) / 20)))
            except UserError:
                raise
            except Exception as error:  # whatever it is, a message may be lost: activate anew
                _raise_if_final(error, self._address)
                now = time.monotonic()
                elsewhere = (elsewhere or now) if _is_elsewhere(error) else None
                if elsewhere is not None and now - elsewhere > ELSEWHERE_SECONDS:
                    raise UserError(
                        f"a node with this site's keys is at the coordinator at {self._address} already: end it "
                        "there; if it is not yours, the keys have leaked: have the coordinator revoke this site, and "
                        "join with new ones under another name"
                    ) from error
                if active:
                    print(f"lost the coordinator ({type(error).__name__}), trying every few seconds", flush=True)
                elif failures == 0 and elsewhere is None:
                    print(_unreachable(self._address, error), flush=True)
                active, failures = False, failures + 1
                if failures == 1 or now - said_at > SAY_SECONDS:
                    say("trouble", reason=f"{type(error).__name__}: {error}", failures=failures)
                    said_at = now
                time.sleep(pause_after(failures))

    def _activate(self) -> None:
        """Says that this node is here now, and that what it was sent before may be lost."""
        with self._lock:
            if self._node.node_id:
                try:
                    self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
                except httpx.HTTPStatusError as error:  # Flower does not know it any more: it was restarted
                    _raise_if_final(error, self._address)
            request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
            write_atomic(self._memory, json.dumps({"node": self._node.node_id}).encode())
            say("active", address=self._address)

    def _beat(self) -> None:
        """Keeps this node online, also while its trainer works. No error ends it: the next heartbeat may succeed."""
        failing = False
        while True:
            time.sleep(BEAT_SECONDS)
            try:
                self._send_beat()
                failing = False
            except Exception as error:  # a refusal too: the main thread meets it, and ends with it
                say("no heartbeat", reason=f"{type(error).__name__}: {error}")
                if not failing:
                    print(f"no heartbeat reached the coordinator ({type(error).__name__}: {error})", flush=True)
                failing = True

    def _send_beat(self) -> None:
        beat = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        try:
            known = not self._node.node_id or self._client.SendNodeHeartbeat(beat).success
        except httpx.HTTPStatusError:  # a SuperLink that was restarted, if it is not a refusal
            known = False
        if not known:
            self._activate()

    def _answer_next(self, answer: Answer) -> bool:
        """Whether there was a request."""
        node = self._node
        pulled = self._client.PullMessages(PullMessagesRequest(node=node))
        if not pulled.messages_list:
            return False
        message, tree = message_from_proto(pulled.messages_list[0]), pulled.message_object_trees[0]
        reply = self._reply_to(node, message, tree, answer)
        try:
            self._push(node, reply)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.FORBIDDEN:
                raise
            say("not wanted", reason="the run that asked has ended")
        return True

    def _reply_to(self, node: Node, message: Message, tree: ObjectTree, answer: Answer) -> Message:
        ids, run = [part.object_id for part in iterate_object_tree(tree)], message.metadata.run_id
        if len(ids) * PIECE_BYTES > 2 * MAX_ANSWER_BYTES:
            return Message(pack(NoResponse(f"refused: a request of over {MAX_ANSWER_BYTES} bytes")), reply_to=message)
        pull = make_pull_object_fn_protobuf(self._client.PullObject, node, run)
        contents = pull_objects(ids, pull, max_time=600.0, initial_backoff=0.05)
        name = message.metadata.message_id
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=name)
        )
        whole = inflate_object_from_contents(name, contents)
        assert isinstance(whole, Message)
        whole.metadata.__dict__["_message_id"] = name  # as Flower does: a message does not hold its own hash
        request = unpack(whole.content)
        content = answer(request) if isinstance(request, bytes) else request
        if isinstance(content, bytes) and len(content) > MAX_ANSWER_BYTES:
            content = NoResponse(f"failed: an answer of {len(content)} bytes, and {MAX_ANSWER_BYTES} are allowed")
        return Message(pack(content), reply_to=whole)

    def _push(self, node: Node, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        head = message_to_proto(remove_content_from_message(reply))
        with no_object_id_recompute():
            pushed = self._client.PushMessages(
                PushMessagesRequest(node=node, messages_list=[head], message_object_trees=[get_object_tree(reply)])
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(self._client.PushObject, node, reply.metadata.run_id, pushed.session_id),
                object_ids_to_push=set(pushed.objects_to_push),
            )


def _unreachable(address: str, error: Exception) -> str:
    """Returns what a site's terminal says when it does not get to the coordinator."""
    if not isinstance(error, httpx.TransportError):
        return f"not at the coordinator yet ({type(error).__name__}: {error}), trying every few seconds"
    return (
        f"cannot reach the coordinator at {address} ({type(error).__name__}: {error}). Trying again every few seconds. "
        "If this lasts, check that the coordinator is serving, that this address is right (it is in the join file), "
        "and that a firewall on either side lets TCP to this port through"
    )


def _is_elsewhere(error: Exception) -> bool:
    """Whether the coordinator has a node with this key already."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == HTTPStatus.PRECONDITION_FAILED


def _raise_if_final(error: Exception, address: str) -> None:
    """Raises UserError for what trying again does not mend: the door refuses this site, or is not the one it trusts."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == HTTPStatus.UNAUTHORIZED:
        try:
            found = error.response.json()
        except ValueError:
            return
        if found.get("refused"):  # said by the door, not by Flower
            raise UserError(f"the coordinator at {address} refuses this site: {found.get('detail')}") from error
    if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        if "expired" in str(error) or "not yet valid" in str(error):
            raise UserError(
                f"by this machine's clock the certificate of the coordinator at {address} has expired, or is not valid "
                f"yet ({error}): if the clock is right, the coordinator renews it with `fedsb serve FEDERATION --renew`"
            ) from error
        raise UserError(
            f"what answers at {address} is not the coordinator of this join file ({error}): ask the coordinator"
        ) from error


if __name__ == "__main__":
    run_child(main)
