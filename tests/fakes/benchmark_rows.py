"""Rows of benchmarks, as files hold them and as the hub does."""

import gzip
import json

TEXTS = ["What is ice?", "Who swims best?", "Which is of the sea", "Where is the sun at noon?", "Why do cats sleep?"]
CHOICES = [["frozen water", "a metal", "the answer", "wood"], ["a fish", "a model of it", "an anvil", "the user"]] * 3
# {task: (rows as llm-foundry renders them, the same rows in the fields that the harness gets from the hub)}
ARC = (
    [{"query": f"Question: {q}", "choices": c, "gold": i % 4} for i, (q, c) in enumerate(zip(TEXTS, CHOICES))],
    [
        {"question": q, "choices": {"text": c, "label": ["A", "B", "C", "D"]}, "answerKey": "ABCDABCD"[i]}
        for i, (q, c) in enumerate(zip(TEXTS, CHOICES))
    ],
)
PIQA = (
    [{"query": f"Question: {q}\n", "choices": c[:2], "gold": i % 2} for i, (q, c) in enumerate(zip(TEXTS, CHOICES))],
    [{"goal": q, "sol1": c[0], "sol2": c[1], "label": i % 2} for i, (q, c) in enumerate(zip(TEXTS, CHOICES))],
)
BOOLQ = (
    [
        {"query": f"Passage: {q} It is.\nQuestion: is it so?", "choices": ["no", "yes"], "gold": i % 2}
        for i, q in enumerate(TEXTS)
    ],
    [{"passage": f"{q} It is.", "question": "is it so", "label": i % 2, "idx": i} for i, q in enumerate(TEXTS)],
)
WINOGRANDE = (
    [
        {"context_options": ["Mary saw Maria so Mary", "Mary saw Maria so Maria"], "continuation": "hid.", "gold": 1},
        {
            "context_options": ["The cup fell as the cup", "The cup fell as the shelf"],
            "continuation": "'s leg broke.",
            "gold": 0,
        },
    ],
    [
        {"sentence": "Mary saw Maria so _ hid.", "option1": "Mary", "option2": "Maria", "answer": "2"},
        {"sentence": "The cup fell as the _'s leg broke.", "option1": "cup", "option2": "shelf", "answer": "1"},
    ],
)
LAMBADA = (
    [
        {"context": "He gave her the ring,\nand she took the", "continuation": "ring"},
        {"context": "So is it", "continuation": "of"},
    ],
    [{"text": "He gave her the ring,\nand she took the ring"}, {"text": "So is it of"}],
)
SHIP = " = A ship = \n \n The ship sank in 1 @,@ 900 . \n = = Crew = = \n \n It had none . \n \n"
POET = " = Du Fu = \n \n A poet . \n"
TABLE = {
    "arc_easy": ("arc_easy.jsonl", *ARC),
    "piqa": ("piqa.jsonl.gz", *PIQA),
    "boolq": ("boolq.jsonl", *BOOLQ),
    "winogrande": ("winogrande.jsonl", *WINOGRANDE),
    "lambada_openai": ("lambada_openai.jsonl", *LAMBADA),
}


def written(folder, name, rows):
    """`folder`, in which a file of that name holds the rows, or the text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder
