# SPDX-License-Identifier: Apache-2.0
"""The recall tasks contain every answer that they ask for, and nothing else."""

import pytest
import torch

from scripts.evaluation.recall import IGNORE, mqar, needle


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "pairs", "queries"), [(64, 8, None), (32, 8, 8), (50, 5, 2)])
def test_every_question_of_mqar_has_its_answer_in_front(length, pairs, queries):
    vocab = 40
    inputs, labels = mqar(6, length, pairs, vocab, generator(), queries=queries)
    assert inputs.shape == labels.shape == (6, length)
    assert 0 <= int(inputs.min()) and int(inputs.max()) < vocab
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        memory = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(memory) == pairs and all(0 < key < vocab // 2 <= value for key, value in memory.items())
        asked = [place for place, answer in enumerate(answers) if answer != IGNORE]
        assert len(asked) == (queries or pairs) and len({row[place] for place in asked}) == len(asked)
        for place in asked:
            assert place >= 2 * pairs and memory[row[place]] == answers[place] == row[place + 1]
        filled = {*asked, *(place + 1 for place in asked)}
        assert all(row[place] == 0 for place in range(2 * pairs, length) if place not in filled)


def test_the_needle_lies_where_it_should_and_is_asked_for_at_the_end():
    for depth, place in ((0, 0), (0.5, 48), (1, 97), (None, None)):
        inputs, labels = needle(5, 100, 30, generator(), depth=depth)
        for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
            found = [index for index, token in enumerate(row) if token == 1]
            assert len(found) == 2 and found[1] == 99 and (place is None or found[0] == place)
            assert answers[:-1] == [IGNORE] * 99 and answers[-1] == row[found[0] + 1] > 1
    places = {row.index(1) for row in needle(64, 100, 30, generator())[0].tolist()}
    assert min(places) < 20 and max(places) > 80


def test_seeds_draw_the_same_rows_again():
    for make in (lambda seed: mqar(2, 32, 4, 40, generator(seed)), lambda seed: needle(2, 32, 40, generator(seed))):
        assert torch.equal(make(3)[0], make(3)[0]) and not torch.equal(make(3)[0], make(4)[0])


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="`length` must be at least 24"):
        mqar(1, 22, 6, 40, generator())
    with pytest.raises(ValueError, match="at most 19 keys"):
        mqar(1, 200, 20, 40, generator())
    with pytest.raises(ValueError, match="queries"):
        mqar(1, 200, 4, 40, generator(), queries=5)
    with pytest.raises(ValueError, match="depth"):
        needle(1, 10, 40, generator(), depth=1.5)
