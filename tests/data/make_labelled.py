# SPDX-License-Identifier: Apache-2.0
"""\
python tests/data/make_labelled.py

Make the small labelled sets beside this file from `wizard_of_oz.txt`, by rule: which character a sentence names (classes),
where characters and places are named (tags), and questions whose answer is such a name (SQuAD's format).
"""  # noqa: E501

import json
import random
import re
from pathlib import Path


FOLDER = Path(__file__).parent
PEOPLE = ["Dorothy", "Toto", "Scarecrow", "Tin Woodman", "Lion", "Aunt Em", "Uncle Henry", "Glinda", "Wicked Witch"]
PLACES = ["Kansas", "Emerald City", "Land of Oz", "Omaha", "yellow brick road", "Throne Room"]
KINDS = {**dict.fromkeys(PEOPLE, "PER"), **dict.fromkeys(PLACES, "LOC")}
NAME = re.compile(r"\b(" + "|".join(KINDS) + r")\b")
CLASSES = ["Dorothy", "Scarecrow", "Tin Woodman", "Lion"]
QUESTIONS = {"PER": "Which character is named?", "LOC": "Which place is named?"}


def main():
    text = " ".join((FOLDER / "wizard_of_oz.txt").read_text(encoding="utf-8").split())
    sentences = [s for s in re.split(r'(?<=[.!?"])\s+(?=["A-Z])', text) if 4 <= len(s.split()) <= 40]
    random.Random(0).shuffle(sentences)
    found = [(sentence, [(m[0], m.start(), m.end()) for m in NAME.finditer(sentence)]) for sentence in sentences]

    rows = {name: [] for name in CLASSES}
    for sentence, names in found:
        kinds = {name for name, _, _ in names} & set(CLASSES)
        if len(kinds) == 1 and len(sentence.split()) <= 20:
            rows[kinds.pop()].append(sentence)
    mixed = [(sentence, name) for name in CLASSES for sentence in rows[name][:150]]
    random.Random(1).shuffle(mixed)
    for split, part in (("train", mixed[:-50]), ("validation", mixed[-50:])):
        lines = [json.dumps({"text": sentence, "label": name}) for sentence, name in part]
        (FOLDER / f"characters_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    tagged = [pair for pair in found if pair[1]][:280]
    for split, part in (("train", tagged[:220]), ("validation", tagged[220:])):
        lines = []
        for sentence, names in part:
            for word in re.finditer(r"\w+|[^\w\s]", sentence):
                tag = "O"
                for name, begin, end in names:
                    if begin <= word.start() < end:
                        tag = ("B-" if word.start() == begin else "I-") + KINDS[name]
                lines.append(f"{word[0]}\t{tag}")
            lines.append("")
        (FOLDER / f"names_{split}.conll").write_text("\n".join(lines), encoding="utf-8")

    paragraphs = []
    for number, (sentence, names) in enumerate(found):
        questions = []
        for kind, question in QUESTIONS.items():
            of_kind = [(name, begin) for name, begin, _ in names if KINDS[name] == kind]
            if len(of_kind) == 1:
                answer = {"text": of_kind[0][0], "answer_start": of_kind[0][1]}
                questions.append({"id": f"{number}-{kind}", "question": question, "answers": [answer]})
        if questions:
            paragraphs.append({"context": sentence, "qas": questions})
    paragraphs.sort(key=lambda paragraph: -len(paragraph["qas"]) - (paragraph["qas"][0]["id"][-1] == "C"))
    chosen = paragraphs[:240]
    random.Random(3).shuffle(chosen)
    for split, part in (("train", chosen[:190]), ("validation", chosen[190:])):
        content = {"version": "1.1", "data": [{"title": "The Wonderful Wizard of Oz", "paragraphs": part}]}
        (FOLDER / f"questions_{split}.json").write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
