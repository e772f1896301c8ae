"""The words of the small world: names, places, and the word groups of each topic."""

from __future__ import annotations


def words(text: str) -> list[str]:
    """Splits a line of words into a list, so that long word lists stay readable."""
    return text.split()


GIRLS = words(
    "Emma Olivia Sophia Mia Clara Nora Alice Julia Hannah Maria Lena Greta Rosa Ella Ruth Amina "
    "Yuki Priya Leila Ingrid Zoe Irene Carmen Fatima Helen"
)
BOYS = words(
    "Liam Noah Oscar Hugo Felix Leo Max Daniel Peter Thomas Ivan Omar Kenji Ravi Samuel Victor "
    "Anton Bruno Carlos David Erik George Jonas Marco Simon"
)
NAMES = GIRLS + BOYS

PLACES = words(
    "Oslo Paris London Tokyo Berlin Madrid Rome Vienna Prague Lisbon Dublin Cairo Nairobi Lima "
    "Boston Chicago Toronto Sydney Delhi Mumbai Seoul Athens Warsaw Helsinki Zurich Geneva Milan "
    "Havana Bergen Naples"
)

SHARED = {
    "adj": words("small big old new heavy cheap red green blue yellow long short bright dark"),
    "tone": words("quiet busy strange lovely terrible wonderful"),
    "mood": words("happy tired proud nervous calm hungry angry glad surprised bored"),
    "time": words("morning evening afternoon night weekend"),
    "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "number": words("two three four five six seven eight ten twelve twenty"),
    "kin": words("sister brother mother father uncle aunt cousin neighbour friend daughter son"),
    "room": words("kitchen garden garage hall office bedroom"),
}

GROUPS = {
    "cooking": {
        "food": words(
            "garlic onions rice butter cheese tomatoes carrots beans flour honey mushrooms fish"
        ),
        "dish": words("soup stew pie salad curry cake bread omelette"),
        "cookware": words("pan pot oven bowl knife spoon"),
        "cooked": words("chopped boiled fried baked stirred grilled"),
    },
    "weather": {
        "sky": words("rain snow fog wind thunder sunshine hail frost"),
        "wear": words("coat umbrella scarf hat jacket raincoat"),
        "warmth": words("cold warm wet dry windy cloudy sunny icy"),
    },
    "sport": {
        "game": words("football tennis hockey cricket basketball chess golf rugby"),
        "team": words("goalkeeper captain coach referee striker team"),
        "played": words("won lost scored trained missed kicked"),
        "prize": words("cup medal trophy title"),
    },
    "travel": {
        "vehicle": words("train bus ferry plane taxi boat tram"),
        "baggage": words("suitcase ticket passport backpack map camera"),
        "stop": words("station airport harbour hotel museum castle beach"),
        "went": words("travelled arrived departed landed returned wandered"),
    },
    "medicine": {
        "carer": words("doctor nurse dentist surgeon patient"),
        "illness": words("fever cough headache cold infection rash"),
        "cure": words("pills medicine bandage vaccine syrup rest"),
        "body": words("arm leg throat knee stomach back"),
    },
    "music": {
        "instrument": words("piano violin guitar cello flute drum trumpet harp"),
        "tune": words("song melody waltz concert tune hymn"),
        "musician": words("singer drummer pianist choir orchestra conductor"),
        "sounded": words("played sang practised composed hummed recorded"),
    },
    "animals": {
        "animal": words("dog cat horse rabbit parrot goat owl turtle elephant fox"),
        "acted": words("slept barked jumped hid climbed chased"),
        "den": words("cage barn nest stable kennel pond"),
    },
    "school": {
        "teacher": words("teacher pupil student professor headmaster"),
        "subject": words("maths history geography biology spelling grammar"),
        "paper": words("essay report exam textbook pencil notebook"),
        "learned": words("studied learned wrote read explained forgot"),
    },
    "money": {
        "bank": words("bank cashier lender broker accountant"),
        "cash": words("coins savings loan rent salary debt interest"),
        "paid": words("paid borrowed saved spent earned owed"),
    },
    "gardening": {
        "plant": words("roses tulips lettuce apples pumpkins herbs daisies ivy"),
        "gardentool": words("spade rake hose shovel wheelbarrow"),
        "grew": words("planted watered pruned picked dug weeded"),
    },
    "film": {
        "filmrole": words("actor director actress villain hero audience"),
        "film": words("comedy thriller cartoon drama western sequel"),
        "filmed": words("watched filmed acted laughed cried applauded"),
        "cinema": words("cinema screen camera stage scene"),
    },
    "building": {
        "builder": words("carpenter plumber painter builder electrician"),
        "part": words("roof wall door window floor stairs chimney"),
        "kit": words("hammer drill ladder saw brush wrench"),
        "built": words("repaired painted built measured nailed polished"),
    },
}
TOPICS = list(GROUPS)

QUESTION_STARTS = ("Why", "How", "Where", "Do", "Who", "What", "Can", "Would")
NOTE_WORDS = ("hey", "i", "btw", "pls", "haha", "thanks")
VERB_GROUPS = frozenset(
    words("cooked warmth played went body sounded acted learned paid grew filmed built sky cash")
)

# What a reader would call a word of the group; used to say what kind of word comes next.
GROUP_LABELS = {
    "adj": "a describing word",
    "tone": "how it was",
    "mood": "a feeling",
    "time": "a time of day",
    "day": "a day of the week",
    "number": "a number",
    "kin": "a relative",
    "room": "a room",
    "name": "a name",
    "place": "a place",
    "food": "a food",
    "dish": "a dish",
    "cookware": "a kitchen tool",
    "cooked": "a cooking verb",
    "sky": "a kind of weather",
    "wear": "something to wear",
    "warmth": "how warm or wet it is",
    "game": "a sport",
    "team": "a player",
    "played": "a sporting verb",
    "prize": "a prize",
    "vehicle": "a vehicle",
    "baggage": "a piece of luggage",
    "stop": "a stop on the way",
    "went": "a travel verb",
    "carer": "a medical person",
    "illness": "an illness",
    "cure": "a cure",
    "body": "a part of the body",
    "instrument": "an instrument",
    "tune": "a piece of music",
    "musician": "a musician",
    "sounded": "a musical verb",
    "animal": "an animal",
    "acted": "an animal's action",
    "den": "an animal's home",
    "teacher": "someone at school",
    "subject": "a school subject",
    "paper": "a school thing",
    "learned": "a learning verb",
    "bank": "a money person",
    "cash": "a kind of money",
    "paid": "a money verb",
    "plant": "a plant",
    "gardentool": "a garden tool",
    "grew": "a gardening verb",
    "filmrole": "a film role",
    "film": "a kind of film",
    "filmed": "a viewer's action",
    "cinema": "a part of the cinema",
    "builder": "a builder",
    "part": "a part of the house",
    "kit": "a builder's tool",
    "built": "a building verb",
}
