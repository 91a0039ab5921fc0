"""Run as each of three ranks: what they tell and give each other; rank 0 prints it."""

import json

import mlx.core as mx

from grpo_actors.ranks.group import join
from grpo_actors.transport.links import LinkClosedError

#: Has a zero with a sign, which a sum with another zero would lose.
FLOATS = [1.5, -0.0, 0.1]


def bits(array: mx.array) -> list[int]:
    return array.view(mx.uint16 if array.dtype == mx.bfloat16 else mx.uint32).tolist()


group = join()
if group.rank == 0:
    group.tell({"told": [1, None]})
    heard = None
else:
    heard = group.hear()
answers = group.ask([group.rank, heard])

total = group.total(mx.array([1.0, 10.0]) * (group.rank + 1))
mine = {
    "floats": mx.array(FLOATS),
    "halves": mx.array(FLOATS, mx.bfloat16),
    "counts": mx.array([7, -3, 2**24], mx.int32),
}
from_last = {
    name: group.from_one(array if group.rank == 2 else None, array.shape, array.dtype)
    for name, array in mine.items()
}
# The other ranks hold others, in another order.
given = mine if group.rank == 0 else {name: mx.ones_like(mine[name]) for name in reversed(mine)}
from_first = group.from_first(given)
everybody = group.ask(
    [
        [str(array.dtype), bits(array)]
        for found in (from_last, from_first)
        for _, array in sorted(found.items())
    ]
)
expected = [[str(array.dtype), bits(array)] for _, array in sorted(mine.items())] * 2
if group.rank == 0:
    print(
        json.dumps(
            {"case": "messages", "rank": group.rank, "size": group.size, "answers": answers},
        )
    )
    print(json.dumps({"case": "arrays", "total": total.tolist(), "same": [a == expected for a in everybody]}))
else:
    assert answers == []
    try:
        raise AssertionError(group.receive())
    except LinkClosedError:
        pass  # rank 0 has nothing more to say
group.close()
