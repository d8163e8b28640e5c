"""MMLU, 57 subjects of general knowledge in four categories (https://arxiv.org/abs/2009.03300).

Answer the following multiple choice question.
Question: Which planet is the largest?

Options:
A. Mars
B. Jupiter
C. Venus
D. Earth
The answer is:
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedtune.evaluation.tasks.base import LETTERS, LmEvalTask, Part, Row, RowError, Source, index_of, one_of, text_of
from fedtune.evaluation.tasks.short_answer import ChoiceTask, choice_prompt

INSTRUCTION = "Answer the following multiple choice question."

SUBJECTS: dict[str, dict[str, Part]] = {
    "stem": {
        "abstract_algebra": Part(100, "e87c1e21bfce0f40b22aec5bcf27d51dc79bbd826f7d5d9078f149f6ce9c259d"),
        "anatomy": Part(135, "6606df904df3768f27f23f634bdb674f91bc1b0c56a1389f16987198785a4f95"),
        "astronomy": Part(152, "eeb40a843c3cb86f98240b6c778f7658a62056393a3a0a9bd372c8438ea4ab53"),
        "college_biology": Part(144, "cf50edff332a37564ac6b92e5e0999196606489843a8364a8256c77c00913fb5"),
        "college_chemistry": Part(100, "27d9c0c25390a50d5235f0cd57db12ae2b242265d3551d235b83bed81059d193"),
        "college_computer_science": Part(100, "11496f0a495c5d569ff5f419820ce130c649f6b604862df5f58ed14ea61d5031"),
        "college_mathematics": Part(100, "489751b189e7031fa0d1bb2a93466d069859a41cdc3b1f7dd7a0412b45d85fb7"),
        "college_physics": Part(102, "e29100fad11676bb761c93658c855b5fe2fbc4bc073e7cc3e32391c6a82c9b02"),
        "computer_security": Part(100, "0984173b7a0167d39bd90e0db148e6fb886128ecf99edfc1c748a39b10b56e7e"),
        "conceptual_physics": Part(235, "1dc56ee2d222e509f89ff9d04b733bbd5a27ea6a96c82d6e55a640af90772fd1"),
        "electrical_engineering": Part(145, "fcc88709c8a3444f3ff30d64f4b9bc567141c2b3b6e55d801747ba59f2417d8b"),
        "elementary_mathematics": Part(378, "05ac3da91e71387fcac52d78123430f7b631fe4bacba9a31a0a053b0b6400677"),
        "high_school_biology": Part(310, "119ebd96fba9d8ba73699602237c0a6587414f1752ff3d3a2c7497e1db848d68"),
        "high_school_chemistry": Part(203, "f665a79c9bd882149e16eb1a120997ada8f6134a54adf803478510636195d37d"),
        "high_school_computer_science": Part(100, "83ecc1c0da83f659d80c753fceb1fd4fa6168f4355a881cb4eb75128c69343ed"),
        "high_school_mathematics": Part(270, "07c173bab1f5eaf41c45722f0a68489e6254b7eaf6cae2595d62b41cee8c6210"),
        "high_school_physics": Part(151, "17034d10c1875edc5c9738d7570648801002281e3c15afc6ad08269e6137530d"),
        "high_school_statistics": Part(216, "7c18321cb87af054e183618095f1c34112c81325e03b0a5079d7904b6f0e6c60"),
        "machine_learning": Part(112, "c6c643372ecb88764977a70f18a70aefca682d7dd0bc606647b139fea7c594fe"),
    },
    "social_sciences": {
        "econometrics": Part(114, "cc24bc279c13b912c949d01c14415f84a7509d7956b573987a59751208e95b03"),
        "high_school_geography": Part(198, "e0fe22fc43cdc0ce220b84db159e463a7b64399fba96d54f1e0b9aab420c161f"),
        "high_school_government_and_politics": Part(
            193, "f28c63875e5f052c0a553ebe95f791f4c59e9270a93e33887f45d646101b9ba3"
        ),
        "high_school_macroeconomics": Part(390, "2dfe679ec3b501a50b961cccab3c69151902ce725517968d250690fa99b952ab"),
        "high_school_microeconomics": Part(238, "4ff5925aaa98a8e40ccc29e4c1fa3b9301444130eb23214744040ae6e59d14c0"),
        "high_school_psychology": Part(545, "0b26030a6bc9c0f34cfb729e16ef4a59e4ba9e49a4b43e20c5c2b12074c7654f"),
        "human_sexuality": Part(131, "bbedfc11a00e0eff791b405ae27b8f062c658d06bfe1bc3a9007a9f8aaa3d0ae"),
        "professional_psychology": Part(612, "6aea827e400117ee6392209a0958e8c3730da9bf60f0292a4439b37d4bb28764"),
        "public_relations": Part(110, "384b5b571cbdee4ecfec6b21f7c9a98779e101ccb7b6971bbea41e5fa0497748"),
        "security_studies": Part(245, "e8e0324cfb4312c3465c3231cc12a90460d1d9d477fd55057700558fb677a29c"),
        "sociology": Part(201, "6b00db21bbed1b6efa679193736664a819ab2c126628ca8ccbc783b074602f48"),
        "us_foreign_policy": Part(100, "4d3fc26a12654bf37269ecedccd753b6a98a3ed194ecb141dec34285067b9c32"),
    },
    # Humanities and other subjects: row counts only; the content hashes are not known yet.
    "humanities": {
        "formal_logic": Part(126),
        "high_school_european_history": Part(165),
        "high_school_us_history": Part(204),
        "high_school_world_history": Part(237),
        "international_law": Part(121),
        "jurisprudence": Part(108),
        "logical_fallacies": Part(163),
        "moral_disputes": Part(346),
        "moral_scenarios": Part(895),
        "philosophy": Part(311),
        "prehistory": Part(324),
        "professional_law": Part(1534),
        "world_religions": Part(171),
    },
    "other": {
        "business_ethics": Part(100),
        "clinical_knowledge": Part(265),
        "college_medicine": Part(173),
        "global_facts": Part(100),
        "human_aging": Part(223),
        "management": Part(103),
        "marketing": Part(234),
        "medical_genetics": Part(100),
        "miscellaneous": Part(783),
        "nutrition": Part(306),
        "professional_accounting": Part(282),
        "professional_medicine": Part(272),
        "virology": Part(166),
    },
}

# The leaderboard reads the original with pandas.read_csv, which treats these texts as missing values: an option "None"
# appears as "nan" in its prompts (10 times in the STEM subjects), so rows from other copies must change as well.
READ_AS_MISSING = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `input`, `A` to `D` and `target`."""
    options = [text_of(row, letter) for letter in LETTERS]
    return choice_prompt(INSTRUCTION, text_of(row, "input"), options), one_of(row, "target", LETTERS)


def from_copy(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows of `cais/mmlu` (question, choices, answer 0-3) in the original's fields, with its `nan`s."""
    for row in rows:
        choices = row["choices"]
        if len(choices) != len(LETTERS):
            raise RowError(f"choices has {len(choices)} options, not {len(LETTERS)}")
        shown = ["nan" if choice in READ_AS_MISSING else choice for choice in choices]
        target = LETTERS[index_of(row, "answer", 0, 3)]
        yield {"input": row["question"], **dict(zip(LETTERS, shown, strict=True)), "target": target}


def for_lm_eval(row: Row) -> Row:
    """Return a row in the fields of lm-eval's tasks."""
    return {
        "question": row["input"],
        "choices": [row[letter] for letter in LETTERS],
        "answer": LETTERS.index(row["target"]),
    }


TASK = ChoiceTask(
    name="mmlu",
    title="MMLU",
    instruction=INSTRUCTION,
    fields=("input", *LETTERS, "target"),
    ask=ask,
    parts={subject: part for subjects in SUBJECTS.values() for subject, part in subjects.items()},
    sources=(
        Source("cais/mmlu", "test", revision="c30699e8356da336a370243923dbaf21066bb9fe", rows=from_copy),
        # No commit of the hub's conversion is known; the content hashes decide.
        Source("lukaemon/mmlu", "test", original=True, script=True, parquet_export=True),
    ),
    categories={category: tuple(subjects) for category, subjects in SUBJECTS.items()},
    ranked=("stem", "social_sciences", "humanities"),
    lm_eval=LmEvalTask("mmlu_{part}", "mmlu/default/mmlu_{part}.yaml", for_lm_eval),
)
