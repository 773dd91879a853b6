"""The number of honest clients in a sum, from the threshold and the number of colluding clients.

n clients agreed on keys with the threshold t. c of them collude with a malicious server, and n - c are honest.

With signatures of the survivors (protocol.py) every honest client answers for the same list, of at least t clients. The
sum therefore has at least t - c honest ones.

Without them the server may show each client x a different list L(x), of at least t clients that include x. A client
answers once, so it gives a share of one of the two seeds of each client: of b_v if v is in L(x), else of s_v. Let the
server learn the sum over the honest clients W. It then has b_w for every w in W, hence not s_w (both take 2 t > n + c
shares). The mask of the pair (w, v) with an honest v outside W is therefore known from s_v alone, of which at least
t - c honest clients gave a share. Each honest client gives at most n - t shares of such seeds, since its list has t
clients:

    (n - c - |W|) (t - c) <= (n - c) (n - t)       so       |W| >= (n - c) (2 t - n - c) / (t - c)

which is n - c for t = n, and t for t = n - 1 and c = 0 (n > 2). The bound is attained, after rounding up: with V honest
clients outside W and m = n - t, each of V gives min(m, V - 1) shares and each of W min(m, V), in rotation, so that
every s_v has min(m, V - 1) + floor(|W| min(m, V) / V) of them. tests/secagg/test_threshold.py compares the two up to
n = 24 and c = n / 3. If fewer than n clients have keys, the sum has at least as many.
"""

from __future__ import annotations

from math import ceil


def honest_in_sum(clients: int, threshold: int, colluding: int, *, signed: bool) -> int:
    """Returns the least number of honest clients in a sum that a malicious server can learn; 0 for single vectors."""
    n, t, c = clients, threshold, colluding
    if not (0 <= c < t <= n and 2 * t > n + c):
        return 0
    return t - c if signed else ceil((n - c) * (2 * t - n - c) / (t - c))
