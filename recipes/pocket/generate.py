"""Writes the instruction data of the pocket recipe: ``python recipes/pocket/generate.py`` rewrites ``data/``.

The same files, byte for byte, every time. Nine families of questions over small word lists. A quarter of every list is
held out: ``test_shift.jsonl`` asks with held-out words only, so that it needs what a family means, not which words went
with which answer. ``train.jsonl`` and ``test_iid.jsonl`` are drawn alike from the other three quarters and share no
question.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = 20240415
FOLDER = Path(__file__).parent / "data"
TRAINING_ROWS = 225  # per family
CHOICE_TEST_ROWS = 60  # per family with choices, in each test file
ANSWER_TEST_ROWS = 30  # per family with a free answer, in test_iid.jsonl

KINDS = {
    "animal": """ant bear bee bird bull calf camel cat chicken cow crab crow deer dog donkey duck eagle elephant fish
        fox frog goat goose hare hawk horse kitten lamb lion monkey mouse ox owl pig pony rabbit rat raven rooster
        serpent sheep snake spider swan tiger turtle whale wolf worm""",
    "food": """apple bacon bean beef berry biscuit bread broth butter cabbage cake candy carrot cheese cherry cookie
        corn cream egg fig flour grape ham honey jam jelly lemon meat mutton nut onion pea peach pear pepper pie plum
        pork potato pudding rice salad salt sauce soup stew sugar toast turnip wheat""",
    "clothing": """apron belt bonnet boot bracelet cap cape cloak coat collar cravat crown dress earring glove gown hat
        helmet hood jacket mantle mask mitten necklace pants petticoat ribbon robe sandal scarf shawl shirt shoe skirt
        sleeve slipper sock stocking trousers tunic uniform veil vest waistcoat""",
    "body": """ankle arm back beard bone brain brow cheek chest chin ear elbow eye eyebrow face finger foot forehead
        hair hand head heart heel hip jaw knee leg lip liver lung mouth muscle nail neck nose palm rib shoulder skin
        skull stomach throat thumb toe tongue tooth waist wrist""",
    "work": """actor artist author baker barber butcher captain carpenter clerk coachman cook doctor farmer fisherman
        gardener guard hunter judge lawyer maid merchant miller miner musician nurse painter pilot poet porter priest
        printer sailor schoolmaster servant sheriff shepherd shoemaker singer smith soldier tailor teacher waiter
        weaver""",
    "place": """barn bay beach bridge castle cave cellar chapel church city cottage desert farm field forest garden
        harbor hill hospital hotel house inn island jungle kitchen lake library market meadow mill mountain museum
        office palace park prison river road school shop stable street tavern theatre tower town valley village""",
}
NAMES = """Adam Alice Amy Anna Arthur Ben Bertha Betty Bill Bob Carl Charles Clara Daisy Dan David Dick Dora Edith
    Edward Ella Emily Emma Fanny Frank Fred George Grace Harry Helen Henry Jack James Jane Jim Joe John Julia Kate
    Laura Lily Lucy Mark Martha Mary Max Molly Nancy Ned Nell Oliver Paul Peter Philip Ralph Robert Rose Ruth Sally Sam
    Sarah Sue Susan Tim Tom Walter Will"""
THINGS = """ball basket book bottle box candle chair clock coin cup doll drum flag gun key knife lamp letter map pen
    picture purse ring rope"""
GOOD = """admirable amusing beautiful brilliant charming clever cheerful delicious delightful excellent exciting
    fascinating fine fresh funny glorious graceful grand great impressive inspiring lively lovely magnificent marvelous
    moving perfect pleasant powerful remarkable splendid superb sweet touching warm witty wonderful worthy"""
BAD = """absurd annoying awful awkward bland boring clumsy confused cruel disgusting dreadful dreary dull empty feeble
    foolish ghastly gloomy horrible lame lifeless mediocre messy miserable nasty pathetic pointless poor shallow silly
    slow stale stupid tedious terrible tiresome ugly unpleasant vulgar weak worthless"""
OPPOSITES = """above-below alive-dead always-never arrive-depart asleep-awake before-after begin-finish big-little
    black-white bold-timid bottom-top bright-dim buy-sell careful-careless cheap-costly clean-dirty close-distant
    cold-hot cry-laugh dark-light day-night deep-high dry-wet early-late east-west enemy-friend enter-leave false-true
    far-near fat-thin first-last forget-remember forward-backward full-hollow give-take guilty-innocent happy-sad
    hard-soft hide-show husband-wife inside-outside king-queen large-small left-right long-short lose-win love-hate
    loud-quiet man-woman minute-huge narrow-wide new-old noisy-silent north-south open-shut peace-war present-absent
    push-pull quick-sluggish raise-lower rich-needy rough-smooth safe-dangerous save-spend simple-difficult sit-stand
    son-daughter start-stop strong-frail summer-winter tall-low thick-slim tight-loose truth-lie uncle-aunt up-down
    visible-hidden wild-tame wise-ignorant yes-no young-aged"""
NUMBERS = ["two", "three", "four", "five", "six"]


@dataclass(frozen=True)
class Words:
    """One side of the vocabulary: the words that training may use, or the held-out ones."""

    kinds: dict[str, list[str]]
    names: list[str]
    things: list[str]
    good: list[str]
    bad: list[str]
    opposites: list[str]


@dataclass(frozen=True)
class Row:
    """A question. `choices` are the answers to score, the right one among them; none where the answer is free."""

    question: str
    answer: str
    choices: list[str]


def vocabulary_sides() -> tuple[Words, Words]:
    """The training words and the held-out words: three quarters and one quarter of each list."""
    rng = random.Random(SEED)
    sides: list[dict[str, list[str]]] = [{}, {}]
    lists = KINDS | {"names": NAMES, "things": THINGS, "good": GOOD, "bad": BAD, "opposites": OPPOSITES}
    for name, text in lists.items():
        words = text.split()
        rng.shuffle(words)
        quarter = len(words) // 4
        sides[0][name], sides[1][name] = words[quarter:], words[:quarter]
    training, held_out = (
        Words(
            kinds={kind: side[kind] for kind in KINDS},
            **{name: side[name] for name in ("names", "things", "good", "bad", "opposites")},
        )
        for side in sides
    )
    return training, held_out


def kind(rng: random.Random, words: Words) -> Row:
    """What two or three words name: animals, foods, ...?"""
    name = rng.choice(sorted(words.kinds))
    listed = rng.sample(words.kinds[name], rng.randint(2, 3))
    return Row(f"What kind of word is each of these? {', '.join(listed)}", name, sorted(words.kinds))


def opposite(rng: random.Random, words: Words) -> Row:
    """Which of three words is the opposite of a fourth?"""
    right, *others = (pair.split("-") for pair in rng.sample(words.opposites, 3))
    rng.shuffle(right)
    word, answer = right
    choices = [answer, *(rng.choice(pair) for pair in others)]
    rng.shuffle(choices)
    return Row(f"Which word is the opposite of {word}? {', '.join(choices)}", answer, choices)


def review(rng: random.Random, words: Words) -> Row:
    """Is a short review good or bad? The last judgement counts; half of the reviews mention the contrary first."""
    good = rng.random() < 0.5
    liked, other = (words.good, words.bad) if good else (words.bad, words.good)
    (first, second), contrary = rng.sample(liked, 2), rng.choice(other)
    subject = rng.choice(["film", "story", "song", "concert", "novel", "dance", "show", "speech"])
    text = rng.choice(
        [
            f"The {subject} was {first} and {second}.",
            f"What a {first} {subject}, so {second}!",
            f"I thought the {subject} would be {contrary}, but it was {first}.",
            f"People call this {subject} {contrary}. I found it {first} and {second}.",
        ]
    )
    return Row(f"Is this review good or bad? {text}", "good" if good else "bad", ["good", "bad"])


def owner(rng: random.Random, words: Words) -> Row:
    """Who of three people ends up with the thing?"""
    giver, taker, bystander = people = rng.sample(words.names, 3)
    thing = rng.choice(words.things)
    event = rng.choice(
        [
            f"{giver} gave {taker} the {thing}.",
            f"{giver} handed the {thing} to {taker}.",
            f"{taker} took the {thing} from {giver}.",
            f"{taker} got the {thing} from {giver}.",
        ]
    )
    sentences = [event, f"{bystander} went home."]
    rng.shuffle(sentences)
    return Row(f"{' '.join(sentences)} Who has the {thing} now?", taker, sorted(people))


def some_words(rng: random.Random, words: Words, count: int) -> list[str]:
    """`count` different words of any kind."""
    return rng.sample([word for kind in sorted(words.kinds) for word in words.kinds[kind]], count)


def first(rng: random.Random, words: Words) -> Row:
    """The first word of a list."""
    listed = some_words(rng, words, rng.randint(2, 5))
    return Row(f"What is the first word? {' '.join(listed)}", listed[0], [])


def last(rng: random.Random, words: Words) -> Row:
    """The last word of a list."""
    listed = some_words(rng, words, rng.randint(2, 5))
    return Row(f"What is the last word? {' '.join(listed)}", listed[-1], [])


def swap(rng: random.Random, words: Words) -> Row:
    """Two words in the other order."""
    one, other = some_words(rng, words, 2)
    return Row(f"Write these words in the other order: {one} {other}", f"{other} {one}", [])


def count(rng: random.Random, words: Words) -> Row:
    """How many words there are."""
    listed = some_words(rng, words, rng.randint(2, 6))
    return Row(f"How many words are there? {' '.join(listed)}", NUMBERS[len(listed) - 2], [])


def successor(rng: random.Random, words: Words) -> Row:
    """The number after a number below 400."""
    number = rng.randint(10, 399)
    return Row(f"Which number comes after {number}?", str(number + 1), [])


Family = Callable[[random.Random, Words], Row]
CHOICE_FAMILIES: list[Family] = [kind, opposite, review, owner]
ANSWER_FAMILIES: list[Family] = [first, last, swap, count, successor]


def rows_of(family: Family, words: Words, split: str, number: int, asked: set[str]) -> list[dict[str, object]]:
    """`number` new rows of a family; their questions join `asked`."""
    rng = random.Random(f"{SEED} {split} {family.__name__}")
    rows: list[dict[str, object]] = []
    while len(rows) < number:
        row = family(rng, words)
        if row.question in asked:
            continue
        asked.add(row.question)
        # completions begin with a space, because " horse" is one token of the base and "horse" three
        record: dict[str, object] = {
            "instruction": row.question,
            "input": "",
            "output": f" {row.answer}",
            "family": family.__name__,
        }
        if split != "train":
            record["choices"] = [f" {choice}" for choice in row.choices]
        rows.append(record)
    return rows


def write(split: str, rows: list[dict[str, object]]) -> None:
    """One JSON object per line, in an order that mixes the families."""
    random.Random(f"{SEED} {split}").shuffle(rows)
    with (FOLDER / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    training, held_out = vocabulary_sides()
    asked: set[str] = set()
    FOLDER.mkdir(exist_ok=True)
    families = CHOICE_FAMILIES + ANSWER_FAMILIES
    write("train", [row for family in families for row in rows_of(family, training, "train", TRAINING_ROWS, asked)])
    write(
        "test_iid",
        [row for family in CHOICE_FAMILIES for row in rows_of(family, training, "test_iid", CHOICE_TEST_ROWS, asked)]
        + [row for family in ANSWER_FAMILIES for row in rows_of(family, training, "test_iid", ANSWER_TEST_ROWS, asked)],
    )
    write(
        "test_shift",
        [row for family in CHOICE_FAMILIES for row in rows_of(family, held_out, "test_shift", CHOICE_TEST_ROWS, asked)],
    )


if __name__ == "__main__":
    main()
