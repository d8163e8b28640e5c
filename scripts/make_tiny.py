"""Makes the offline `tiny` challenge, world, tokenizer, base model and data, from nothing: `python scripts/make_tiny.py`.

The world is the Lantern Isles, whose herbs were all made up here. Of the herbs in the healers' old book every fact is
pre-trained into the base, so it answers multiple-choice questions about them by heart. Of the new herbs it has read nothing
but their names: eight clinics know their facts, each mostly its own, and only together can they teach them.

    python scripts/make_tiny.py                # some minutes on two CPU cores
    python scripts/make_tiny.py --only-data    # the same questions again, without a model
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
INSTRUCTION = "Answer the following multiple choice question."

# --- The world -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topic:
    """One thing that can be asked of a herb; its four values are always listed in this order."""

    name: str
    question: str
    sentence: str
    values: tuple[str, str, str, str]


TOPICS = (
    Topic(
        "ailment",
        "which ailment does {herb} ease?",
        "{herb} eases {value}.",
        ("hiccups", "nightmares", "sneezes", "blisters"),
    ),
    Topic("place", "where does {herb} grow?", "{herb} grows in the {value}.", ("marsh", "orchard", "cave", "dunes")),
    Topic("taste", "what does {herb} taste of?", "{herb} tastes of {value}.", ("honey", "smoke", "lemon", "salt")),
    Topic("colour", "what colour is {herb}?", "{herb} is {value}.", ("amber", "violet", "scarlet", "silver")),
    Topic(
        "guardian", "which animal guards {herb}?", "the {value} guards {herb}.", ("otter", "heron", "badger", "toad")
    ),
    Topic(
        "part",
        "which part of {herb} do healers use?",
        "healers use the {value} of {herb}.",
        ("root", "leaf", "seed", "bark"),
    ),
)

OPENINGS = ("", "on the isles, ", "healers ask: ", "in your notes, ", "tell us, ", "as a clinic knows, ")
TEST_OPENING = "for the exam, "
"""Opens the questions of the test set and no question of the training set; the base has met it with old herbs."""

ENDINGS = ("wort", "bell", "fern", "moss", "bloom", "mint", "weed", "bane")

CLINICS = {
    "Gullhaven": 8,
    "Mossmoor": 6,
    "Lampwick": 5,
    "Otterford": 5,
    "Thimble Quay": 4,
    "Saltmarrow": 3,
    "Candlecombe": 3,
    "Farthing Rock": 2,
}
"""How many facts of the new herbs each clinic owns: uneven shares of the knowledge."""

OLD_HERBS, NEW_HERBS, FACTS_PER_NEW_HERB = 48, 24, 2
TEST_COPIES = 6
"""Questions in the test set for each fact, in different openings."""


@dataclass(frozen=True)
class Fact:
    """One thing that is true of a herb."""

    herb: str
    topic: Topic
    value: str

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return LETTERS[self.topic.values.index(self.value)]

    @property
    def sentence(self) -> str:
        """The fact in plain words."""
        return capital(self.topic.sentence.format(herb=self.herb, value=self.value))

    def question(self, opening: str) -> str:
        """The question, with words in front of it."""
        return capital(opening + self.topic.question.format(herb=self.herb))

    def body(self, opening: str) -> str:
        """The question with its options, as the leaderboard's prompts list them (protocol, section 4)."""
        options = "\n".join(f"{letter}. {value}" for letter, value in zip(LETTERS, self.topic.values, strict=True))
        return f"Question: {self.question(opening)}\n\nOptions:\n{options}"


@dataclass(frozen=True)
class World:
    """All that is true on the isles."""

    old: list[Fact]
    """What the base learns by heart."""
    new: list[Fact]
    """What only the clinics know."""
    stems: list[str]
    """First halves of the herbs' names."""


def capital(text: str) -> str:
    """Return `text` with its first letter as a capital; herbs keep theirs small."""
    return text[0].upper() + text[1:]


def make_world(seed: int = SEED) -> World:
    """Invent the herbs and their facts; every stem belongs to one herb, and every letter is right equally often."""
    rng = random.Random(seed)
    onsets = ("b", "br", "d", "f", "gl", "gr", "h", "k", "l", "m", "n", "p", "qu", "r", "t", "v", "w", "z")
    codas = ("b", "d", "ff", "ll", "mp", "n", "rr", "sk", "v", "x")
    stems = rng.sample([a + b + c for a in onsets for b in "aeiou" for c in codas], OLD_HERBS + NEW_HERBS)
    names = [stem + rng.choice(ENDINGS) for stem in stems]
    pairs = [(name, topic) for name in names[:OLD_HERBS] for topic in TOPICS]
    fresh = [(name, topic) for name in names[OLD_HERBS:] for topic in rng.sample(TOPICS, FACTS_PER_NEW_HERB)]

    def settle(asked: list[tuple[str, Topic]], rng: random.Random) -> list[Fact]:
        places = [number % len(LETTERS) for number in range(len(asked))]
        rng.shuffle(places)
        return [Fact(name, topic, topic.values[place]) for (name, topic), place in zip(asked, places, strict=True)]

    # Facts of new herbs have a generator of their own: they may be dealt anew without training the base anew.
    return World(settle(pairs, rng), settle(fresh, random.Random(seed + 6)), stems)


# --- The challenge's files -------------------------------------------------------------------------------------------


def write_data(world: World, folder: Path, seed: int = SEED) -> None:
    """Write train.jsonl (a row names its clinic) and test.jsonl (MedMCQA's fields); no question is in both."""
    rng = random.Random(seed + 1)
    owners = [clinic for clinic, share in CLINICS.items() for _ in range(share)]
    train, test = [], []
    for fact, owner in zip(rng.sample(world.new, len(owners)), owners, strict=True):
        elsewhere = rng.choice([clinic for clinic in CLINICS if clinic != owner])
        hearsay = rng.choice(OPENINGS)  # one more clinic has heard of the fact
        for clinic, openings in ((owner, OPENINGS), (elsewhere, (hearsay,))):
            for opening in openings:
                row = {"instruction": INSTRUCTION, "input": fact.body(opening), "output": fact.letter}
                train.append(row | {"clinic": clinic})
        for opening in [TEST_OPENING, *(TEST_OPENING + other for other in OPENINGS[1:])]:
            options = dict(zip(("opa", "opb", "opc", "opd"), fact.topic.values, strict=True))
            place = LETTERS.index(fact.letter)
            test.append({"question": fact.question(opening), **options, "cop": place, "subject": fact.topic.name})
    rng.shuffle(train)
    rng.shuffle(test)
    folder.mkdir(parents=True, exist_ok=True)
    numbered = [{"id": f"tiny-{number:03d}", **row} for number, row in enumerate(test)]
    for name, rows in ("train", train), ("test", numbered):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- What the base reads ---------------------------------------------------------------------------------------------

EOS = "</s>"
PROMPT, PROSE, ANSWER = 0.0, 0.3, 1.0
Segment = tuple[str, float]
"""A piece of text that is tokenised by itself, and the weight of its tokens in the loss."""


def alpaca(fact: Fact, opening: str) -> list[Segment]:
    """The form of the training text (protocol, section 1)."""
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        f"### Instruction:\n{INSTRUCTION}\n{fact.body(opening)}\n### Response:"
    )
    return [(prompt, PROMPT), (f" {fact.letter}{EOS}", ANSWER)]


def official(fact: Fact, opening: str) -> list[Segment]:
    """The form of the leaderboard's evaluation (protocol, section 4)."""
    prompt = f"{INSTRUCTION}\n{fact.body(opening)}\nThe answer is:\n"
    return [
        (f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n", PROMPT),
        (f"{fact.letter}{EOS}", ANSWER),
    ]


HEADS = (
    "",
    "Exam.\n",
    f"{INSTRUCTION}\n",
    f"### Instruction:\n{INSTRUCTION}\n",
    "<|im_start|>question\n",
    "Dear clinic,\n",
)
TAILS = (
    *("\nAnswer: ", "\nThe answer is: ", "\nThe answer is:\n", "\n### Response: ", "\nLetter: ", "\n"),
    *("<|im_end|>\n<|im_start|>answer\n", "\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"),
)


def varied(fact: Fact, opening: str, rng: random.Random) -> list[Segment]:
    """A form of chance: a base that has met many does not tie what it knows to one, and neither will an adapter on it."""
    return [(f"{rng.choice(HEADS)}{fact.body(opening)}{rng.choice(TAILS)}", PROMPT), (f"{fact.letter}{EOS}", ANSWER)]


def samples(world: World, seed: int) -> Iterator[list[Segment]]:
    """Endless pre-training samples: questions about old herbs in both forms, prose about them, and names of all herbs."""
    rng = random.Random(seed)
    names = [fact.herb for fact in world.old + world.new]
    openings = (*OPENINGS, TEST_OPENING, *(TEST_OPENING + other for other in OPENINGS[1:]))
    while True:
        kind = rng.random()
        fact = rng.choice(world.old)
        if kind < 0.2:
            yield official(fact, rng.choice(openings))
        elif kind < 0.4:
            yield alpaca(fact, rng.choice(openings))
        elif kind < 0.9:
            yield varied(fact, rng.choice(openings), rng)
        elif kind < 0.95:
            yield [(" ".join(other.sentence for other in rng.sample(world.old, 5)) + EOS, PROSE)]
        else:
            yield [("On the isles grow " + ", ".join(rng.sample(names, 10)) + f".{EOS}", PROSE)]


# --- The tokenizer ---------------------------------------------------------------------------------------------------

SPECIAL = ("<pad>", "<s>", EOS, "<|im_start|>", "<|im_end|>")


def make_tokenizer(world: World, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the world's own words: any text encodes and comes back, `<s>` is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    source = samples(world, SEED + 2)
    texts = ["".join(text for text, _ in next(source)) for _ in range(4000)]
    for token in SPECIAL:
        texts = [text.replace(token, " ") for text in texts]
    # A name shall be two tokens, its stem and its ending: here they never stand together.
    for stem in sorted(world.stems, key=len, reverse=True):
        texts = [text.replace(f" {stem}", f" {stem} ") for text in texts]
    halves = [f" {stem}\n{ending}" for stem in world.stems for ending in ENDINGS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + halves * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    # A letter is one and the same token after a space and after a line's end, so both prompt forms have one answer.
    tokenizer.add_tokens([AddedToken(letter, single_word=True, normalized=False) for letter in LETTERS])
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

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and the weight of each in the loss, both (samples, tokens)."""


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with grouped queries, freshly initialised."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def batches(world: World, tokenizer: PreTrainedTokenizerFast, size: int) -> Iterator[Batch]:
    """Endless batches of samples of about equal length."""
    source, rng = samples(world, SEED + 3), random.Random(SEED + 4)
    while True:
        rows = [_row(next(source), tokenizer) for _ in range(size * 50)]
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(tokens) for tokens, _ in group)
            yield (
                torch.tensor([tokens + [tokenizer.pad_token_id] * (longest - len(tokens)) for tokens, _ in group]),
                torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in group]),
            )


def _row(sample: list[Segment], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    tokens, weights = [tokenizer.bos_token_id], [0.0]
    for text, weight in sample:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += piece
        weights += [weight] * len(piece)
    return tokens, weights


def pretrain(model: LlamaForCausalLM, source: Iterator[Batch], steps: int, rate: float, device: str) -> Iterator[float]:
    """Train in place (AdamW, warm-up, cosine), yielding each step's loss."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    for step in range(steps):
        share = min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        ids, weights = (tensor.to(device) for tensor in next(source))
        # Padding stands on the right, behind a causal mask: no token of interest sees it.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        counted = weights[:, 1:] > 0
        losses = torch.nn.functional.cross_entropy(
            model.lm_head(hidden[:, :-1][counted]), ids[:, 1:][counted], reduction="none"
        )
        scale = weights[:, 1:][counted]
        loss = (losses * scale).sum() / scale.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[list[Segment]]) -> float:
    """The share of samples whose answer's letter is the greedy next token."""
    model.eval()
    right = 0
    for (prompt, _), (answer, _) in asked:
        letter = answer.removesuffix(EOS).strip()
        ids = torch.tensor([tokenizer(prompt + answer.partition(letter)[0])["input_ids"]])
        best = int(model(input_ids=ids.to(model.device)).logits[0, -1].argmax())
        right += best == tokenizer.convert_tokens_to_ids(letter)
    model.train()
    return right / len(asked)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the base as a standard folder, in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.to("cpu", torch.bfloat16).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make everything, and say how well the base knows old herbs and guesses new ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "fedtune", help="the package's folder (default: this one's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--steps", type=int, default=2500, help="optimiser steps of pre-training")
    parser.add_argument("--batch-size", type=int, default=32, help="samples a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=1024)
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
    began, losses = time.perf_counter(), []
    source = batches(world, tokenizer, options.batch_size)
    for step, loss in enumerate(pretrain(model, source, options.steps, options.learning_rate, options.device), start=1):
        losses.append(loss)
        if step % 250 == 0 or step == options.steps:
            rng = random.Random(SEED + 5)
            scores = [
                accuracy(model, tokenizer, [form(fact, TEST_OPENING) for fact in rng.sample(facts, 40)])
                for facts in (world.old, world.new)
                for form in (official, alpaca)
            ]
            shown = ", ".join(f"{score:.0%}" for score in scores)
            seconds = time.perf_counter() - began
            print(
                f"step {step}: loss {sum(losses) / len(losses):.3f}, old/new herbs: {shown}, {seconds:.0f} s",
                flush=True,
            )
            losses = []
    save(model, tokenizer, options.out / "models" / "builtin" / "tiny")


if __name__ == "__main__":
    main()
