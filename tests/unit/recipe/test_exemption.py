from dsv2_train.recipe.exemption import is_exempt


def test_about_the_asked_share_is_exempt() -> None:
    for share in (0.1, 0.5):
        count = sum(is_exempt(sample, 1234, share) for sample in range(20_000))
        # Five standard deviations of a binomial count.
        assert abs(count - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5


def test_none_and_all() -> None:
    assert not any(is_exempt(sample, 1, 0.0) for sample in range(100))
    assert all(is_exempt(sample, 1, 1.0) for sample in range(100))


def test_another_seed_exempts_others() -> None:
    first, second = ({s for s in range(1000) if is_exempt(s, seed, 0.1)} for seed in (1, 2))
    assert len(first & second) < 40


def test_the_choice_never_changes() -> None:
    """A run that resumes on another machine exempts the same sequences."""
    assert [s for s in range(150) if is_exempt(s, 1234, 0.1)] == [46, 90, 91, 103, 122, 143, 148]
