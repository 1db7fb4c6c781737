# SPDX-License-Identifier: Apache-2.0
"""Passages: nothing is lost, lengths are what was drawn, short and long ones alike."""

import json
import random

import pytest

from helpers import BOOK, TEXT, run_here
from scripts.cut_passages import cut_passages, passages


def test_nothing_is_lost_and_no_paragraph_is_cut():
    text = TEXT
    found = list(cut_passages(text, random.Random(0), shortest=8, longest=2048))
    assert "\n\n".join(found) == text.rstrip("\n") or "\n\n".join(found).strip() == text.strip()
    lengths = sorted(len(passage.split()) for passage in found[:-1])
    assert lengths[0] >= 8 and lengths[-1] < 2048 + 500
    # Half of a log-uniform draw lies below its geometric middle; paragraphs add some.
    assert 64 <= lengths[len(lengths) // 2] <= 256


def test_a_draw_of_one_length_cuts_as_soon_as_it_is_reached():
    text = "\n\n".join(["one two three"] * 7)
    found = list(cut_passages(text, random.Random(0), shortest=5, longest=5))
    assert [len(passage.split()) for passage in found] == [6, 6, 6, 3]
    assert list(cut_passages("\n\n \n\n", random.Random(0), shortest=5, longest=5)) == []


def test_rows_are_sampled_by_seed():
    rows = [{"text": TEXT}, {"text": None}]
    first, second, third = (list(passages(rows, seed=seed)) for seed in (0, 0, 1))
    assert first == second != third


@pytest.mark.parametrize("shortest, longest", [(0, 5), (6, 5)])
def test_bounds_that_are_none_are_refused(shortest, longest):
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        list(cut_passages("a", random.Random(0), shortest=shortest, longest=longest))


def test_the_script_shuffles_what_it_writes(own_cache, tmp_path, capsys):
    output = tmp_path / "new" / "passages.jsonl"
    run_here("scripts/cut_passages.py", "--files", BOOK, "--output", output)
    rows = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
    ordered = [row["text"] for row in passages([{"text": TEXT}])]
    assert rows != ordered and sorted(rows) == sorted(ordered)
    assert f"{len(rows)} passages" in capsys.readouterr().out
