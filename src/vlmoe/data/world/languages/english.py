from vlmoe.data.world.languages.base import CATEGORIES, DIGIT_WORDS, Language

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple", "pink", "brown", "turquoise", "grey")


def _article(following: str, case: str = "nom", digit: bool = False) -> str:
    return "an" if following[0] in "aeiou" else "a"


ENGLISH = Language(
    code="en",
    noun={"digit": "digit", "character": "", "icon": ""},
    colours={colour: colour for colour in COLOURS},
    sizes={"small": "small", "large": "large"},
    places={
        "top left": "at the top left",
        "top centre": "at the top centre",
        "top right": "at the top right",
        "middle left": "at the middle left",
        "centre": "in the centre",
        "middle right": "at the middle right",
        "bottom left": "at the bottom left",
        "bottom centre": "at the bottom centre",
        "bottom right": "at the bottom right",
    },
    relations={"left of": "left of", "right of": "right of", "above": "above", "below": "below"},
    backgrounds={name: name for name in ("white", "black", "beige", "dark blue", "light blue")},
    digits=DIGIT_WORDS,
    counts={count: count for count in ("one", "two", "three", "four")},
    scripts={name: name for name in ("latin", "greek", "cyrillic", "armenian", "georgian")},
    categories={code: f"{_article(words)} {words}" for code, words in CATEGORIES.items()},
    objects=("{article} {size} {colour} {name}", "{article} {colour} {name}"),
    one=(
        "{o1} {place1}",
        "there is {o1} {place1}",
        "{place1}, {o1}",
        "one object: {o1} {place1}",
        "{name1}, {size1:pred} and {colour1:pred}, {place1}",
        "{o1} {place1} on a {background} background",
        "{background} background, {o1} {place1}",
    ),
    two=(
        "{o1} {place1} and {o2} {place2}",
        "there is {o1} {place1} and {o2} {place2}",
        "{place1} {o1}, {place2} {o2}",
        "two objects: {o1} {place1}, {o2} {place2}",
        "{o1} is {relation} {o2}",
        "{o1} {place1}, {relation} {o2}",
        "{name1}, {size1:pred} and {colour1:pred}, {relation} {o2}",
        "{background} background, {o1} {relation} {o2}",
    ),
    many=(
        "{count} objects, among them {o1} {place1} and {o2} {place2}",
        "there are {count} objects, {o1} is {relation} {o2}",
        "{count} objects on a {background} background, {o1} is {place1}",
        "{o1} {place1}, {relation} {o2}",
    ),
    facts={
        "code": ("the code point of {name} is {code}", "{name} has the code point {code}"),
        "character": ("{character} is {name}", "{name} is written {character}"),
        "script": ("{name} belongs to the {script} script", "the script of {name} is {script}"),
        "category": ("{name} is {category}", "in Unicode {name} is {category}"),
        "value": ("the numeric value of {name} is {value}", "{name} has the value {value}"),
        "lower": ("the lowercase form of {name} is {name2}", "in lower case {name} becomes {name2}"),
        "upper": ("the uppercase form of {name} is {name2}", "in upper case {name} becomes {name2}"),
        "parts": ("{name} decomposes into {name2} and {name3}", "{name2} and {name3} compose {name}"),
        "glyph": ("in {face} the code point of {name} is {code}", "in {face} {name} has the code point {code}"),
        "set": ("{set} draws {name}", "there is a drawing of {name} in {set}"),
    },
    sized="{article} {size} {name}",
    definite=dict.fromkeys(("digit", "character", "icon"), "the"),
    conjunction="and",
    premises={"matched": ("there is {x}", "{x}", "here is {x}"), "mismatched": ("a picture of {x}", "one can see {x}")},
    hypotheses={
        "matched": dict.fromkeys(("colour", "size", "place"), "{the} {name} is {value}"),
        "mismatched": {
            "colour": "{value} is the colour of {the} {name}",
            "size": "{value} is the size of {the} {name}",
            "place": "{value} stands {the} {name}",
        },
    },
    article=_article,
)
