from vlmoe.data.world.languages.base import Language


def _article(following: str, case: str, digit: bool) -> str:
    """Dígito and carácter are both masculine."""
    return "un"


SPANISH = Language(
    code="es",
    noun={"digit": "dígito", "character": "carácter"},
    colours={
        "red": "rojo", "green": "verde", "blue": "azul", "yellow": "amarillo", "white": "blanco", "black": "negro",
        "orange": "naranja", "purple": "morado", "pink": "rosa", "brown": "marrón", "turquoise": "turquesa",
        "grey": "gris",
    },
    sizes={"small": "pequeño", "large": "grande"},
    places={
        "top left": "arriba a la izquierda",
        "top centre": "arriba en el centro",
        "top right": "arriba a la derecha",
        "middle left": "en el medio a la izquierda",
        "centre": "en el centro",
        "middle right": "en el medio a la derecha",
        "bottom left": "abajo a la izquierda",
        "bottom centre": "abajo en el centro",
        "bottom right": "abajo a la derecha",
    },
    relations={
        "left of": "a la izquierda de", "right of": "a la derecha de", "above": "encima de", "below": "debajo de",
    },
    backgrounds={
        "white": "blanco", "black": "negro", "beige": "beige", "dark blue": "azul oscuro", "light blue": "azul claro",
    },
    digits=("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
    counts={"one": "un", "two": "dos", "three": "tres", "four": "cuatro"},
    scripts={
        "latin": "latina", "greek": "griega", "cyrillic": "cirílica", "armenian": "armenia", "georgian": "georgiana",
    },
    categories={
        "Lu": "una letra mayúscula",
        "Ll": "una letra minúscula",
        "Lt": "una letra de título",
        "Lm": "una letra modificadora",
        "Lo": "una letra sin caja",
        "Nd": "un dígito decimal",
        "No": "un número",
        "Sm": "un símbolo matemático",
        "Sc": "un símbolo monetario",
        "Sk": "un símbolo modificador",
        "So": "un símbolo",
        "Pd": "un guion",
        "Ps": "un corchete de apertura",
        "Pe": "un corchete de cierre",
        "Pi": "una comilla inicial",
        "Pf": "una comilla final",
        "Po": "un signo de puntuación",
        "Pc": "un conector",
    },
    objects=("{article} {name} {size} y {colour}", "{article} {name} {colour}"),
    one=(
        "{o1} {place1}",
        "hay {o1} {place1}",
        "{place1}, {o1}",
        "un objeto: {o1} {place1}",
        "{name1}, {size1:pred} y {colour1:pred}, {place1}",
        "{o1} {place1} sobre fondo {background}",
        "sobre fondo {background}, {o1} {place1}",
    ),
    two=(
        "{o1} {place1} y {o2} {place2}",
        "hay {o1} {place1} y {o2} {place2}",
        "{place1} {o1}, {place2} {o2}",
        "dos objetos: {o1} {place1}, {o2} {place2}",
        "{o1} está {relation} {o2:dat}",
        "{o1} {place1}, {relation} {o2:dat}",
        "{name1}, {size1:pred} y {colour1:pred}, {relation} {o2:dat}",
        "sobre fondo {background}, {o1} {relation} {o2:dat}",
    ),
    many=(
        "{count} objetos, entre ellos {o1} {place1} y {o2} {place2}",
        "hay {count} objetos, {o1} está {relation} {o2:dat}",
        "{count} objetos sobre fondo {background}, {o1} está {place1}",
        "{o1} {place1}, {relation} {o2:dat}",
    ),
    facts={
        "code": ("el punto de código de {name} es {code}", "{name} tiene el punto de código {code}"),
        "character": ("{character} es {name}", "{name} se escribe {character}"),
        "script": ("{name} pertenece a la escritura {script}",),
        "category": ("{name} es {category}", "en Unicode {name} es {category}"),
        "value": ("el valor numérico de {name} es {value}", "{name} vale {value}"),
        "lower": ("la minúscula de {name} es {name2}", "en minúscula {name} pasa a ser {name2}"),
        "upper": ("la mayúscula de {name} es {name2}", "en mayúscula {name} pasa a ser {name2}"),
        "parts": ("{name} se descompone en {name2} y {name3}", "{name2} y {name3} forman {name}"),
    },
    sized="{article} {name} {size}",
    definite={"digit": "el", "character": "el"},
    conjunction="y",
    premises={"matched": ("hay {x}", "{x}", "aquí hay {x}"), "mismatched": ("se ve {x}", "la imagen muestra {x}")},
    hypotheses={
        "matched": {
            "colour": "{the} {name} es {value}", "size": "{the} {name} es {value}",
            "place": "{the} {name} está {value}",
        },
        "mismatched": {
            "colour": "el color del {name} es {value}", "size": "el tamaño del {name} es {value}",
            "place": "{value} se encuentra {the} {name}",
        },
    },
    article=_article,
)  # fmt: skip
