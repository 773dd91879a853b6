"""A real federation: a coordinator and its sites, on machines of their own, over Flower. Nothing of machine learning.

    coordinator                                        site
    server ------ run(channel, folder)                 trainer --- handle(request) -> answer, keeps the model
      |  Unix socket                                     |  Unix socket
    superlink --- Flower, behind a door  <-- TLS -->   node ------ asks for requests, brings answers

A coordinator makes the federation and a join file per site (`serve_init`), and serves; a site joins. What travels is
bytes in Flower's messages; code never does.
"""

from fedsb.deployment.federation import add_site, renew, revoke, serve_init, sign_directory
from fedsb.deployment.join_file import read_join_file, update_directory
from fedsb.deployment.run import join, serve

__all__ = [
    "add_site",
    "join",
    "read_join_file",
    "renew",
    "revoke",
    "serve",
    "serve_init",
    "sign_directory",
    "update_directory",
]
