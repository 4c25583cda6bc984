"""Critical path, as computed by the bench of chunk parallel."""

from bench.bench_distributed import Event, critical_path


def events(*parts):
    return [Event(kind, key, seconds, 0) for kind, key, seconds in parts]


def test_an_exchange_of_all_waits_for_the_last_rank():
    fast, slow = (events(("all", "a", seconds), ("end", "end", 1.0)) for seconds in (1.0, 5.0))
    assert critical_path([fast, slow]) == (6.0, 1)


def test_computation_during_an_exchange_costs_nothing():
    overlapping = events(("start", "a", 1.0), ("wait", "a", 3.0), ("end", "end", 1.0))
    late = events(("start", "a", 2.0), ("wait", "a", 0.0), ("end", "end", 1.0))
    assert critical_path([overlapping, late]) == (5.0, 1)
    assert critical_path([late, overlapping]) == (5.0, 1)


def line():
    """Three ranks that pass on a state in each of two blocks: one second of work before and one after."""
    ranks = []
    for rank in range(3):
        parts = []
        for block in "ab":
            parts.append(("block", f"block {block}", 0.0))
            if rank > 0:
                parts.append(("recv", f"{rank - 1} to {rank} {block}", 0.0))
            parts += [("send", f"{rank} to {rank + 1} {block}", 1.0)] if rank < 2 else []
            parts.append(("pass", "", 1.0 if rank < 2 else 2.0))
        ranks.append(events(*parts, ("end", "end", 0.0)))
    return ranks


def test_a_line_of_ranks_runs_ahead():
    assert critical_path(line()) == (6.0, 2)  # the last rank waits for the first block of two others


def test_a_line_of_ranks_in_step_waits_in_every_block():
    assert critical_path(line(), in_step=True) == (8.0, 4)
