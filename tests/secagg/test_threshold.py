"""The least number of honest clients in a sum, against a malicious server that shows clients any lists.

n clients, the last c of them collude with the server. Each honest client x answers at most one list L(x), which
contains x and at least t clients: with a share of b_v for each v in it, and of s_v for the other members of the sum.
The server also has the colluding clients' shares of both.

The server removes all masks of client v if it has s_v and b_v. Otherwise let Z be the honest clients of which it does
not have s_v. The mask of each pair in Z is unknown, so only the sum over all of Z is free of masks, if it has b_v for
all of Z.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations, product

import numpy as np
import pytest
from sums import Sum, body, make_keys, make_plan

from fedsb.secagg.messages import SERVER, pack_list
from fedsb.secagg.primitives import SEED_BYTES, combine
from fedsb.secagg.threshold import honest_in_sum
from fedsb.utils.rng import keyed_generator

List = frozenset[int]
CASES = [(n, t, c) for n in range(2, 6) for c in (0, 1) for t in range(c + 1, n + 1) if n - c >= 1]
PROTECTED = [(n, t, c) for n, t, c in CASES if 2 * t > n + c]


def lists_of(client: int, members: Iterable[int], threshold: int) -> list[List]:
    """Returns the lists that a client accepts."""
    others = [v for v in members if v != client]
    sizes = range(threshold - 1, len(others) + 1)
    return [frozenset((client, *some)) for size in sizes for some in combinations(others, size)]


def learned(own: np.ndarray, key: np.ndarray, t: int, c: int) -> np.ndarray:  # (cases, honest): shares of each seed
    """Returns the least number of clients in a sum that the server learns in each case; 99 if it learns none."""
    b, s = own + c >= t, key + c >= t
    single = (b & s).any(1)
    unknown = ~s
    whole = unknown.any(1) & (b | s).all(1)
    return np.where(single, 1, np.where(whole, unknown.sum(1), 99))


def brute_force(n: int, t: int, c: int) -> int:
    """Tries all lists for all honest clients, with any of them not asked."""
    honest = n - c
    own = key = np.zeros((1, honest), int)
    for x in range(honest):
        lists = lists_of(x, range(n), t)
        stays = np.array([[v in one for v in range(honest)] for one in lists])
        b, s = np.vstack([stays, np.zeros((1, honest), int)]), np.vstack([~stays, np.zeros((1, honest), int)])
        own = (own[:, None] + b).reshape(-1, honest)
        key = (key[:, None] + s).reshape(-1, honest)
    return int(learned(own, key, t, c).min())


@pytest.mark.parametrize(("n", "t", "c"), CASES)
def test_without_signatures_the_bound_is_the_least_sum_of_all_lists(n: int, t: int, c: int) -> None:
    bound = honest_in_sum(n, t, c, signed=False)
    if (n, t, c) in PROTECTED:
        assert brute_force(n, t, c) == bound >= 1
    else:  # one client, by both of its seeds
        assert bound == 0
        assert brute_force(n, t, c) == 1


def attack(n: int, t: int, c: int, inside: int) -> list[List]:
    """Returns the lists, by honest client, with which the most shares of s_v of the clients outside are given evenly.

    The first `inside` honest clients are W; each client leaves out at most n - t of the others, in rotation.
    """
    outside, honest = list(range(inside, n - c)), n - c
    lists, turn = [], 0
    for x in range(honest):
        if x < inside:
            count = min(n - t, len(outside))
            left = [outside[(turn + i) % len(outside)] for i in range(count)]
            turn += count
        else:
            left = [outside[(x - inside + 1 + i) % len(outside)] for i in range(min(n - t, len(outside) - 1))]
        lists.append(frozenset(range(n)) - set(left))
    return lists


def by_rotation(n: int, t: int, c: int) -> int:
    """Returns the least sum that `attack` gives."""
    for inside in range(1, n - c + 1):
        lists = attack(n, t, c, inside)
        own = np.array([[sum(v in one for one in lists) for v in range(n - c)]])
        assert all(len(one) >= t and x in one for x, one in enumerate(lists))
        if learned(own, n - c - own, t, c)[0] <= inside:
            return inside
    raise AssertionError


def test_the_bound_is_attained_for_many_clients() -> None:
    for n, c, t in product(range(2, 25), range(9), range(1, 25)):
        if c > n // 3 or not n + c < 2 * t <= 2 * n:
            continue
        assert by_rotation(n, t, c) == honest_in_sum(n, t, c, signed=False), (n, t, c)
        assert honest_in_sum(n, t, c, signed=False) <= honest_in_sum(n, t, c, signed=True)
        if t < n:  # fewer clients with keys
            assert honest_in_sum(n, t, c, signed=False) <= honest_in_sum(n - 1, t, c, signed=False)


def test_values_by_hand() -> None:
    assert [honest_in_sum(8, t, 0, signed=False) for t in (4, 5, 6, 7, 8)] == [0, 4, 6, 7, 8]
    assert [honest_in_sum(8, t, 0, signed=True) for t in (4, 5, 6, 7, 8)] == [0, 5, 6, 7, 8]
    assert [honest_in_sum(8, t, 2, signed=True) for t in (5, 6, 7, 8)] == [0, 4, 5, 6]
    assert [honest_in_sum(8, t, 2, signed=False) for t in (5, 6, 7, 8)] == [0, 3, 5, 6]
    assert honest_in_sum(10, 6, 0, signed=False) == 4
    for n in range(3, 30):
        assert honest_in_sum(n, n, 0, signed=False) == n
        assert honest_in_sum(n, n - 1, 0, signed=False) == (n - 1 if 2 * (n - 1) > n else 0)
    assert honest_in_sum(3, 2, 2, signed=True) == honest_in_sum(3, 4, 0, signed=True) == 0


# --- the model itself ---


@pytest.mark.parametrize(("n", "t", "c"), [(4, 3, 0), (5, 3, 0), (6, 4, 1), (7, 5, 1)])
def test_no_combination_of_vectors_but_the_sum_is_free_of_masks(n: int, t: int, c: int) -> None:
    """Solves for all combinations: each unknown b_v and each mask of a pair without either s is a variable."""
    draw, honest, seen = keyed_generator("lists", n, t, c), n - c, set[bool]()
    for case in range(200):
        common = frozenset(draw.choice(n, t, replace=False).tolist())
        own, key = np.zeros((2, honest), int)
        for x in np.flatnonzero(draw.random(honest) < 0.9):  # the server asks most of them
            possible = lists_of(x, range(n), t)
            one = common if case % 2 and x in common else possible[draw.integers(len(possible))]
            stays = np.array([v in one for v in range(honest)])
            own, key = own + stays, key + ~stays
        b, s = own + c >= t, key + c >= t
        pairs = [(u, v) for u, v in combinations(range(honest), 2) if not s[u] and not s[v]]
        masks = np.zeros((honest, honest + len(pairs)))
        masks[~b, np.flatnonzero(~b)] = 1
        for i, (u, v) in enumerate(pairs):
            masks[u, honest + i], masks[v, honest + i] = 1, -1
        size = learned(own[None], key[None], t, c)[0]
        assert honest - np.linalg.matrix_rank(masks) == int(size < 99)
        if size < 99:
            assert not ((~s) @ masks).any() and (~s).sum() == size
        seen.add(bool(size < 99))
    assert seen == {True, False}


# --- different members of one sum ---

Answer = tuple[List, List | None]  # the members of the sum, as a client received them, and the list that it answers


def learned_with_cohorts(answers: Sequence[Answer], c: int, t: int) -> int:
    """Returns the least number of clients in a sum that the server learns from one answer of each honest client.

    Masks of clients with different members differ, so a sum is over clients with the same ones.
    """
    honest = len(answers)
    given = [(members, listed) for members, listed in answers if listed is not None]
    b = [sum(v in listed for _, listed in given) + c >= t for v in range(honest)]
    s = [sum(v in members - listed for members, listed in given) + c >= t for v in range(honest)]
    sizes = [1] if any(one and other for one, other in zip(b, s, strict=True)) else []
    for cohort in {members for members, _ in answers}:
        unknown = [v for v in cohort if v < honest and not s[v]]
        if unknown and all(answers[v][0] == cohort and b[v] for v in unknown):
            sizes.append(len(unknown))
    return min(sizes, default=99)


def confirmed(answers: Sequence[Answer], t: int) -> list[Answer]:
    """Returns the answers of the clients that received t signatures of their list; colluding clients sign any."""
    honest = len(answers)
    signers = {one: sum(v >= honest for v in one[1]) + answers.count(one) for one in answers if one[1] is not None}
    return [one if signers.get(one, 0) >= t else (one[0], None) for one in answers]


def options(client: int, n: int, t: int) -> list[Answer]:
    return [(members, one) for members in lists_of(client, range(n), t) for one in lists_of(client, members, t)]


def signed_cases(n: int, t: int, c: int) -> Iterator[list[Answer]]:
    """Yields all cases of few clients. Of many, yields samples in which most clients received one of two lists."""
    every = [options(x, n, t) for x in range(n - c)]
    if np.prod([len(one) for one in every]) < 10_000:
        yield from (list(case) for case in product(*every))
        return
    draw, pairs = keyed_generator("cohorts", n, t, c), list(dict.fromkeys(chain.from_iterable(every)))
    for _ in range(4000):
        two = [pairs[i] for i in draw.integers(len(pairs), size=2)]
        case = []
        for x, own in enumerate(every):
            first, second = (two[i] for i in draw.permutation(2))
            case.append(next((one for one in (first, second) if x in one[1]), own[draw.integers(len(own))]))
        yield case


@pytest.mark.parametrize(("n", "t", "c"), PROTECTED)
def test_with_signatures_a_sum_has_the_threshold_of_clients_with_any_members_shown(n: int, t: int, c: int) -> None:
    least = min(learned_with_cohorts(confirmed(case, t), c, t) for case in signed_cases(n, t, c))
    assert least == honest_in_sum(n, t, c, signed=True) == t - c


def test_below_half_of_all_clients_two_members_lists_reveal_one_vector() -> None:
    """Six clients, t = 3, and sums of three and four: above half of each, and signed. Plans refuse such a threshold."""
    small, large = frozenset({0, 1, 2}), frozenset({0, 3, 4, 5})
    case: list[Answer] = [(small, small)] * 3 + [(large, frozenset({3, 4, 5}))] * 3
    assert confirmed(case, 3) == case
    assert learned_with_cohorts(case, 0, 3) == 1 and honest_in_sum(6, 3, 0, signed=True) == 0


def test_without_signatures_two_members_lists_would_reveal_one_vector() -> None:
    """Five clients, t = 3, which is above half of all. Clients refuse a sum without one of the clients with keys."""
    all_five = frozenset(range(5))
    lists = [(1, 0, 3), (2, 0, 4), (3, 0, 4), (4, 0, 3)]
    case: list[Answer] = [(frozenset({0, 1, 2}), frozenset({0, 1, 2})), *((all_five, frozenset(one)) for one in lists)]
    assert learned_with_cohorts(case, 0, 3) == 1 < honest_in_sum(5, 3, 0, signed=False) == 2
    assert learned_with_cohorts([(all_five, one) for _, one in case], 0, 3) >= 2


# --- with real messages ---


@pytest.mark.parametrize(("n", "t"), [(10, 6), (7, 5)])
def test_a_malicious_server_learns_the_sum_of_as_few_clients_as_stated(n: int, t: int) -> None:
    world = Sum(make_plan(make_keys(n, t, signed=False))).to("shares")
    plan, keys = world.plan, world.plan.keys
    inside = honest_in_sum(n, t, 0, signed=False)
    lists = {plan.names[x]: {plan.names[v] for v in one} for x, one in enumerate(attack(n, t, 0, inside))}
    answers = {
        name: body(world.answer(name, pack_list(plan, "survivors", SERVER, listed))) for name, listed in lists.items()
    }
    seeds: dict[str, list[bytes]] = {}  # of s and of b, where t shares were given
    for i, name in enumerate(plan.names):
        part = slice(SEED_BYTES * i, SEED_BYTES * (i + 1))
        for stays in (False, True):
            given = [x for x in plan.names if (name in lists[x]) is stays][:t]
            shares = {keys.places[x]: answers[x][part] for x in given}
            seeds.setdefault(name, []).append(combine(shares) if len(given) == t else b"")
    assert all((seeds[name] == [b"", world.seeds[name].self]) for name in plan.names[:inside])
    assert all((seeds[name] == [world.seeds[name].key, b""]) for name in plan.names[inside:])
    total = np.zeros(plan.size + 1, np.uint32)
    for name in plan.names[:inside]:
        total += world.masked(name) - world.own_mask(name) - world.pairs(name, plan.names[inside:])
    assert total.tolist() == [inside * (inside + 1) // 2] * 6
