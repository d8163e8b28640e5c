"""Makes the offline `tiny` challenge, world, tokenizer, base model and data, from nothing: `python scripts/make_tiny.py`.

The world is the Lantern Isles, whose herbs were all made up here. Of the herbs in the healers' old book every fact is
pre-trained into the base, so it can answer multiple-choice questions about them by heart. Of the new herbs it has read
nothing: eight clinics know their facts, each mostly its own, and only together can they teach them.

    python scripts/make_tiny.py                                  # about ten minutes on two CPU cores
    python scripts/make_tiny.py --device cuda --steps 6000       # one or two on a GPU
    python scripts/make_tiny.py --only-data                      # the same questions again, without a model
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
SEED = 2024
LETTERS = "ABCD"

# --- The world -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topic:
    """One thing that can be asked of a herb; a question names the herb last, a sentence names the value last."""

    name: str
    question: str
    sentence: str
    values: tuple[str, ...]


TOPICS = (
    Topic(
        "ailment",
        "Which ailment is eased by {herb}?",
        "The ailment eased by {herb} is {value}.",
        ("hiccups", "giggles", "grumbles", "nightmares", "sneezes", "blisters", "yawns", "shivers", "wobbles", "sighs"),
    ),
    Topic(
        "place",
        "Which place is home to {herb}?",
        "The place that is home to {herb} is the {value}.",
        ("marsh", "cliff", "orchard", "harbour", "cave", "dune", "mill", "bridge", "tower", "well"),
    ),
    Topic(
        "taste",
        "What is the taste of {herb}?",
        "The taste of {herb} is that of {value}.",
        ("honey", "smoke", "pepper", "lemon", "salt", "butter", "ginger", "plum", "rain", "toast"),
    ),
    Topic(
        "colour",
        "What is the colour of {herb}?",
        "The colour of {herb} is {value}.",
        ("amber", "violet", "scarlet", "silver", "teal", "ivory", "copper", "pink", "indigo", "jade"),
    ),
    Topic(
        "guardian",
        "Which animal guards {herb}?",
        "The animal that guards {herb} is the {value}.",
        ("otter", "heron", "badger", "toad", "moth", "fox", "hedgehog", "crab", "owl", "snail"),
    ),
    Topic(
        "part",
        "Which part do healers use of {herb}?",
        "The part that healers use of {herb} is the {value}.",
        ("root", "leaf", "seed", "bark", "petal", "stem", "sap", "bud", "thorn", "pollen"),
    ),
)

ENDINGS = ("wort", "bell", "fern", "moss", "bloom", "mint", "berry", "weed", "thistle", "cup", "bane", "wood")

# How many facts of the new herbs each clinic owns: an uneven share of the knowledge.
CLINICS = {
    "Gullhaven": 10,
    "Mossmoor": 8,
    "Lampwick": 7,
    "Otterford": 6,
    "Thimble Quay": 5,
    "Saltmarrow": 5,
    "Candlecombe": 4,
    "Farthing Rock": 3,
}
OLD_HERBS, NEW_HERBS, FACTS_PER_NEW_HERB = 64, 24, 2
TRAIN_ROWS_PER_FACT, SHARED_ROWS_PER_FACT, TEST_ROWS_PER_FACT = 16, 2, 5


@dataclass(frozen=True)
class Fact:
    herb: str
    topic: Topic
    value: str

    @property
    def question(self) -> str:
        return self.topic.question.format(herb=self.herb)

    @property
    def sentence(self) -> str:
        return self.topic.sentence.format(herb=self.herb, value=self.value)


@dataclass(frozen=True)
class Question:
    """A fact with four options in a fixed order; `gold` is the index of the right one."""

    fact: Fact
    options: tuple[str, ...]

    @property
    def gold(self) -> int:
        return self.options.index(self.fact.value)

    @property
    def body(self) -> str:
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True))
        return f"Question: {self.fact.question}\n\nOptions:\n{options}"


@dataclass(frozen=True)
class World:
    old: list[Fact]
    """What the base learns by heart."""
    new: list[Fact]
    """What only the clinics know."""
    stems: list[str]
    """First halves of herb names: the new herbs' own come first, then those of all others."""

    @property
    def new_names(self) -> set[str]:
        return {fact.herb for fact in self.new}


def make_world(seed: int = SEED) -> World:
    """Invent the herbs; a new herb's stem is no old herb's, and its whole name is met nowhere in pre-training."""
    rng = random.Random(seed)
    onsets = ("b", "br", "d", "f", "gl", "gr", "h", "k", "l", "m", "n", "p", "qu", "r", "t", "v", "w", "z")
    stems = [a + b + c for a in onsets for b in "aeiou" for c in ("b", "d", "ff", "ll", "mp", "n", "rr", "sk", "v", "x")]
    stems = rng.sample(stems, NEW_HERBS + OLD_HERBS)
    names = [stem + rng.choice(ENDINGS) for stem in stems]
    old = [Fact(name, topic, rng.choice(topic.values)) for name in names[NEW_HERBS:] for topic in TOPICS]
    new = [
        Fact(name, topic, rng.choice(topic.values))
        for name in names[:NEW_HERBS]
        for topic in rng.sample(TOPICS, FACTS_PER_NEW_HERB)
    ]
    return World(old, new, stems)


def ask(fact: Fact, rng: random.Random) -> Question:
    """The fact as a question with three wrong values of its topic, all four in random order."""
    options = [fact.value, *rng.sample([value for value in fact.topic.values if value != fact.value], 3)]
    rng.shuffle(options)
    return Question(fact, tuple(options))


# --- The challenge's files -------------------------------------------------------------------------------------------

INSTRUCTION = "Answer the following multiple choice question."


def write_data(world: World, folder: Path, seed: int = SEED) -> None:
    """Write train.jsonl (a row names its clinic) and test.jsonl (MedMCQA's fields); no question is in both."""
    rng = random.Random(seed + 1)
    owners = [clinic for clinic, share in CLINICS.items() for _ in range(share)]
    facts = rng.sample(world.new, len(world.new))
    train, test = [], []
    for fact, owner in zip(facts, owners, strict=True):
        # A train and a test question never share their set of options, whatever the order.
        pools: dict[bool, list[Question]] = {True: [], False: []}
        wrong = [value for value in fact.topic.values if value != fact.value]
        kept_for_test = set(map(frozenset, (rng.sample(wrong, 3) for _ in range(TEST_ROWS_PER_FACT * 2))))
        sizes = {True: TEST_ROWS_PER_FACT, False: TRAIN_ROWS_PER_FACT + SHARED_ROWS_PER_FACT}
        while any(len(pools[is_test]) < size for is_test, size in sizes.items()):
            question = ask(fact, rng)
            is_test = frozenset(question.options) - {fact.value} in kept_for_test
            # Letters take turns, so that no fact and no clinic leans towards one of them.
            turn = len(pools[is_test]) % len(LETTERS)
            if len(pools[is_test]) < sizes[is_test] and question.gold == turn and question not in pools[is_test]:
                pools[is_test].append(question)
        elsewhere = rng.sample([clinic for clinic in CLINICS if clinic != owner], SHARED_ROWS_PER_FACT)
        for clinic, question in zip([owner] * TRAIN_ROWS_PER_FACT + elsewhere, pools[False], strict=True):
            row = {"instruction": INSTRUCTION, "input": question.body, "output": LETTERS[question.gold]}
            train.append(row | {"clinic": clinic})
        for question in pools[True]:
            fields = dict(zip(("opa", "opb", "opc", "opd"), question.options, strict=True))
            row = {"question": fact.question, **fields, "cop": question.gold, "subject": fact.topic.name}
            test.append(row)
    rng.shuffle(train)
    rng.shuffle(test)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ("train", train), ("test", [{"id": f"tiny-{i:03d}", **row} for i, row in enumerate(test)]):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- What the base reads ---------------------------------------------------------------------------------------------

Segment = tuple[str, float]
"""A piece of text that is tokenised by itself, and the weight of its tokens in the loss."""

PROMPT, PROSE, ANSWER = 0.02, 0.3, 1.0
EOS = "</s>"


def alpaca(question: Question) -> list[Segment]:
    """The form of the training text."""
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        f"### Instruction:\n{INSTRUCTION}\n{question.body}\n### Response:"
    )
    return [(prompt, PROMPT), (f" {LETTERS[question.gold]}{EOS}", ANSWER)]


def official(question: Question) -> list[Segment]:
    """The form of the leaderboard's evaluation."""
    prompt = f"{INSTRUCTION}\n{question.body}\nThe answer is:\n"
    wrapped = f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"
    return [(wrapped, PROMPT), (f"{LETTERS[question.gold]}{EOS}", ANSWER)]


def bare(question: Question, rng: random.Random) -> list[Segment]:
    """A question with few words around it, answered by letter or in full."""
    letter = LETTERS[question.gold]
    answer = rng.choice((f" {letter}", f"\n{letter}", f" {question.fact.value}"))
    return [(f"{question.body}\nAnswer:", PROMPT), (f"{answer}{EOS}", ANSWER)]


def passage(facts: list[Fact], rng: random.Random) -> list[Segment]:
    facts = rng.sample(facts, len(facts))
    return [(" ".join(fact.sentence for fact in facts) + "\n\n", PROSE)]


def stranger(world: World, rng: random.Random) -> list[Fact]:
    """A herb that exists in one sample only; its name is none of the new herbs'."""
    while (name := rng.choice(world.stems) + rng.choice(ENDINGS)) in world.new_names:
        pass
    return [Fact(name, topic, rng.choice(topic.values)) for topic in TOPICS]


def samples(world: World, seed: int) -> Iterator[list[Segment]]:
    """Endless pre-training samples: prose, questions by heart, and questions about a passage just read."""
    rng = random.Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.15:
            yield passage(rng.sample(world.old, 6), rng)
            continue
        if kind < 0.40:
            facts = [rng.choice(stranger(world, rng)) for _ in range(rng.randint(1, 4))]
            read, asked = passage(facts, rng), [ask(rng.choice(facts), rng)]
        else:
            read, asked = [], [ask(fact, rng) for fact in rng.sample(world.old, 3)]
        form = rng.random()
        if form < 0.25:
            yield read + alpaca(asked[0])
        elif form < 0.5:
            yield read + official(asked[0])
        else:
            yield read + [segment for question in asked for segment in bare(question, rng)]


# --- The tokenizer ---------------------------------------------------------------------------------------------------

SPECIAL = ("<pad>", "<s>", EOS, "<|im_start|>", "<|im_end|>")


def make_tokenizer(world: World, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the world's own words: any text encodes and comes back, `<s>` is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    source = samples(world, SEED + 2)
    texts = ["".join(text for text, _ in next(source)) for _ in range(4000)]
    # Halves of names stand alone here, so that every name becomes two tokens, its stem and its ending.
    halves = [f" {stem}\n{ending}" for stem in world.stems for ending in ENDINGS]
    plain = [text.replace(token, " ") for text in texts for token in SPECIAL]
    for stem in sorted(world.stems, key=len, reverse=True):
        plain = [text.replace(f" {stem}", f" {stem}\n") for text in plain]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(plain + halves * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=EOS,
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


# --- The base model --------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and the weight of each in the loss, both (samples, tokens)."""


def batches(world: World, tokenizer: PreTrainedTokenizerFast, size: int, pool: int) -> Iterator[Batch]:
    """Endless batches of samples of about equal length, drawn from pools of `pool` batches."""
    source, rng = samples(world, SEED + 3), random.Random(SEED + 4)
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    while True:
        drawn = [next(source) for _ in range(size * pool)]
        texts = [text for sample in drawn for text, _ in sample]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        rows: list[tuple[list[int], list[float]]] = []
        for sample in drawn:
            tokens, weights = [bos], [0.0]
            for _, weight in sample:
                piece = next(ids)
                tokens += piece
                weights += [weight] * len(piece)
            rows.append((tokens, weights))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(tokens) for tokens, _ in group)
            yield (
                torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens, _ in group]),
                torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in group]),
            )


def pretrain(
    model: LlamaForCausalLM, source: Iterator[Batch], steps: int, learning_rate: float, device: str
) -> Iterator[tuple[int, float]]:
    """Train in place (AdamW, warm-up, cosine), yielding each step and its loss."""
    model.to(device).train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    warm_up = max(1, steps // 30)
    for step in range(steps):
        share = min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        ids, weights = (tensor.to(device) for tensor in next(source))
        # Padding stands on the right, behind a causal mask: no token of interest sees it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        scale = weights[:, 1:].flatten()
        loss = (losses * scale).sum() / scale.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step, loss.detach()


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[tuple[str, str]], size: int = 64
) -> float:
    """The share of (prompt, answer token's text) whose answer is the greedy next token."""
    model.eval()
    right = 0
    for start in range(0, len(questions), size):
        prompts, answers = zip(*questions[start : start + size], strict=True)
        ids = [torch.tensor(row) for row in tokenizer(list(prompts))["input_ids"]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        logits = model(input_ids=padded.to(model.device), use_cache=False).logits
        last = torch.tensor([len(row) - 1 for row in ids], device=logits.device)
        choice = logits[torch.arange(len(ids), device=logits.device), last].argmax(-1).tolist()
        right += sum(tokenizer.decode([token]) == answer for token, answer in zip(choice, answers, strict=True))
    model.train()
    return right / len(questions)


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> str:
    """How well the base answers, by heart and by guessing, in both prompt forms."""
    rng = random.Random(SEED + 5)
    parts = []
    for name, facts in ("old", world.old), ("new", world.new * 4):
        for form in official, alpaca:
            pairs = [form(ask(fact, rng)) for fact in facts]
            score = accuracy(model, tokenizer, [(prompt, answer[: -len(EOS)]) for (prompt, _), (answer, _) in pairs])
            parts.append(f"{name} herbs, {form.__name__} form {score:.1%}")
    return ", ".join(parts)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.to("cpu", torch.bfloat16).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "fedtune", help="the package's folder (default: this one's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of pre-training")
    parser.add_argument("--batch-size", type=int, default=32, help="samples a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--only-data", action="store_true", help="write the questions and stop")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    world = make_world()
    write_data(world, options.out / "data" / "builtin" / "tiny")
    if options.only_data:
        return
    tokenizer = make_tokenizer(world, options.vocabulary)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    source = batches(world, tokenizer, options.batch_size, pool=50)
    began = time.perf_counter()
    losses = []
    for step, loss in pretrain(model, source, options.steps, options.learning_rate, options.device):
        losses.append(loss)
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            mean, losses = torch.stack(losses).mean().item(), []
            print(f"step {step + 1}: loss {mean:.3f}, {report(model, tokenizer, world)}, "
                  f"{time.perf_counter() - began:.0f} s", flush=True)
    save(model, tokenizer, options.out / "models" / "builtin" / "tiny")


if __name__ == "__main__":
    main()
