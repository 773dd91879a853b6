"""A federation over a network: a coordinator and its sites on their own machines, over Flower.

    coordinator                                             site
    server ------ program(channel, folder)                  worker --- handle(request) -> answer; keeps the model
      |  Unix socket                                          |  Unix socket
    superlink --- Flower and AuthMiddleware  <-- TLS -->    node ----- fetches requests, sends answers

The coordinator creates the federation with a join file per site (`create_federation`) and serves it; a site joins. All
messages are bytes in Flower's messages. Code is never sent.
"""

from fedsb.deployment.federation import add_site, create_federation, renew, revoke, sign_directory
from fedsb.deployment.join_file import read_join_file, update_directory
from fedsb.deployment.run import join, serve

__all__ = [
    "add_site",
    "create_federation",
    "join",
    "read_join_file",
    "renew",
    "revoke",
    "serve",
    "sign_directory",
    "update_directory",
]
