from vlmoe.data.world.languages.base import Language


def _article(following: str, case: str, digit: bool) -> str:
    """Ziffer is feminine, Zeichen and Piktogramm neuter; for all the accusative equals the nominative."""
    stem = "einer" if digit else "einem"
    return stem if case == "dat" else ("eine" if digit else "ein")


def _inflect(slot: str, word: str, case: str, digit: bool) -> str:
    if slot not in {"size", "colour"} or case == "pred":
        return word
    return word + ("en" if case == "dat" else "e" if digit else "es")


GERMAN = Language(
    code="de",
    noun={"digit": "Ziffer", "character": "Zeichen", "icon": "Piktogramm"},
    colours={
        "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "white": "weiß", "black": "schwarz",
        "orange": "orangefarben", "purple": "violett", "pink": "rosafarben", "brown": "braun",
        "turquoise": "türkisfarben", "grey": "grau",
    },
    sizes={"small": "klein", "large": "groß"},
    places={
        "top left": "oben links",
        "top centre": "oben in der Mitte",
        "top right": "oben rechts",
        "middle left": "in der Mitte links",
        "centre": "in der Mitte",
        "middle right": "in der Mitte rechts",
        "bottom left": "unten links",
        "bottom centre": "unten in der Mitte",
        "bottom right": "unten rechts",
    },
    relations={"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"},
    backgrounds={
        "white": "weißem", "black": "schwarzem", "beige": "beigefarbenem", "dark blue": "dunkelblauem",
        "light blue": "hellblauem",
    },
    digits=("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
    counts={"one": "ein", "two": "zwei", "three": "drei", "four": "vier"},
    scripts={
        "latin": "lateinischen", "greek": "griechischen", "cyrillic": "kyrillischen", "armenian": "armenischen",
        "georgian": "georgischen",
    },
    categories={
        "Lu": "ein Großbuchstabe",
        "Ll": "ein Kleinbuchstabe",
        "Lt": "ein Titelbuchstabe",
        "Lm": "ein Modifikationsbuchstabe",
        "Lo": "ein Buchstabe ohne Groß- und Kleinform",
        "Nd": "eine Dezimalziffer",
        "No": "eine Zahl",
        "Sm": "ein mathematisches Symbol",
        "Sc": "ein Währungssymbol",
        "Sk": "ein Modifikationssymbol",
        "So": "ein Symbol",
        "Pd": "ein Strich",
        "Ps": "eine öffnende Klammer",
        "Pe": "eine schließende Klammer",
        "Pi": "ein einleitendes Anführungszeichen",
        "Pf": "ein abschließendes Anführungszeichen",
        "Po": "ein Satzzeichen",
        "Pc": "ein Verbindungszeichen",
        "Mn": "ein Zeichen ohne eigene Breite",
        "Mc": "ein kombinierendes Zeichen mit eigener Breite",
        "Me": "ein umschließendes Zeichen",
        "Nl": "ein Zahlbuchstabe",
        "Zs": "ein Leerzeichen",
        "Zl": "ein Zeilentrenner",
        "Zp": "ein Absatztrenner",
        "Cf": "ein Formatierungszeichen",
    },
    objects=("{article} {size} {colour} {name}", "{article} {colour} {name}"),
    one=(
        "{o1} {place1}",
        "hier steht {o1} {place1}",
        "{place1} steht {o1}",
        "ein Objekt: {o1} {place1}",
        "{name1}, {size1:pred} und {colour1:pred}, {place1}",
        "{o1} {place1} auf {background} Grund",
        "auf {background} Grund steht {o1} {place1}",
    ),
    two=(
        "{o1} {place1} und {o2} {place2}",
        "{place1} steht {o1}, {place2} {o2}",
        "zwei Objekte: {o1} {place1}, {o2} {place2}",
        "{o1} steht {relation} {o2:dat}",
        "{place1} steht {o1}, {relation} {o2:dat}",
        "{name1}, {size1:pred} und {colour1:pred}, {relation} {o2:dat}",
        "auf {background} Grund steht {o1} {relation} {o2:dat}",
    ),
    many=(
        "{count} Objekte, darunter {o1} {place1} und {o2} {place2}",
        "es gibt {count} Objekte, {o1} steht {relation} {o2:dat}",
        "{count} Objekte auf {background} Grund, {place1} steht {o1}",
        "{place1} steht {o1}, {relation} {o2:dat}",
    ),
    facts={
        "code": ("der Codepunkt von {name} ist {code}", "{name} hat den Codepunkt {code}"),
        "character": ("{character} ist {name}", "{name} wird {character} geschrieben"),
        "script": ("{name} gehört zur {script} Schrift",),
        "category": ("{name} ist {category}", "in Unicode ist {name} {category}"),
        "value": ("der Zahlenwert von {name} ist {value}", "{name} hat den Wert {value}"),
        "lower": ("die Kleinform von {name} ist {name2}", "klein geschrieben wird {name} zu {name2}"),
        "upper": ("die Großform von {name} ist {name2}", "groß geschrieben wird {name} zu {name2}"),
        "parts": ("{name} zerfällt in {name2} und {name3}", "{name2} und {name3} ergeben {name}"),
        "glyph": ("in {face} ist der Codepunkt von {name} {code}", "in {face} hat {name} den Codepunkt {code}"),
        "set": ("{set} zeichnet {name}", "in {set} gibt es eine Zeichnung von {name}"),
    },
    sized="{article} {size} {name}",
    definite={"digit": "die", "character": "das", "icon": "das"},
    conjunction="und",
    premises={
        "matched": ("hier steht {x}", "{x}", "es gibt {x}"),
        "mismatched": ("man sieht {x}", "das Bild zeigt {x}"),
    },
    hypotheses={
        "matched": {
            "colour": "{the} {name} ist {value}", "size": "{the} {name} ist {value}",
            "place": "{the} {name} steht {value}",
        },
        "mismatched": {
            "colour": "von Farbe ist {the} {name} {value}", "size": "von Größe ist {the} {name} {value}",
            "place": "{value} sieht man {the} {name}",
        },
    },
    article=_article,
    inflect=_inflect,
)  # fmt: skip
