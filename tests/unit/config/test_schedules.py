from dsv2_train.config.schedules import SCHEDULES, TRAITS, placement_shape


def test_every_schedule_has_traits() -> None:
    assert tuple(TRAITS) == SCHEDULES


def test_chunks_of_a_stage() -> None:
    runs = {name: [count for count in range(5) if TRAITS[name].runs(count)] for name in SCHEDULES}
    assert runs == {
        "1f1b": [1],
        "interleaved": [2, 3, 4],
        "zb_h1": [1],
        "zb_v": [2],
        "interleaved_zb": [2, 3, 4],
        "search": [1, 2, 3, 4],
    }


def test_a_search_of_two_chunks_is_a_v() -> None:
    shapes = [placement_shape("search", chunks) for chunks in (1, 2, 3)]
    assert shapes == ["loop", "v", "loop"]
    assert placement_shape("zb_v", 2) == "v"
    assert placement_shape("interleaved_zb", 2) == "loop"
