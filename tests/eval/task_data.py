"""A miniature data folder in the formats of eval/tasks/README.md, and the same documents in lm-eval's own columns."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

Document = dict[str, Any]
Splits = dict[str, list[Document]]

ROWS = 8
"""Of each split: GSM8K's five examples need six."""
WORDS = ["don't", 'the "quoted', "naïve", "1:2", "A.", "None", "NA", "x,y", "ratio", "of", "mc²", "\u2028", "{{ two }}"]


class Texts:
    """Random texts with what trips readers: quotes, commas, line separators, templates, "NA"."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def text(self, fewest: int = 2, most: int = 9) -> str:
        """Words, starting and ending with a plain one: files of instructions do not keep outer blanks."""
        return " ".join(["word", *self.draw.choices(WORDS, k=self.draw.randint(fewest, most)), "end"])

    def choice_question(self, choices: int | None = None) -> tuple[str, list[str], int]:
        """Question, answers, the right one's index."""
        count = choices or self.draw.randint(3, 5)
        return f"{self.text()}\n\n{self.text()}?", [self.text(1, 3) for _ in range(count)], self.draw.randrange(count)


def write_data(folder: Path, subjects: list[str], seed: int = 3) -> dict[str, Splits]:
    """Write the whole folder.

    Args:
        folder: below it, every task gets its files.
        subjects: of MMLU.
        seed: of the texts.

    Returns:
        By lm-eval's task name, the documents of every split as lm-eval's own dataset has them (columns that no prompt
        needs are left out).
    """
    texts = Texts(seed)
    return {
        **{name: instructions(folder / name, texts) for name in ("arc_easy", "arc_challenge", "openbookqa")},
        **glue(folder, texts),
        "gsm8k": gsm8k(folder / "gsm8k", texts),
        "lambada_openai": lambada(folder / "lambada", texts),
        "wikitext": wikitext(folder / "wikitext2", texts),
        **{f"mmlu_{subject}": mmlu(folder / "mmlu", subject, texts) for subject in subjects},
    }


def instructions(folder: Path, texts: Texts) -> Splits:
    """LLM-Adapters' alpaca format."""
    folder.mkdir(parents=True)
    splits: Splits = {}
    for split in ("train", "test"):
        rows = []
        splits[split] = []
        for _ in range(ROWS):
            question, choices, right = texts.choice_question()
            listed = " ".join(f"Answer{number}: {choice}" for number, choice in enumerate(choices, start=1))
            names = "/".join(f"answer{number}" for number in range(1, len(choices) + 1))
            rows.append(
                {
                    "instruction": f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
                    f"Answer format: {names}",
                    "input": "",
                    "output": f"the correct answer is answer{right + 1}",
                    "answer": f"answer{right + 1}",
                }
            )
            name = "question_stem" if folder.name == "openbookqa" else "question"
            labels = list("ABCDE"[: len(choices)])
            listed_choices = {"text": choices, "label": labels}
            splits[split].append({name: question, "choices": listed_choices, "answerKey": labels[right]})
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return splits


def glue(folder: Path, texts: Texts) -> dict[str, Splits]:
    """SST-2, RTE, CoLA and MRPC as tab-separated files."""

    def labelled(*columns: str) -> list[Document]:
        rows = [{column: texts.text() for column in columns} for _ in range(ROWS)]
        return [{**row, "label": number % 2} for number, row in enumerate(rows)]

    one, two = ("sentence",), ("sentence1", "sentence2")
    sst2 = {"train": labelled(*one), "validation": labelled(*one)}
    for file, split, column in (("train.tsv", "train", "sentence"), ("dev.tsv", "validation", "content")):
        write_tsv(folder / "sst2" / file, f"label\t{column}", [(d["label"], d["sentence"]) for d in sst2[split]])
    rte = {"train": labelled(*two), "validation": labelled(*two)}
    for file, split in (("train.tsv", "train"), ("dev.tsv", "validation")):
        words = ["entailment", "not_entailment"]
        rows = [(n, d["sentence1"], d["sentence2"], words[d["label"]]) for n, d in enumerate(rte[split])]
        write_tsv(folder / "rte" / file, "index\tsentence1\tsentence2\tlabel", rows)
    cola = {"train": labelled(*one), "validation": labelled(*one)}
    places = {"in_domain_train": cola["train"], "in_domain_dev": cola["validation"][:5]}
    for file, documents in {**places, "out_of_domain_dev": cola["validation"][5:]}.items():
        rows = [("gj04", d["label"], "" if d["label"] else "*", d["sentence"]) for d in documents]
        write_tsv(folder / "cola" / f"{file}.tsv", None, rows)
    mrpc = {"train": labelled(*two), "validation": labelled(*two)}
    for file, split in (("train", "train"), ("test", "validation")):
        rows = [(d["label"], 2 * n, 2 * n + 1, d["sentence1"], d["sentence2"]) for n, d in enumerate(mrpc[split])]
        header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        write_tsv(folder / "mrpc" / f"msr_paraphrase_{file}.txt", header, rows, newline="\r\n")
    return {"sst2": sst2, "rte": rte, "cola": cola, "mrpc": mrpc}


def write_tsv(path: Path, header: str | None, rows: list[tuple[object, ...]], newline: str = "\n") -> None:
    """Cells as they are between tabs: no quoting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([] if header is None else [header]) + ["\t".join(map(str, row)) for row in rows]
    path.write_bytes((newline.join(lines) + newline).encode())


def gsm8k(folder: Path, texts: Texts) -> Splits:
    """Sums, worked out."""
    folder.mkdir()
    splits: Splits = {}
    for split in ("train", "test"):
        splits[split] = [
            {"question": texts.text(), "answer": f"{texts.text()}\n#### {texts.draw.randrange(9999):,}"}
            for _ in range(ROWS)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in splits[split]))
    return splits


def lambada(folder: Path, texts: Texts) -> Splits:
    """Passages and their last word, in both forms."""
    folder.mkdir()
    documents = [{"text": f"{texts.text()}\n\n{texts.text()} last{number}"} for number in range(ROWS)]
    rows = [dict(zip(("context", "continuation"), d["text"].rsplit(" ", 1), strict=True)) for d in documents[:4]]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *documents[4:]]))
    return {"test": documents}


def wikitext(folder: Path, texts: Texts) -> Splits:
    """Articles with sections, one after the other, as in the files of Merity et al."""
    folder.mkdir()

    def page(number: int) -> str:
        section = f" = = Section {number} = = "
        return f" = Title {number} = \n \n {texts.text()} @-@ {texts.text()} . \n {section} \n \n {texts.text()} \n "

    splits = {split: [{"page": page(number)} for number in range(3)] for split in ("validation", "test")}
    for split, name in (("validation", "wiki.valid.raw"), ("test", "wiki.test.raw")):
        (folder / name).write_text(" \n" + "\n".join(document["page"] for document in splits[split]))
    return splits


def mmlu(folder: Path, subject: str, texts: Texts) -> Splits:
    """A subject's two csv files; every second question is on the same passage as the one before."""
    splits: Splits = {}
    for split in ("dev", "test"):
        documents = []
        for number in range(ROWS):
            question, choices, right = texts.choice_question(4)
            if number % 2:
                question = documents[-1]["question"].rsplit("\n", 1)[0] + f"\n{texts.text()}?"
            documents.append({"question": question, "subject": subject, "choices": choices, "answer": right})
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([d["question"], *d["choices"], "ABCD"[d["answer"]]] for d in documents)
        splits[split] = documents
    return splits
