"""Icons: drawings of things from the icon fonts that the package qtawesome ships, and the list of things.

Qt is never imported: the fonts are read where they lie. `icons.txt` names the things in the order of the dial, each
with its drawings; `choose_icons.py` says how it was made. A line is a name, a tab and the drawings:

    shopping cart<TAB>mdi:f0110 mdi.outline:f0111 *ri.line:f11f

A drawing is a set, a style where it has one, and a code point in the set's font; training never shows those with a
star. A name that starts with a question mark is kept from training altogether.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vlmoe.config import RecipeError, UserError

LIST = Path(__file__).with_name("icons.txt")
PACKAGE = "qtawesome"


@dataclass(frozen=True, slots=True)
class IconFont:
    """One font file of the package, its table of names, and the SHA-256 of the font that the list was made from."""

    title: str
    font: str
    charmap: str
    sha256: str


FONTS = {
    "mdi": IconFont(
        "material design icons",
        "materialdesignicons6-webfont-6.9.96.ttf", "materialdesignicons6-webfont-charmap-6.9.96.json",
        "be825c1294d3c4f046c8e496b18f8f0c7d2864e339c81bdab9297f17ffac1938",
    ),
    "ph": IconFont(
        "phosphor", "phosphor-1.3.0.ttf", "phosphor-charmap-1.3.0.json",
        "351874de64758f3b7fb405cd078ac0ed5ffb9717fb5b9b10013ac03d4c13680b",
    ),
    "ri": IconFont(
        "remix icon", "remixicon-2.5.0.ttf", "remixicon-charmap-2.5.0.json",
        "0ac8bc3ccea26ed47e96844ef26675969c669714d723c081101e51799d501520",
    ),
    "fa": IconFont(
        "font awesome", "fontawesome6-solid-webfont-6.7.2.ttf", "fontawesome6-solid-webfont-charmap-6.7.2.json",
        "220d6d592b543eb991b8c11137ef0082c27d6ff6fdaa25e4335945f57a487c6c",
    ),
    "far": IconFont(
        "font awesome", "fontawesome6-regular-webfont-6.7.2.ttf", "fontawesome6-regular-webfont-charmap-6.7.2.json",
        "cffc8c04d8257c600e0533bdf7cfbf0775b801b50bc39a6f8122ee0c48a1373d",
    ),
    "cod": IconFont(
        "codicons", "codicon-0.0.36.ttf", "codicon-charmap-0.0.36.json",
        "360527575395ad70f940eff1e43eb7c2ec64f4e69f89dc5861b73420d2a578f0",
    ),
    "el": IconFont(
        "elusive icons", "elusiveicons-webfont-2.0.ttf", "elusiveicons-webfont-charmap-2.0.json",
        "29b93f3fe666bf73dcc857869aee47532f710c0a16959c6275dc5bc2e3be4c9e",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawing:
    """A glyph of an icon font. font: a key of FONTS. style: as the set names it, "" where it has none."""

    font: str
    style: str
    code: int

    @property
    def set(self) -> str:
        """The set's title; Font Awesome's two files are one set."""
        return FONTS[self.font].title

    @property
    def face(self) -> str:
        """ "phosphor bold": set and style."""
        style = "regular" if self.font == "far" else self.style
        return f"{self.set} {style}".rstrip()


@dataclass(frozen=True, slots=True)
class Thing:
    """A name with its drawings. drawings: those that training shows. held_out: those it never shows of this thing.
    unseen: training shows and names the thing never at all.
    """

    name: str
    drawings: tuple[Drawing, ...]
    held_out: tuple[Drawing, ...]
    unseen: bool


def by_set(drawings: tuple[Drawing, ...]) -> tuple[tuple[Drawing, ...], ...]:
    """The drawings of each set together."""
    return tuple(tuple(d for d in drawings if d.set == title) for title in dict.fromkeys(d.set for d in drawings))


@lru_cache(maxsize=1)
def things() -> tuple[Thing, ...]:
    """All things in the order of the dial."""
    return tuple(map(parse_thing, LIST.read_text(encoding="utf-8").splitlines()))


def parse_thing(line: str) -> Thing:
    """A line of the list; see the top of this file."""
    name, _, rest = line.partition("\t")
    drawings: dict[bool, list[Drawing]] = {False: [], True: []}
    for word in rest.split():
        source, _, code = word.removeprefix("*").partition(":")
        font, _, style = source.partition(".")
        drawings[word.startswith("*")].append(Drawing(font, style, int(code, 16)))
    return Thing(name.removeprefix("?"), tuple(drawings[False]), tuple(drawings[True]), name.startswith("?"))


@lru_cache(maxsize=len(FONTS))
def font_file(font: str) -> Path:
    """The font's file in the installed package. Raises UserError when it is missing or draws other pictures."""
    wanted = FONTS[font]
    path = fonts_folder() / wanted.font
    advice = f"icons need {PACKAGE} 1.4.2: pip install {PACKAGE}==1.4.2, or set data.world.icons to 0"
    if not path.is_file():
        raise UserError(f"{path}: no such font; {advice}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wanted.sha256:
        raise UserError(f"{path}: SHA-256 {found}, expected {wanted.sha256}; {advice}")
    return path


def charmap(font: str) -> dict[str, int]:
    """The set's own names and their code points."""
    table = json.loads((fonts_folder() / FONTS[font].charmap).read_text(encoding="utf-8"))
    return {name: int(code, 16) for name, code in table.items()}


def fonts_folder() -> Path:
    """Where the package's fonts lie. Raises UserError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the package {PACKAGE} is not installed: data.world.icons above 0 draws from its fonts "
            f"(pip install {PACKAGE}==1.4.2)"
        )
    return Path(spec.origin).parent / "fonts"


def check_count(count: int) -> None:
    """Raises RecipeError for a dial that asks for more things than there are."""
    if not 0 <= count <= len(things()):
        raise RecipeError(f"key 'data.world.icons' got {count!r}, wanted 0 to {len(things())}")
