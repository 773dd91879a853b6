"""The process of a site that communicates with the coordinator: a Flower node that runs no received code.

Flower's own supernode receives a bundle of Python code from the coordinator and runs it, in a new process per message.
This node uses the same protocol and the same keys, but passes the bytes of each message to the site's worker. So the
coordinator can send requests to a site, and nothing else. This process never imports torch.

Flower delivers a message once. If this node may have missed one, it activates again, and the coordinator then repeats
its open requests (channels/flower.py).
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
from fedsb.deployment import worker
from fedsb.deployment.certificates import tls_client
from fedsb.deployment.child_process import run_child
from fedsb.deployment.join_file import JOIN_FILE, JoinFile, read_join_file
from fedsb.deployment.logs import log_event
from fedsb.protocol.channel import NoResponse
from fedsb.utils.errors import UserError
from fedsb.utils.files import write_atomic

HEARTBEAT_SECONDS = 7.0  # Flower considers a node offline after 20 s without a heartbeat
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0  # between attempts to reach the coordinator
DUPLICATE_SECONDS = 90.0  # Flower keeps a node for 20 s after its last heartbeat; after more, it is a second node
LOG_SECONDS = 60.0  # between log lines about the same problem
CONNECT_SECONDS, WRITE_SECONDS, ANSWER_SECONDS = 10.0, 20.0, 60.0  # timeouts, so that a silent network is noticed soon

Answer = Callable[[bytes], bytes | NoResponse]


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    token = bytes.fromhex(os.environ[worker.TOKEN])
    FlowerNode(read_join_file(folder / JOIN_FILE), folder).serve(lambda request: worker.ask(path, token, request))


def pause_after(failures: int) -> float:
    """Returns the seconds before the next attempt: about doubled each time, limited, and random within half."""
    longest: float = min(SHORTEST_PAUSE_SECONDS * 2 ** min(failures, 10), LONGEST_PAUSE_SECONDS)
    return random.uniform(0.5, 1.0) * longest


class FlowerNode:
    """A site's client of Flower's fleet API."""

    def __init__(self, join: JoinFile, folder: Path) -> None:
        key = load_pem_private_key(join.node_key.encode(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        version, proof = RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())
        self._client = FleetHttpClient(
            f"https://{join.address}",
            interceptors=[version, proof],
            verify=tls_client(join.ca),
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, write=WRITE_SECONDS),  # type: ignore[arg-type]  # httpx accepts it
        )
        self._address, self._public = join.address, public_key_to_bytes(key.public_key())
        # Stored, so that a node that was killed can deactivate its previous registration.
        self._id_file = folder / "node.json"
        self._node = Node(node_id=json.loads(self._id_file.read_text())["node"] if self._id_file.exists() else 0)
        self._lock = threading.Lock()

    def serve(self, answer: Answer) -> None:
        """Answers requests. Raises UserError when the coordinator refuses this site."""
        active, failures, asked_at, logged_at = False, 0, time.monotonic(), 0.0
        duplicate: float | None = None  # since when a second node with this site's key is connected
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        while True:
            try:
                if not active:
                    self._activate()
                    active, duplicate, asked_at = True, None, time.monotonic()
                    print(f"connected to the coordinator at {self._address}", flush=True)
                asked = self._answer_next(answer)
                failures = 0
                if asked:
                    asked_at = time.monotonic()
                else:
                    time.sleep(min(3.0, max(0.05, (time.monotonic() - asked_at) / 20)))
            except UserError:
                raise
            except Exception as error:  # a message may be lost, so activate again
                raise_if_final(error, self._address)
                now = time.monotonic()
                duplicate = (duplicate or now) if _is_duplicate(error) else None
                if duplicate is not None and now - duplicate > DUPLICATE_SECONDS:
                    raise UserError(
                        f"A node with this site's keys is already connected to the coordinator at {self._address}. "
                        "Stop that node. If it is not yours, the keys have leaked: ask the coordinator to revoke this "
                        "site, and join with new keys under a different name."
                    ) from error
                if active:
                    print(f"lost the coordinator ({type(error).__name__}); retrying every few seconds", flush=True)
                elif failures == 0 and duplicate is None:
                    print(_unreachable(self._address, error), flush=True)
                active, failures = False, failures + 1
                if failures == 1 or now - logged_at > LOG_SECONDS:
                    log_event("trouble", reason=f"{type(error).__name__}: {error}", failures=failures)
                    logged_at = now
                time.sleep(pause_after(failures))

    def _activate(self) -> None:
        """Registers this node as online. Earlier messages to it may be lost."""
        with self._lock:
            if self._node.node_id:
                try:
                    self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
                except httpx.HTTPStatusError as error:  # unknown to Flower, which was restarted
                    raise_if_final(error, self._address)
            request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
            write_atomic(self._id_file, json.dumps({"node": self._node.node_id}).encode())
            log_event("active", address=self._address)

    def _send_heartbeats(self) -> None:
        """Keeps this node online, also while its worker computes. Continues after any error."""
        failing = False
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            try:
                self._send_heartbeat()
                failing = False
            except Exception as error:  # also a refusal, which ends the main thread
                log_event("no heartbeat", reason=f"{type(error).__name__}: {error}")
                if not failing:
                    print(f"no heartbeat reached the coordinator ({type(error).__name__}: {error})", flush=True)
                failing = True

    def _send_heartbeat(self) -> None:
        beat = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        try:
            known = not self._node.node_id or self._client.SendNodeHeartbeat(beat).success
        except httpx.HTTPStatusError:  # the SuperLink was restarted, or refuses this site
            known = False
        if not known:
            self._activate()

    def _answer_next(self, answer: Answer) -> bool:
        """Answers the next request, and returns whether there was one."""
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
            log_event("not needed", reason="the run of this request has ended")
        return True

    def _reply_to(self, node: Node, message: Message, tree: ObjectTree, answer: Answer) -> Message:
        ids, run = [part.object_id for part in iterate_object_tree(tree)], message.metadata.run_id
        if len(ids) * PIECE_BYTES > 2 * MAX_ANSWER_BYTES:
            return Message(
                pack(NoResponse(f"refused: the request has more than {MAX_ANSWER_BYTES} bytes")), reply_to=message
            )
        pull = make_pull_object_fn_protobuf(self._client.PullObject, node, run)
        contents = pull_objects(ids, pull, max_time=600.0, initial_backoff=0.05)
        name = message.metadata.message_id
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=name)
        )
        whole = inflate_object_from_contents(name, contents)
        assert isinstance(whole, Message)
        whole.metadata.__dict__["_message_id"] = name  # as Flower does: a message does not contain its own hash
        request = unpack(whole.content)
        content = answer(request) if isinstance(request, bytes) else request
        if isinstance(content, bytes) and len(content) > MAX_ANSWER_BYTES:
            content = NoResponse(f"failed: the answer has {len(content)} bytes; at most {MAX_ANSWER_BYTES} are allowed")
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
    """Returns the line that a site prints when it cannot reach the coordinator."""
    if not isinstance(error, httpx.TransportError):
        return f"not connected to the coordinator yet ({type(error).__name__}: {error}); retrying every few seconds"
    return (
        f"cannot reach the coordinator at {address} ({type(error).__name__}: {error}). Retrying every few seconds. "
        "If this continues, check that the coordinator is serving, that the address in the join file is right, and "
        "that no firewall blocks TCP to this port"
    )


def _is_duplicate(error: Exception) -> bool:
    """Returns whether a node with this key is already connected to the coordinator."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == HTTPStatus.PRECONDITION_FAILED


def raise_if_final(error: Exception, address: str) -> None:
    """Raises UserError if the coordinator refuses this site, or if its certificate is not trusted."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == HTTPStatus.UNAUTHORIZED:
        try:
            found = error.response.json()
        except ValueError:
            return
        if found.get("refused"):  # by AuthMiddleware, not by Flower
            raise UserError(f"The coordinator at {address} refuses this site: {found.get('detail')}.") from error
    if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        if "expired" in str(error) or "not yet valid" in str(error):
            raise UserError(
                f"By this machine's clock, the certificate of the coordinator at {address} has expired or is not valid "
                f"yet ({error}). If the clock is right, ask the coordinator to run `fedsb federation renew`."
            ) from error
        raise UserError(
            f"The server at {address} is not the coordinator of this join file ({error}). Ask the coordinator for a "
            "new join file."
        ) from error


if __name__ == "__main__":
    run_child(main)
