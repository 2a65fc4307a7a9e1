"""Sentence patterns of captions.

Placeholders: ``{place}`` a place with its article ("a kitchen"), ``{in_place}`` the same behind "in", "on" or "at",
``{objects}`` one to four noun phrases ("a red car and two dogs"), ``{first_be}`` "is" or "are" for the first of them,
``{be}`` and the verb endings ``{s}`` and ``{es}`` for all of them, ``{where}`` a place in the picture, ``{it}`` one
object that was named before ("the car"), ``{other}`` a second one. No
pattern contains a word that CHAIR counts as an object.
"""

from __future__ import annotations

__all__ = [
    "BRIEF",
    "CLOSINGS",
    "COLOUR",
    "COUNT",
    "MORE",
    "OPENINGS",
    "PLACE",
    "PLACED",
    "RELATION",
    "SIZE",
    "UNUSUAL",
    "all_patterns",
]

OPENINGS: tuple[str, ...] = (
    "The image shows {place} with {objects}.",
    "The image depicts {place} with {objects}.",
    "The image features {place} with {objects}.",
    "This image shows {place} with {objects}.",
    "This is a picture of {place} with {objects}.",
    "This is an image of {place} where {objects} can be seen.",
    "The picture shows {place} with {objects}.",
    "The picture was taken {in_place} and shows {objects}.",
    "The scene is set {in_place} with {objects}.",
    "The scene shows {place} that has {objects} in it.",
    "The photo shows {objects} {in_place}.",
    "The photo captures {place} with {objects}.",
    "In this image, {objects} {be} seen {in_place}.",
    "In this picture, there {first_be} {objects} {in_place}.",
    "In the image, we can see {place} with {objects}.",
    "We can see {objects} in what looks like {place}.",
    "Here we see {place} with {objects}.",
    "Here is {place} with {objects}.",
    "It is {place}, and there {first_be} {objects} in the picture.",
    "This looks like {place} with {objects}.",
    "There {first_be} {objects} {in_place}.",
    "The view is of {place}, with {objects} in it.",
    "This appears to be {place}, since it has {objects}.",
    "A view of {place} with {objects} fills the picture.",
    "The setting is {place}, where {objects} stand{s} out.",
    "The image presents {place} containing {objects}.",
    "What stands out in this image of {place} {first_be} {objects}.",
    "At first glance, this is {place} with {objects}.",
    "The image is a colorful view of {place} with {objects}.",
    "The image gives a look at {place}, with {objects} in view.",
    "This picture captures a moment {in_place} with {objects}.",
    "The picture focuses on {objects} {in_place}.",
    "What we see here is {place} with {objects}.",
    "The image was taken {in_place}, where {objects} can be seen.",
    "Judging by {objects}, the picture was taken {in_place}.",
    "{objects} can be seen {in_place} in this image.",
)
"""First sentences: the place and one to three objects."""

BRIEF: tuple[str, ...] = (
    "{objects} {in_place}.",
    "A view of {place} with {objects}.",
    "An image of {place} with {objects}.",
    "A picture of {objects} {in_place}.",
    "A colorful scene of {place} with {objects}.",
    "{objects} can be seen {in_place}.",
    "A simple picture of {place} that has {objects}.",
    "There {first_be} {objects} in this picture of {place}.",
)
"""One-sentence captions, beside :data:`OPENINGS`."""

MORE: tuple[str, ...] = (
    "There {first_be} {objects}.",
    "There {first_be} also {objects}.",
    "There {first_be} {objects} as well.",
    "There {first_be} {objects} nearby.",
    "There {first_be} {objects} in the scene.",
    "There {first_be} {objects} in the picture too.",
    "Nearby, there {first_be} {objects}.",
    "Next to that, there {first_be} {objects}.",
    "Close by, there {first_be} {objects}.",
    "Elsewhere, there {first_be} {objects}.",
    "In addition, there {first_be} {objects}.",
    "Besides that, there {first_be} {objects}.",
    "In the background, there {first_be} {objects}.",
    "In the foreground, there {first_be} {objects}.",
    "Around them, there {first_be} {objects}.",
    "Not far away, there {first_be} {objects}.",
    "Finally, there {first_be} {objects}.",
    "{objects} can be seen.",
    "{objects} can be seen nearby.",
    "{objects} can also be seen.",
    "{objects} can be seen in the background.",
    "{objects} can be spotted in the scene.",
    "{objects} {be} visible.",
    "{objects} {be} visible too.",
    "{objects} {be} also visible in the scene.",
    "{objects} {be} also present.",
    "{objects} {be} in view as well.",
    "{objects} {be} close by.",
    "{objects} {be} part of the scene.",
    "{objects} {be} also in the picture.",
    "{objects} {be} shown as well.",
    "{objects} {be} placed nearby.",
    "{objects} {be} not far away.",
    "{objects} {be} among the things shown.",
    "{objects} complete{s} the scene.",
    "{objects} appear{s} in the picture as well.",
    "{objects} add{s} to the scene.",
    "The scene also includes {objects}.",
    "The scene also features {objects}.",
    "The scene also contains {objects}.",
    "The image also shows {objects}.",
    "The image also includes {objects}.",
    "The image also features {objects}.",
    "The picture also shows {objects}.",
    "The picture also contains {objects}.",
    "Also visible {first_be} {objects}.",
    "Also present {first_be} {objects}.",
    "Also in the picture {first_be} {objects}.",
    "Other things in view include {objects}.",
    "Other objects include {objects}.",
    "Other details include {objects}.",
    "We can also see {objects}.",
    "We can see {objects} too.",
    "You can also see {objects}.",
    "One can also notice {objects}.",
    "A closer look reveals {objects}.",
    "Looking closer, there {first_be} {objects}.",
    "The viewer can also spot {objects}.",
    "Along with them, there {first_be} {objects}.",
    "They are joined by {objects}.",
    "Somewhere in between, there {first_be} {objects}.",
    "The picture would not be complete without {objects}.",
    "Here and there, one can see {objects}.",
    "A little further away, there {first_be} {objects}.",
    "{objects} catch{es} the eye as well.",
    "It is hard to miss {objects}.",
    "They share the space with {objects}.",
    "The rest of the picture is taken up by {objects}.",
    "To complete the picture, there {first_be} {objects}.",
    "Scattered around {first_be} {objects}.",
    "Near them {first_be} {objects}.",
    "Another part of the image shows {objects}.",
    "Also worth noting {first_be} {objects}.",
)
"""Later sentences that name further objects."""

PLACED: tuple[str, ...] = (
    "There {first_be} {objects} {where}.",
    "{where}, there {first_be} {objects}.",
    "{objects} {be} {where}.",
    "{objects} can be seen {where}.",
    "{objects} {be} visible {where}.",
    "{objects} {be} located {where}.",
    "We can see {objects} {where}.",
    "You can see {objects} {where}.",
    "The image also shows {objects} {where}.",
    "The picture has {objects} {where}.",
    "Also visible {first_be} {objects} {where}.",
    "{where}, we can see {objects}.",
    "{where}, one can spot {objects}.",
    "{objects} stand{s} out {where}.",
    "{objects} {be} shown {where}.",
    "Then there {first_be} {objects} {where}.",
)
"""Later sentences that name one more object together with its place in the picture."""

UNUSUAL: tuple[str, ...] = (
    "Surprisingly, there {first_be} {objects} here.",
    "Surprisingly, {objects} can be seen as well.",
    "Unusually for such a place, there {first_be} {objects}.",
    "What one would not expect {in_place} {first_be} {objects}.",
    "Somewhat out of place, there {first_be} {objects}.",
    "Oddly, the picture also shows {objects}.",
)
"""Sentences that name what does not usually stand in such a place."""

COLOUR: tuple[str, ...] = (
    "{it} is {colour}.",
    "{it} is mostly {colour}.",
    "{it} is {colour} in color.",
    "{it} has a {colour} color.",
    "{it} looks {colour}.",
    "{it} appears to be {colour}.",
    "{it} stands out because it is {colour}.",
    "The color of {it} is {colour}.",
    "We can tell that {it} is {colour}.",
    "{it}, which is {colour}, is easy to spot.",
    "{it} has a {colour} look.",
)
"""The colour of one object."""

PLACE: tuple[str, ...] = (
    "{it} is {where}.",
    "{it} is located {where}.",
    "{it} can be found {where}.",
    "{it} is placed {where}.",
    "{it} is positioned {where}.",
    "{it} is situated {where}.",
    "{it} appears {where}.",
    "{it} is visible {where}.",
    "{it} is seen {where}.",
    "{it} sits {where}.",
    "{it} takes its place {where}.",
    "You can find {it} {where}.",
    "We can see {it} {where}.",
    "{where}, one finds {it}.",
    "{where}, we see {it}.",
)
"""Where one object is."""

SIZE: tuple[str, ...] = (
    "{it} is {size}.",
    "{it} looks {size}.",
    "{it} appears {size}.",
    "{it} is quite {size}.",
    "{it} is rather {size} in the picture.",
    "{it} is {size} compared to the rest.",
    "{it} seems {size} here.",
    "Compared with the other things, {it} is {size}.",
    "In this view, {it} is {size}.",
)
"""The size of one object."""

COUNT: tuple[str, ...] = (
    "There are {count} {plural} in total.",
    "In total, there are {count} {plural}.",
    "One can count {count} {plural}.",
    "We can count {count} {plural} in the image.",
    "The number of {plural} is {count}.",
    "Altogether, {count} {plural} are visible.",
    "Exactly {count} {plural} are shown.",
    "The picture has {count} {plural} in it.",
    "Each of the {count} {plural} is easy to see.",
)
"""How many of one object there are."""

RELATION: tuple[str, ...] = (
    "{it} is {relation} {other}.",
    "{it} is located {relation} {other}.",
    "{it} can be seen {relation} {other}.",
    "{it} is placed {relation} {other}.",
    "{it} appears {relation} {other}.",
    "{it} is positioned {relation} {other}.",
    "{it} is somewhere {relation} {other}.",
    "{relation} {other}, one can spot {it}.",
    "{relation} {other}, we can see {it}.",
)
"""Where one object is, seen from another one."""

CLOSINGS: tuple[str, ...] = (
    "The background is soft and colorful.",
    "The background is made of soft colors.",
    "The overall mood is calm.",
    "The overall mood of the scene is pleasant.",
    "The scene looks lively.",
    "The scene feels calm and peaceful.",
    "The scene gives a sense of everyday life.",
    "The atmosphere is relaxed.",
    "The atmosphere is cheerful and bright.",
    "Overall, the image is colorful and lively.",
    "Overall, it is a typical view of {place}.",
    "Overall, the scene looks like an ordinary day {in_place}.",
    "Overall, the picture gives a good impression of {place}.",
    "The arrangement makes the scene easy to recognize.",
    "The objects are spread across the picture.",
    "The objects are arranged loosely around the scene.",
    "The picture is a little grainy, but the objects are easy to recognize.",
    "The colors make the picture look playful.",
    "Each object has its own place in the scene.",
    "There is a lot to look at in this small picture.",
    "Everything suggests that this is {place}.",
    "It is what one would expect to see {in_place}.",
    "The picture has a playful style.",
    "The lighting is even and soft.",
    "The image has a simple composition.",
    "The composition draws attention to the objects.",
    "The various objects make the scene interesting.",
    "It looks like a place where many things happen at once.",
    "The mixture of objects makes for a lively picture.",
    "The scene is simple but full of detail.",
)
"""Last sentences of long captions; they name no object."""


def all_patterns() -> tuple[str, ...]:
    """Every pattern."""
    return OPENINGS + BRIEF + MORE + PLACED + UNUSUAL + COLOUR + PLACE + SIZE + COUNT + RELATION + CLOSINGS
