"""Requests in shards: the units that are answered, sealed and resumed. Pure.

Shards are a function of the list of requests alone. Requests of one condition and one group of items, such as the
questions of one image, stay together. A longer list of items has the shards of a shorter one, but for its last.
"""

from collections.abc import Mapping, Sequence

from vila_ops.eval.benchmark import Request

SHARD = 128
"""Requests from which on a shard ends with its group."""


def shards_of(requests: Sequence[Request], group_of: Mapping[str, str]) -> list[list[Request]]:
    """The requests in shards, by condition, then by group in the order of first appearance.

    `group_of` has the group of each item.
    """
    by_group: dict[str, dict[str, list[Request]]] = {}
    for request in requests:
        by_group.setdefault(request.condition, {}).setdefault(group_of[request.item], []).append(request)
    shards: list[list[Request]] = []
    for groups in by_group.values():
        shard: list[Request] = []
        for group in groups.values():
            shard += group
            if len(shard) >= SHARD:
                shards.append(shard)
                shard = []
        if shard:
            shards.append(shard)
    return shards
