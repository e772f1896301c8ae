"""Text from outside the small world: code, chat slang, other subjects, other languages, noise.

The models are to say honestly that such text is unfamiliar. Breadth matters more than sense,
because what has to generalise is "these are not the words I know".
"""

from __future__ import annotations

import random

from lexicon import NAMES, words

DOMAINS = {
    "law": words(
        "court judge lawyer verdict appeal witness statute contract plaintiff jury sentence crime "
        "evidence trial testimony lawsuit defendant prison guilty attorney"
    ),
    "physics": words(
        "electron photon quantum energy particle gravity entropy orbit laser neutron magnetic "
        "velocity radiation nucleus plasma voltage spectrum relativity momentum isotope"
    ),
    "religion": words(
        "prophet temple monk scripture saint pilgrim prayer bishop sermon shrine miracle gospel "
        "cathedral priest sacred blessing ritual faith chapel theology"
    ),
    "computing": words(
        "compiler server database kernel thread socket pointer router firmware encryption browser "
        "cache cluster packet latency algorithm password backup registry processor"
    ),
    "war": words(
        "soldier army battalion cannon siege invasion trench bomber fortress regiment navy missile "
        "retreat ambush general infantry cavalry surrender weapon squadron"
    ),
    "philosophy": words(
        "truth knowledge ethics reason virtue logic consciousness freedom metaphysics paradox "
        "argument essence existence meaning belief doubt morality causality intuition mind"
    ),
    "chemistry": words(
        "acid molecule enzyme catalyst solvent polymer carbon nitrogen reaction compound crystal "
        "sodium titration protein oxide alkaline beaker residue hydrogen membrane"
    ),
    "space": words(
        "galaxy comet planet asteroid astronaut telescope satellite rocket nebula crater lunar "
        "eclipse meteor cosmic supernova orbiting spacecraft solar probe horizon"
    ),
    "trade": words(
        "shareholder merger inflation tariff export invoice dividend supplier warehouse auction "
        "bankruptcy commodity franchise logistics portfolio regulator startup quarterly margin tax"
    ),
}
HELD_OUT_DOMAINS = {
    "politics": words(
        "parliament election senator minister campaign voters coalition policy republic embassy "
        "referendum mayor constitution diplomat congress amendment opposition ballot reform union"
    ),
    "sea": words(
        "sailor anchor reef whale lighthouse shipwreck submarine pirate coral lagoon seaweed "
        "captaincy voyage compass tide sail mast dolphin octopus current"
    ),
}
VERBS = words(
    "revealed rejected produced ignored threatened described collapsed absorbed influenced "
    "represents defines contains required destroyed discovered increased predicted opposed "
    "emitted confirmed accepted transformed violates determines"
)
ADJECTIVES = words(
    "unstable federal ancient complex global severe invisible formal moral industrial infinite "
    "molecular military digital sacred economic remote abstract hostile legal"
)
LINKS = words("of for under against between within despite through during because although while")
PROSE = (
    "The {n} {v} the {n} {l} the {a} {n}.",
    "{A} {n} {v} {l} {n} and {n}.",
    "No {n} can be {v} without {a} {n}.",
    "Although the {n} was {a}, its {n} {v} every {n}.",
    "A {a} {n} {l} {n} {v} the {n} in nineteen years.",
    "Many {n}s have {v} this {n}, yet the {n} {v} it.",
    "In general, {a} {n} {v} a {n} {l} the {n}.",
)
IDENTIFIERS = words(
    "x y z n i j k data items total value result count index key node self args name config buf "
    "foo bar tmp line user path size left right acc func item rows url err"
)
CODE = (
    "def {i}({i}, {i}):\n    return {i} {o} {i}",
    "for {i} in range({d}):\n    {i} {o}= {i}[{i}]",
    "if ({i} {o} {d}) {{ return {i}; }}",
    "{i} = {i}.{i}({d}, {i})",
    "const {i} = ({i}) => {i}.{i}({i});",
    "print({i}[{d}:{d}], {i}={d})",
    "import {i}\nfrom {i} import {i}",
    "while {i} {o} {d}: {i} = {i}({i})",
    '<div class="{i}"><p>{i}</p></div>',
    '{{"{i}": {d}, "{i}": [{d}, {d}]}}',
    "class {I}:\n    {i}: int = {d}",
    "int {i} = {d}; {i}->{i} += {i};",
    "lambda {i}: {i}({i}) {o} {d}",
)
HELD_OUT_CODE = (
    "SELECT {i}, {i} FROM {i} WHERE {i} = {d};",
    "#include <{i}.h>\nvoid {i}(char *{i});",
    "fn {i}({i}: u{d}) -> {i} {{ {i} }}",
    "$ git {i} --{i} {d} | grep {i}",
)
SLANG = words(
    "lmao omg wtf idk tbh ngl gonna wanna yeah nah yo dude bro sup k thx u r ur smh imo rn fr "
    "cuz hmm ugh yep nope gg afk ttyl ikr bruh lit vibe chill lolz np jk tmrw gr8 2nite xoxo"
)
FOREIGN = {
    "es": words("el la los casa perro está muy bien pero mañana vamos nosotros quiero agua donde"),
    "de": words("der die das und nicht ich bin heute sehr schön wir haben keine Zeit morgen gut"),
    "fr": words("le les une est pas je suis très bien avec nous avons demain maison où chien"),
    "it": words("il gli una sono non molto bene domani abbiamo casa cane dove perché quando oggi"),
}
HELD_OUT_FOREIGN = words("minä sinä hän talo koira hyvää huomenta kiitos tänään missä olen kaunis")
SYLLABLES = words(
    "ba ke li mo nu ra se ti vo zu blan cro dri fle gra kno pla squ tre wha ing ton ment ous ish "
    "er al ant ique phy eth ov ux jab quo"
)


def document(rng: random.Random) -> str:
    """Returns one unfamiliar text of a kind that training sees."""
    kind = rng.choices(
        (_prose, _code, _slang, _foreign, _syllables, _noise, _shouting),
        weights=(40, 18, 12, 8, 8, 8, 6),
    )[0]
    return kind(rng)


def held_out_document(rng: random.Random) -> str:
    """Returns one unfamiliar text of a kind that training never sees, for testing."""
    kind = rng.choice(("politics", "sea", "code", "foreign", "list"))
    if kind in HELD_OUT_DOMAINS:
        return " ".join(_sentence(rng, HELD_OUT_DOMAINS[kind]) for _ in range(2))
    if kind == "code":
        return _fill_code(rng, rng.choice(HELD_OUT_CODE))
    if kind == "foreign":
        return " ".join(rng.choices(HELD_OUT_FOREIGN, k=rng.randint(4, 9)))
    return "\n".join(f"- {_pseudo_word(rng)} {rng.randint(0, 99)}%" for _ in range(3))


def pseudo_word(rng: random.Random) -> str:
    """Returns an invented word such as a rare name or a typing error would give."""
    return _pseudo_word(rng)


def _sentence(rng: random.Random, nouns: list[str]) -> str:
    text = rng.choice(PROSE)
    while "{" in text:
        slot = text[text.index("{") : text.index("}") + 1]
        pool = {"{n}": nouns, "{v}": VERBS, "{l}": LINKS}.get(slot, ADJECTIVES)
        word = rng.choice(pool)
        text = text.replace(slot, word.capitalize() if slot == "{A}" else word, 1)
    return text


def _prose(rng: random.Random) -> str:
    nouns = list(DOMAINS[rng.choice(list(DOMAINS))])
    if rng.random() < 0.5:
        nouns += [_pseudo_word(rng) for _ in range(12)]
    if rng.random() < 0.15:
        nouns += rng.sample(NAMES, 6)
    return " ".join(_sentence(rng, nouns) for _ in range(rng.randint(1, 2)))


def _fill_code(rng: random.Random, text: str) -> str:
    text = text.replace("{{", "\0").replace("}}", "\1")
    fills = {
        "{i}": lambda: rng.choice(IDENTIFIERS),
        "{I}": lambda: rng.choice(IDENTIFIERS).capitalize(),
        "{d}": lambda: str(rng.randint(0, 99)),
        "{o}": lambda: rng.choice("+-*/<>%&|"),
    }
    for slot, fill in fills.items():
        while slot in text:
            text = text.replace(slot, fill(), 1)
    return text.replace("\0", "{").replace("\1", "}")


def _code(rng: random.Random) -> str:
    return "\n".join(_fill_code(rng, rng.choice(CODE)) for _ in range(rng.randint(1, 2)))


def _slang(rng: random.Random) -> str:
    end = rng.choice(("", "", "!!", "?", " :)", "..."))
    return " ".join(rng.choices([*SLANG, "ok", "so", "the"], k=rng.randint(3, 10))) + end


def _foreign(rng: random.Random) -> str:
    pool = FOREIGN[rng.choice(list(FOREIGN))]
    return " ".join(rng.choices(pool, k=rng.randint(4, 10))) + rng.choice((".", "", "!"))


def _pseudo_word(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))


def _syllables(rng: random.Random) -> str:
    return " ".join(_pseudo_word(rng) for _ in range(rng.randint(3, 8)))


def _noise(rng: random.Random) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789!@#$%^&*()[]{}<>/?;:,. "
    return "".join(rng.choices(alphabet, k=rng.randint(8, 30))).strip() or "#"


def _shouting(rng: random.Random) -> str:
    return _prose(rng).upper()
