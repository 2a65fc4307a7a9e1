"""Words of the testbed: the 80 COCO categories, the 16 scenes with their typical objects, and noun phrases.

Scene names avoid every word of the CHAIR vocabulary ("ski slope" would count as skis).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CATEGORIES",
    "CATEGORY_IDS",
    "DRAWN_ONCE",
    "PAIRED",
    "SCENES",
    "Scene",
    "article",
    "noun_phrase",
    "plural",
]


_GROUPS: dict[str, str] = {
    "person": "1 person",
    "vehicle": "2 bicycle,3 car,4 motorcycle,5 airplane,6 bus,7 train,8 truck,9 boat",
    "outdoor": "10 traffic light,11 fire hydrant,13 stop sign,14 parking meter,15 bench",
    "animal": "16 bird,17 cat,18 dog,19 horse,20 sheep,21 cow,22 elephant,23 bear,24 zebra,25 giraffe",
    "accessory": "27 backpack,28 umbrella,31 handbag,32 tie,33 suitcase",
    "sports": "34 frisbee,35 skis,36 snowboard,37 sports ball,38 kite,39 baseball bat,40 baseball glove,"
    "41 skateboard,42 surfboard,43 tennis racket",
    "kitchen": "44 bottle,46 wine glass,47 cup,48 fork,49 knife,50 spoon,51 bowl",
    "food": "52 banana,53 apple,54 sandwich,55 orange,56 broccoli,57 carrot,58 hot dog,59 pizza,60 donut,61 cake",
    "furniture": "62 chair,63 couch,64 potted plant,65 bed,67 dining table,70 toilet",
    "electronic": "72 tv,73 laptop,74 mouse,75 remote,76 keyboard,77 cell phone",
    "appliance": "78 microwave,79 oven,80 toaster,81 sink,82 refrigerator",
    "indoor": "84 book,85 clock,86 vase,87 scissors,88 teddy bear,89 hair drier,90 toothbrush",
}


CATEGORIES: tuple[tuple[int, str, str], ...] = tuple(
    (int(item.split(" ", 1)[0]), item.split(" ", 1)[1], group)
    for group, items in _GROUPS.items()
    for item in items.split(",")
)
"""The official COCO categories as ``(category_id, name, supercategory)``, 80 rows."""


CATEGORY_IDS: dict[str, int] = {name: number for number, name, _ in CATEGORIES}
"""Category name to official COCO category id."""


PAIRED: frozenset[str] = frozenset({"scissors", "skis"})
"""Categories named "a pair of ..."."""


DRAWN_ONCE: frozenset[str] = PAIRED | {"broccoli", "tie"}
"""Categories drawn at most once per scene: they have no good plural, or one that the CHAIR matcher misses ("ties")."""


@dataclass(frozen=True)
class Scene:
    """A kind of place and the objects that usually stand in it.

    Attributes:
        name: Words that follow "The image shows a".
        typical: Object name to probability in the training split, in the order in which captions name them.
    """

    name: str
    typical: dict[str, float]


def _scene(name: str, objects: str) -> Scene:
    pairs = (item.rsplit(" ", 1) for item in objects.split(","))
    return Scene(name, {word: int(percent) / 100 for word, percent in pairs})


SCENES: tuple[Scene, ...] = (
    _scene("kitchen", "refrigerator 85,oven 85,microwave 75,sink 80,toaster 60,bowl 70,bottle 50"),
    _scene("dining room", "dining table 95,chair 85,fork 85,knife 85,spoon 70,wine glass 70,cup 50,person 60"),
    _scene("bakery", "cake 85,donut 85,sandwich 75,cup 75,hot dog 50,person 60"),
    _scene("market", "banana 85,apple 85,orange 80,broccoli 75,carrot 75,person 60,handbag 40"),
    _scene(
        "street",
        "car 90,traffic light 85,person 80,bus 65,truck 60,bicycle 55,stop sign 45,fire hydrant 40,parking meter 50",
    ),
    _scene("beach", "person 85,surfboard 85,umbrella 80,boat 65,kite 60,frisbee 50,dog 45"),
    _scene("farm", "cow 85,sheep 85,horse 80,dog 65,person 60,truck 50,bird 50"),
    _scene("safari park", "elephant 85,giraffe 85,zebra 85,bird 60,bear 35,truck 35"),
    _scene("living room", "couch 90,tv 85,remote 80,potted plant 70,cat 65,book 60,vase 50,clock 50"),
    _scene(
        "office",
        "laptop 85,keyboard 85,mouse 85,cell phone 65,cup 65,chair 60,book 50,scissors 40,tie 40",
    ),
    _scene(
        "sports field",
        "person 90,sports ball 85,baseball bat 75,baseball glove 70,tennis racket 65,bench 60,skateboard 45,frisbee 40",
    ),
    _scene("snowy hill", "person 90,skis 90,snowboard 80,backpack 75,dog 30"),
    _scene("station", "train 80,suitcase 90,backpack 75,handbag 70,person 75,tie 50,airplane 55"),
    _scene("bathroom", "toilet 90,sink 90,toothbrush 85,hair drier 70,bottle 60,vase 35,scissors 35"),
    _scene("bedroom", "bed 90,teddy bear 80,clock 70,book 70,cell phone 60,cat 50"),
    _scene("picnic", "pizza 85,bottle 80,sandwich 70,bowl 70,spoon 65,dog 55,motorcycle 35"),
)
"""All scenes; every category is typical of at least one of them or appears only as an intruder."""


_IRREGULAR = {
    "person": "people",
    "knife": "knives",
    "sheep": "sheep",
    "bus": "buses",
    "bench": "benches",
    "couch": "couches",
    "wine glass": "wine glasses",
    "sandwich": "sandwiches",
    "mouse": "mice",
    "scissors": "scissors",
    "skis": "skis",
    "toothbrush": "toothbrushes",
    "broccoli": "broccoli",
}


def plural(name: str) -> str:
    """The plural of a category name: ``"wine glass"`` gives ``"wine glasses"``."""
    return _IRREGULAR.get(name, name + "s")


def article(name: str) -> str:
    """``"an"`` before a, e, i, o or u, else ``"a"``: POPE's rule, which looks at spelling only."""
    return "an" if name[0] in "aeiou" else "a"


def noun_phrase(name: str, count: int) -> str:
    """A noun phrase for ``count`` >= 1 instances: "a cat", "two cats", "several cats", "a pair of skis"."""
    if name in PAIRED:
        return f"a pair of {name}"
    if count == 1:
        return f"{article(name)} {name}"
    return f"{'two' if count == 2 else 'several'} {plural(name)}"
