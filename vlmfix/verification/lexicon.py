"""Closed word lists of English by which noun phrases are told apart, without a tagger.

Function words are listed in full. Of verbs, adjectives and abstract nouns, only those that captions use often are.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR_DETERMINERS = _words("a an one another each every")

PLURAL_DETERMINERS = _words(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen twenty several many few "
    "multiple numerous various both these those different"
)

POSSESSIVES = _words("my your his her its our their")

DETERMINERS = (
    SINGULAR_DETERMINERS
    | PLURAL_DETERMINERS
    | POSSESSIVES
    | _words("the this that some any no all most more other half enough either neither")
)

PREPOSITIONS = _words(
    "of in on at by with near from to into onto over under behind beside besides between among above below around "
    "across along against inside outside through throughout towards toward within without for about up down off out "
    "past beneath underneath atop during like next alongside amidst amid upon via despite except"
)

CONJUNCTIONS = _words("and or but nor yet so while as if because since although though whereas than plus")

RELATIVES = _words("which who whom whose that where when what how why")

PRONOUNS = _words(
    "i you he she it we they me him us them himself herself itself themselves others someone somebody something "
    "everything everyone anything nothing there here each none much"
)

BE = _words("is are was were be been being am")

AUXILIARIES = BE | _words(
    "has have had having do does did can could may might will would shall should must cannot can't isn't aren't "
    "doesn't don't it's there's"
)

ADVERBS = _words(
    "not also too very quite rather just only even still again nearby together apart away back forward further "
    "farther closer close far well else elsewhere maybe perhaps almost already always often sometimes never ever now "
    "then there here instead however therefore thus overall additionally moreover furthermore meanwhile likewise "
    "upside front alone ahead afar overhead around indoors outdoors once twice halfway"
)

_NOT_ADVERBS = _words("family fly butterfly jelly belly lily bully ally assembly dragonfly trolley italy ply curly")

PREDICATES = _words(
    "visible present available ready full likely able aware alone busy close evident apparent similar scattered "
    "noticeable prominent common clear"
)
"""Adjectives that stand behind the noun they describe."""

NEVER_NOUNS = _words(
    "take suggest appear seem create provide include contain indicate add give enjoy wear hold carry eat surround "
    "imply depict adorn occupy accompany emphasize enhance contribute come go get see sit lie consist belong remain "
    "allow make keep bring become prepare gather extend engage complement resemble protect explore navigate observe "
    "relax unfold roam overlook perform attempt feature interact await anticipate demonstrate execute admire happen"
)
"""Base forms of verbs that are nouns only behind a determiner."""

VERBS = NEVER_NOUNS | _words(
    "show capture display present reveal ride stand walk play look fill cover hang rest lean watch drink use stretch "
    "fly run jump swing hit throw catch share complete line place position wait drive cut serve pose smile graze swim "
    "surf ski skate sleep gaze face decorate highlight showcase hint offer set reach point pull push touch cross pass "
    "talk work read write cook try stay spread attach wrap join range vary need want help turn begin start continue "
    "move travel bite lick chase sell taste feed lay park perch balance kneel crouch climb approach lead follow spot "
    "notice find focus"
)
"""Base forms; a word that ends like one of their forms is a verb where a noun would fit as badly."""

ACTIVITIES = _words("dining parking living cutting washing swimming sleeping baking serving shopping skating")
"""Words in -ing that begin a compound noun and are none by themselves."""

COMPOUND_GERUNDS = ACTIVITIES | _words(
    "building ceiling clothing wedding railing painting evening morning string king ring wing thing spring sling "
    "awning landing crossing drawing icing topping frosting stuffing pudding wiring lighting seating"
)
"""Words in -ing that are nouns, or begin a compound noun."""

NO_PARTICIPLES = _words("bed red seed weed reed breed feed speed sled shed bobsled seabed bunkbed shred thread bread")
"""Words in -ed that are nouns."""

ADJECTIVES = _words(
    "big large small little tiny huge tall short long wide narrow old young new black white red blue green yellow "
    "orange brown gray grey pink purple beige tan silver golden dark light bright colorful wooden metal metallic "
    "stone brick concrete plastic leather open closed empty full fresh ripe delicious clean dirty wet dry sunny "
    "cloudy clear modern vintage beautiful pretty nice cute fluffy furry single main same round square rectangular "
    "glass busy lively different various red-and-white multicolored striped plaid floral public professional male "
    "female adult electric electronic digital polar medium medium-sized mid-sized bare raw casual natural neat "
    "popular unique social urban rural serene cozy warm cold cool calm peaceful playful vibrant festive lush "
    "grassy sandy snowy rocky dynamic inviting comfortable relaxed picturesque high low second third first "
    "pleasant prominent perfect typical diverse outdoor indoor ideal functional separate similar smaller larger higher "
    "lower upper formal curious expansive soft easy fake spent known grainy"
)
"""Those that may stand before a name without being a part of it."""

NO_HEADS = ADJECTIVES - _words("orange light glass stone brick metal plastic male female adult professional")
"""Adjectives that are no names either: "a little further away"."""

NAME_BEGINNINGS = _words(
    "potted stuffed traffic teddy baby toy city body party fly family luxury utility safety battery jewelry"
)
"""Words that look like adjectives and begin names."""

_ADJECTIVE_ENDINGS = ("ous", "ful", "ish", "ive", "ible", "able", "less", "ic")

_NO_ADJECTIVES = _words(
    "picnic music fabric traffic attic clinic ceramic mosaic topic mechanic vegetable turntable timetable starfish "
    "goldfish catfish radish archive motive"
)
"""Nouns that end like adjectives."""

MEASURES = _words(
    "pair group couple number variety bunch set row line lot lots slice slices piece pieces pairs groups rows bunches "
    "couples dozen dozens crowd herd flock pile piles stack stacks handful collection assortment array series range "
    "selection kind type sort part parts rest majority portion picture pictures photo photos image view close-up "
    "closeup total plenty color colour position size team school mixture"
)
"""Nouns before "of" that stand for what follows: the phrase names that."""

ABSTRACT = _words(
    "image picture photo photograph scene background foreground left right side sides center centre middle top bottom "
    "front back edge edges corner corners end part area areas space spaces setting settings environment atmosphere "
    "view distance way ways time times day moment focus group groups couple pair pairs number variety color colors "
    "colour colours size sizes shape sense touch addition total lot lots bit kind type types style styles position "
    "positions place places location locations direction directions detail details element elements object objects "
    "item items thing things activity activities presence overall mood feel feeling life line row lighting sunlight "
    "shadow shadows perspective angle action motion conversation conversations event experience process fact case "
    "reason purpose use interest attention subject subjects point role mix mixture combination arrangement "
    "composition impression appearance character ambiance depth display attire fun enjoyment sport sports game match "
    "glance look eye contrast surface surfaces surroundings weather season night morning afternoon evening viewer "
    "photographer observer level height length width vicinity care skill skills balance others one ones rest meantime "
    "order series set sets tone tones hint support gathering occasion charm beauty nature significance portion "
    "majority spot spots section sections layout design pattern patterns possibility concept theme sight spectacle "
    "pose manner form means result need needs today half instance example idea information stage proximity center- "
    "left center-right highlight least air shade habitat backdrop excitement essence energy progress talent turn "
    "break ride jump trick play shot thrill interaction movement behavior warmth session journey passion comfort "
    "contact elegance mode routine treat meal-time amount third task effort bond work such black white red blue wind "
    "breeze rain flight transportation traffic greenery company content camaraderie gesture stance leisure peace "
    "speed name hobby boundary catch course leap sip source bunch scheme unity swirl grace pace share safety tennis "
    "soccer mid-air challenge maneuver demeanor enthusiasm expertise age outcome force hustle bustle internet "
    "disrepair state era flavor effect harmony practice descent interval stunt flow access freedom"
)
"""Heads that name nothing that could be seen and be absent."""

_ABSTRACT_ENDINGS = ("ness", "ity", "tion", "sion", "ship", "ism", "ance", "ence", "hood", "ment", "ure")

_CONCRETE = _words(
    "television station ship fence ambulance appliance equipment monument instrument apartment pavement basement "
    "furniture picture sculpture cushion condiment ornament garment harness railing creature structure fixture"
)
"""Names of things that end like abstract nouns."""

PLACES = _words(
    "kitchen room bathroom bedroom office street road highway sidewalk city town village park field beach ocean sea "
    "lake river mountain mountains hill hillside slope forest woods yard garden farm zoo market store shop restaurant "
    "cafe bakery station airport stadium court arena sky ground floor world country countryside scenery landscape "
    "picnic hallway house home apartment building-site playground harbor bay pond desert meadow pasture track runway "
    "intersection crosswalk outdoors indoors area neighborhood downtown campus resort event party meal lunch dinner "
    "breakfast square safari"
)
"""Where a scene is set. A model that is asked whether there is a kitchen *in* the image is asked another question."""

_PLURALS = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "knives": "knife",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "leaves": "leaf",
    "loaves": "loaf",
    "shelves": "shelf",
    "wolves": "wolf",
    "calves": "calf",
    "halves": "half",
    "scarves": "scarf",
    "firemen": "fireman",
    "policemen": "policeman",
    "snowmen": "snowman",
    "buses": "bus",
    "lenses": "lens",
    "gases": "gas",
    "potatoes": "potato",
    "tomatoes": "tomato",
}

ONE_FORM = _words("sheep deer fish series species")
"""Words whose plural is their singular."""

ONLY_PLURAL = ONE_FORM | _words(
    "scissors skis glasses sunglasses goggles binoculars pants trousers jeans shorts tights clothes pajamas stairs "
    "headphones tongs pliers"
)
"""Words whose plural is asked for as it stands."""

_NO_PLURALS = _words("tennis lens gas news chess canvas atlas iris pancreas bus christmas plus always perhaps")


def is_plural(word: str) -> bool:
    """Whether a noun looks like a plural."""
    word = word.lower()
    if word in _PLURALS or word in ONLY_PLURAL:
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in _NO_PLURALS and len(word) > 3


def singular(word: str) -> str:
    """Return the singular of a noun: "buses" gives "bus"; one that has none, or is singular, as it stands."""
    lower = word.lower()
    if lower in _PLURALS:
        return _PLURALS[lower]
    if lower in ONLY_PLURAL or not is_plural(lower):
        return lower
    if lower.endswith("ies") and len(lower) > 4:
        return lower[:-3] + ("ie" if lower in ("cookies", "pies", "ties", "movies", "brownies", "zombies") else "y")
    if lower.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return lower[:-2]
    return lower[:-1]


def is_abstract(word: str) -> bool:
    """Whether a noun, as it stands or its singular, names nothing that could be seen and be absent."""
    one = singular(word)
    ends = one.endswith(_ABSTRACT_ENDINGS) and len(one) > 5 and one not in _CONCRETE
    return ends or word in ABSTRACT or one in ABSTRACT or one in PLACES


def is_adverb(word: str) -> bool:
    """Whether a word is listed as an adverb, or ends like one."""
    return word in ADVERBS or (word.endswith("ly") and word not in _NOT_ADVERBS and len(word) > 4)


def is_adjective(word: str) -> bool:
    """Whether a word is listed as an adjective, or ends like one."""
    return word in ADJECTIVES or (word.endswith(_ADJECTIVE_ENDINGS) and len(word) > 5 and word not in _NO_ADJECTIVES)


def is_gerund(word: str) -> bool:
    """Whether a word in -ing is a verb's form."""
    return word.endswith("ing") and len(word) > 4 and word not in COMPOUND_GERUNDS


def is_participle(word: str) -> bool:
    """Whether a word in -ed is a verb's form."""
    return word in _IRREGULAR_PARTICIPLES or (word.endswith("ed") and len(word) > 4 and word not in NO_PARTICIPLES)


_IRREGULAR_PARTICIPLES = _words("seen shown taken set held worn made built hung laid caught eaten driven spread cut")


def verb_of(word: str) -> str | None:
    """Return the base of a verb's third person ("holds" gives "hold") or of its base form, if it is a listed verb."""
    candidates = (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word))
    return next((each for each in candidates if each in VERBS), None)


def article(name: str) -> str:
    """Return "an" before a vowel letter, else "a"."""
    return "an" if name[:1].lower() in "aeiou" else "a"
