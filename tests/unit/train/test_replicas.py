"""Who is named when parameters differ."""

from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.train.guards.replicas import Difference, describe, differences


def held(*values: int) -> list[dict[tuple[str, int], int]]:
    """One parameter on every rank."""
    return [{("a", 0): value} for value in values]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_suspects_are_those_outside_the_majority(values: list[int]) -> None:
    found = differences(held(*values))
    if len(set(values)) == 1:
        assert found == []
        return
    counts = sorted((values.count(value) for value in set(values)), reverse=True)
    [one] = found
    assert one.ranks == tuple(range(len(values)))
    if counts[0] == counts[1]:
        assert one.suspects == one.ranks
    else:
        most = max(set(values), key=values.count)
        assert one.suspects == tuple(r for r, value in enumerate(values) if value != most)


def test_only_the_same_part_of_the_same_tensor_is_compared() -> None:
    of_ranks = [{("a", 0): 1, ("b", 0): 5}, {("a", 8): 2, ("b", 0): 5}, {("a", 0): 1}]
    assert differences(of_ranks) == []
    of_ranks[2] = {("a", 0): 3}
    assert differences(of_ranks) == [Difference("a", (0, 2), (0, 2))]


def test_what_is_told() -> None:
    several = [Difference(name, (0, 1, 2), (1,)) for name in "abcde"]
    told = describe(several)
    assert told.startswith("parameters on rank 1 differ from those of its replicas: a, b, c and 2")
    assert describe(differences(held(1, 2))).startswith("parameters on ranks 0, 1 differ between r")
