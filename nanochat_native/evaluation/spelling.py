"""The spelling task: spell a word, or count a letter in it.

nanochat had such a task, over a word list that it downloaded. This one is small and needs no files: the words are the
list below, and the problems are drawn from a fixed seed, so they are the same in every evaluation. The forms are those
of nanochat, of which its models saw many in training: a count ends with "#### 3", and "Spell the word: cat" is answered
with "cat:c,a,t". It is not part of ChatCORE.
"""

import random
import string

PROBLEMS = 256
SEED = 42
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
WORDS = WORD_LIST.split()


def spelling_problems() -> list[tuple[str, str]]:
    """Return (message, answer) of the problems, in turn a spelling and a count of a letter."""
    draws = random.Random(SEED)
    found = []
    for number in range(PROBLEMS):
        word = draws.choice(WORDS)
        if number % 2 == 0:
            found.append((f"Spell the word: {word}", f"{word}:{','.join(word)}"))
        else:
            letter = draws.choice(word if draws.random() < 0.9 else string.ascii_lowercase)
            found.append((f"How many {letter} are in the word {word}?", str(word.count(letter))))
    return found
