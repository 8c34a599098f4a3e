"""The problems of two spelling tasks: to count a letter in a word, and to spell a word.

nanochat had both, SpellingBee and SimpleSpelling, over a list of 370,000 words that it downloaded. These are smaller:
the words and the questions are the lists below. What is asked for has nanochat's form: a count ends with "#### 3", and
"Spell the word: cat" is answered with "cat:c,a,t". A problem depends on its number alone.
"""

import random
import string

PROBLEMS = 256  # of the counting task
FIRST = 10_000_000  # number of the first problem of the evaluation; smaller numbers are for training
WORD_LIST = """
accommodate address afternoon agreement alphabet ancient apple assessment balloon banana barrel beginning believe
bicycle blossom bookkeeper breakfast bubble butter button calendar candle carrot castle cathedral ceiling cheese
cherry chocolate cinnamon classroom coffee committee computer cotton cucumber curriculum daffodil dessert difficult
dinner discussion dolphin dragonfly eleven embarrass engineer evening existence february feather fellow festival
fiddle forest fossil garden giraffe glossary goose grammar grasshopper hammer happiness harbour hippopotamus
holiday hollow horizon immediately impossible independent island jelly jewellery journey kangaroo kettle keyboard
kitten knowledge ladder language lesson lettuce library lightning lullaby machine mammal marmalade meadow
mississippi mirror mountain mushroom necessary needle newspaper ninety noodle ocean occurrence orange orchestra
otter paddle parallel parrot pebble penguin pepper piano pineapple pillow planet possess pottery pumpkin puzzle
questionnaire quarrel rabbit raccoon railway rainbow raspberry recommend reference river rhythm saddle satellite
scissors seventeen shallow shoulder skeleton sparrow spinach squirrel staircase strawberry success summer sunflower
teaspoon telescope tennis thirteen thunder tomato tomorrow tongue trumpet tunnel turtle umbrella vaccine valley
vanilla vegetable village violin volleyball waterfall wednesday whistle willow window winter yellow yesterday zebra
"""
WORDS = tuple(WORD_LIST.split())
QUESTIONS = (
    "How many {letter} are in the word {word}?",
    "How many times does the letter {letter} occur in {word}?",
    "Count the letter {letter} in {word}.",
    "What is the number of {letter} in {word}?",
)


def counting_problem(number: int) -> tuple[str, str]:
    """Return (question, answer): how many times a word has a letter. Nine in ten letters are of the word."""
    draws = random.Random(number)
    word = draws.choice(WORDS)
    letter = draws.choice(word if draws.random() < 0.9 else string.ascii_lowercase)
    return draws.choice(QUESTIONS).format(letter=letter, word=word), str(word.count(letter))


def spelling_problem(word: str) -> tuple[str, str]:
    """Return (question, answer): the letters of a word."""
    return f"Spell the word: {word}", f"{word}:{','.join(word)}"


def counting_problems() -> list[tuple[str, str]]:
    """Return the problems of the counting task."""
    return [counting_problem(FIRST + i) for i in range(PROBLEMS)]


def spelling_problems() -> list[tuple[str, str]]:
    """Return the problems of the spelling task: each word once, in an order without a pattern."""
    return [spelling_problem(word) for word in random.Random(FIRST).sample(WORDS, len(WORDS))]
