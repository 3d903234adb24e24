from __future__ import annotations

import numpy as np

from reid.data.synthetic import Person, synthesise_person


def test_looks_are_in_their_ranges() -> None:
    for seed in range(50):
        person = synthesise_person(np.random.default_rng(seed))
        assert 0.78 <= person.build.width <= 1.3
        assert 0.46 <= person.build.legs <= 0.53
        assert person.bag.side in (-1, 1)
        colours = (person.skin, *person.upper.colours, person.lower.colour, person.bag.colour)
        for colour in colours:
            assert all(0 <= part <= 255 for part in colour)


def test_the_same_generator_gives_the_same_person() -> None:
    persons = [synthesise_person(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert persons[0] == persons[1] != persons[2]
    assert isinstance(persons[0], Person)


def test_the_two_colours_of_the_upper_clothes_differ() -> None:
    for seed in range(200):
        main, second = synthesise_person(np.random.default_rng(seed)).upper.colours
        assert max(abs(a - b) for a, b in zip(main, second, strict=True)) >= 60
