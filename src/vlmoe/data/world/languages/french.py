from vlmoe.data.world.languages.base import Language


def _article(following: str, case: str, digit: bool) -> str:
    """Chiffre and caractère are both masculine; a relation ends in "de", which joins the article."""
    return "d'un" if case == "dat" else "un"


FRENCH = Language(
    code="fr",
    noun={"digit": "chiffre", "character": "caractère"},
    colours={
        "red": "rouge", "green": "vert", "blue": "bleu", "yellow": "jaune", "white": "blanc", "black": "noir",
        "orange": "orange", "purple": "violet", "pink": "rose", "brown": "marron", "turquoise": "turquoise",
        "grey": "gris",
    },
    sizes={"small": "petit", "large": "grand"},
    places={
        "top left": "en haut à gauche",
        "top centre": "en haut au centre",
        "top right": "en haut à droite",
        "middle left": "au milieu à gauche",
        "centre": "au centre",
        "middle right": "au milieu à droite",
        "bottom left": "en bas à gauche",
        "bottom centre": "en bas au centre",
        "bottom right": "en bas à droite",
    },
    relations={"left of": "à gauche", "right of": "à droite", "above": "au-dessus", "below": "au-dessous"},
    backgrounds={
        "white": "blanc", "black": "noir", "beige": "beige", "dark blue": "bleu foncé", "light blue": "bleu clair",
    },
    digits=("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
    counts={"one": "un", "two": "deux", "three": "trois", "four": "quatre"},
    scripts={
        "latin": "latine", "greek": "grecque", "cyrillic": "cyrillique", "armenian": "arménienne",
        "georgian": "géorgienne",
    },
    categories={
        "Lu": "une lettre majuscule",
        "Ll": "une lettre minuscule",
        "Lt": "une lettre de titre",
        "Lm": "une lettre modificative",
        "Lo": "une lettre sans casse",
        "Nd": "un chiffre décimal",
        "No": "un nombre",
        "Sm": "un symbole mathématique",
        "Sc": "un symbole monétaire",
        "Sk": "un symbole modificatif",
        "So": "un symbole",
        "Pd": "un tiret",
        "Ps": "un crochet ouvrant",
        "Pe": "un crochet fermant",
        "Pi": "un guillemet initial",
        "Pf": "un guillemet final",
        "Po": "un signe de ponctuation",
        "Pc": "un connecteur",
    },
    objects=("{article} {size} {name} {colour}", "{article} {name} {colour}"),
    one=(
        "{o1} {place1}",
        "il y a {o1} {place1}",
        "{place1}, {o1}",
        "un objet : {o1} {place1}",
        "{name1}, {size1:pred} et {colour1:pred}, {place1}",
        "{o1} {place1} sur fond {background}",
        "sur fond {background}, {o1} {place1}",
    ),
    two=(
        "{o1} {place1} et {o2} {place2}",
        "il y a {o1} {place1} et {o2} {place2}",
        "{place1} {o1}, {place2} {o2}",
        "deux objets : {o1} {place1}, {o2} {place2}",
        "{o1} est {relation} {o2:dat}",
        "{o1} {place1}, {relation} {o2:dat}",
        "{name1}, {size1:pred} et {colour1:pred}, {relation} {o2:dat}",
        "sur fond {background}, {o1} {relation} {o2:dat}",
    ),
    many=(
        "{count} objets, dont {o1} {place1} et {o2} {place2}",
        "il y a {count} objets, {o1} est {relation} {o2:dat}",
        "{count} objets sur fond {background}, {o1} est {place1}",
        "{o1} {place1}, {relation} {o2:dat}",
    ),
    facts={
        "code": ("{name} a pour point de code {code}", "{name} : point de code {code}"),
        "character": ("{character} est {name}", "{name} s'écrit {character}"),
        "script": ("{name} appartient à l'écriture {script}",),
        "category": ("{name} est {category}", "dans Unicode, {name} est {category}"),
        "value": ("{name} a pour valeur {value}", "{name} vaut {value}"),
        "lower": ("{name} a pour minuscule {name2}", "en minuscule, {name} devient {name2}"),
        "upper": ("{name} a pour majuscule {name2}", "en majuscule, {name} devient {name2}"),
        "parts": ("{name} se décompose en {name2} et {name3}", "{name2} et {name3} forment {name}"),
    },
    sized="{article} {size} {name}",
    definite={"digit": "le", "character": "le"},
    conjunction="et",
    premises={"matched": ("il y a {x}", "{x}", "voici {x}"), "mismatched": ("on voit {x}", "l'image montre {x}")},
    hypotheses={
        "matched": dict.fromkeys(("colour", "size", "place"), "{the} {name} est {value}"),
        "mismatched": {
            "colour": "la couleur du {name} est {value}", "size": "{value} est {the} {name}",
            "place": "{value} se trouve {the} {name}",
        },
    },
    article=_article,
)  # fmt: skip
