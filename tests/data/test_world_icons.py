"""Icons as things of the embedded world: the list, its drawings and splits, and facts about icons and characters."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from vlmoe.config import RecipeError, UserError, WorldConfig
from vlmoe.data.world import World, available_splits, icons
from vlmoe.data.world.captions import captioner
from vlmoe.data.world.choose import NEAR, SIZE, nearest
from vlmoe.data.world.choose_icons import STYLES, hold_out, is_left_out, merge, split_style
from vlmoe.data.world.concepts import MAX_CONCEPTS, all_concepts, all_icons, character_concept
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.facts import facts_of, state_fact
from vlmoe.data.world.glyphs import icon_mask
from vlmoe.data.world.icons import FONTS, LIST, Drawing, charmap, font_file, parse_thing, things
from vlmoe.data.world.languages import LANGUAGES
from vlmoe.data.world.make_unicode_table import row
from vlmoe.data.world.scene import COLOURS, CORNERS, SIZES, Scene, SceneObject
from vlmoe.data.world.unicode_table import TABLE, character_data, named_characters, unicode_version

ICONS = WorldConfig(concepts=0, icons=200, colours=4, max_objects=2)
MASKS = 200  # things whose masks are compared


def masks(drawings: tuple[Drawing, ...]) -> np.ndarray:
    return np.stack([icon_mask(d.font, d.code, SIZE).reshape(-1) for d in drawings]).astype(np.int16)


# ---------------------------------------------------------------------------------------------------------------- list
def test_a_line_of_the_list() -> None:
    thing = parse_thing("?shopping cart\tmdi:f0110 mdi.outline:f0111 *ph.thin:eaf1 *far:f07a")
    assert (thing.name, thing.unseen) == ("shopping cart", True)
    assert thing.drawings == (Drawing("mdi", "", 0xF0110), Drawing("mdi", "outline", 0xF0111))
    assert [d.face for d in thing.held_out] == ["phosphor thin", "font awesome regular"]
    assert thing.held_out[1].set == "font awesome"


def test_the_list_is_small_and_its_names_are_new_and_state_no_attribute() -> None:
    assert LIST.stat().st_size < 500_000
    names = [thing.name for thing in things()]
    assert len(names) > 6000
    assert len(set(names)) == len(names)
    assert not {c.name for c in all_concepts()} & set(names)
    stated = {*COLOURS, *SIZES} - {"orange"}  # also a fruit
    assert not [name for name in names if stated & set(name.split())]
    assert not [name for name in names if re.search(r"\b(github|google|twitter|windows|logo|notdef)$", name)]
    assert not {"file word", "dev to"} & set(names)
    assert all(thing.drawings for thing in things())


def test_the_first_things_are_well_known_and_drawn_by_several_sets() -> None:
    first = things()[:200]
    assert {"briefcase", "heart", "key", "lock", "star", "cloud", "camera", "car", "shopping cart"} <= {
        thing.name for thing in first
    }
    assert sum(bool(thing.held_out) for thing in first) > 190
    assert np.mean([len(thing.drawings) for thing in first]) > 5


def test_every_drawing_bears_its_name_in_its_set() -> None:
    """Looked up in the charmaps: what the set calls the code point has the thing's words, and a style besides."""
    called = {font: {} for font in FONTS}  # type: dict[str, dict[int, list[str]]]
    for font in FONTS:
        for name, code in charmap(font).items():
            called[font].setdefault(code, []).append(name)
    style_words = {word for styles in STYLES.values() for word in styles}
    for thing in things():
        for drawing in thing.drawings + thing.held_out:
            words = [sorted(name.split("-")) for name in called[drawing.font][drawing.code]]
            besides = [list(w) for w in words]
            for word in thing.name.split():
                besides = [w for w in besides if word in w]
                for w in besides:
                    w.remove(word)
            assert any(all(w in style_words or w.isdigit() for w in rest) for rest in besides), (thing.name, drawing)


def test_drawings_of_a_thing_are_told_apart_by_set_and_style() -> None:
    """Else two facts would give one drawing two code points."""
    for thing in things():
        faces = [(d.font, d.style) for d in thing.drawings + thing.held_out]
        assert len(set(faces)) == len(faces), thing.name


def test_no_picture_is_of_two_things() -> None:
    earlier = np.zeros((0, SIZE * SIZE), np.int16)
    for thing in things()[:MASKS]:
        new = masks(thing.drawings + thing.held_out)
        assert nearest(earlier, new) > 0.8 * NEAR, thing.name  # a margin for other rasterisers' edges
        earlier = np.concatenate([earlier, new])


def test_held_out_drawings_are_no_duplicates_of_shown_ones() -> None:
    for thing in things():
        assert {d.set for d in thing.drawings}.isdisjoint(d.set for d in thing.held_out), thing.name
    with_both = [thing for thing in things() if thing.held_out]
    assert len(with_both) > 600
    for thing in with_both[:MASKS] + with_both[-50:]:
        assert nearest(masks(thing.drawings), masks(thing.held_out)) > 0.8 * NEAR, thing.name


def test_names_of_unseen_things_have_known_words() -> None:
    known = {word for thing in things() if not thing.unseen for word in thing.name.split()}
    unseen = [thing for thing in things() if thing.unseen]
    assert len(unseen) > 100
    assert all(set(thing.name.split()) <= known for thing in unseen)


# --------------------------------------------------------------------------------------------------------------- choice
def test_styles_are_taken_off_names() -> None:
    assert split_style("cart-outline", STYLES["mdi"]) == ("cart", "outline")
    assert split_style("cart-variant-outline", STYLES["mdi"]) == ("cart", "variant-outline")
    assert split_style("outline", STYLES["mdi"]) == ("outline", "")
    assert split_style("text-bold", STYLES["ri"]) == ("text-bold", "")


def test_brands_letters_and_sizes_are_left_out() -> None:
    brands = frozenset({"acme"})
    left_out = ["acme", "github", "apple-icloud", "windows-logo", "alpha-a-box", "numeric-2", "a", "7", "circle-small",
                "file-word-box", "red-packet"]  # fmt: skip
    assert all(is_left_out(name, brands) for name in left_out)
    assert not any(is_left_out(name, brands) for name in ["acme-tree", "cart", "battery-40", "x-ray", "timeline"])


def test_names_of_the_same_words_are_one_thing_unless_a_set_has_both() -> None:
    mdi, fa = Drawing("mdi", "", 1), Drawing("fa", "", 2)
    assert merge({"shopping-cart": [mdi], "cart-shopping": [fa]}) == {"shopping cart": [mdi, fa]}
    other = Drawing("mdi", "", 3)
    assert merge({"arrow-left-top": [mdi], "arrow-top-left": [other]}) == {
        "arrow left top": [mdi], "arrow top left": [other]
    }  # fmt: skip


def test_a_set_is_held_out_only_where_it_draws_otherwise() -> None:
    drawings = [Drawing("mdi", "", 1), Drawing("ph", "", 2), Drawing("ph", "bold", 3)]
    square, ring = np.zeros(256, np.int16), np.zeros(256, np.int16)
    square[:64], ring[128:] = 255, 255
    assert hold_out("a", drawings, np.stack([square, square, square])) is None
    assert hold_out("a", drawings[:1], square[None]) is None
    chosen = hold_out("a", drawings, np.stack([square, square, ring]))
    assert chosen == ("phosphor", [True, False, True])  # of mdi nothing differs; phosphor's double is not used at all


# --------------------------------------------------------------------------------------------------------------- fonts
def test_another_version_of_a_font_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    font_file.cache_clear()
    monkeypatch.setattr(icons, "fonts_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"phosphor-1.3.0.ttf: no such font.*qtawesome 1.4.2"):
        font_file("ph")
    (tmp_path / "phosphor-1.3.0.ttf").write_bytes(b"another font")
    with pytest.raises(UserError, match=f"expected {FONTS['ph'].sha256}.*qtawesome==1.4.2"):
        font_file("ph")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="no_such_package is not installed"):
        icons.fonts_folder()


# --------------------------------------------------------------------------------------------------------------- scenes
def shown(split: str, count: int, config: WorldConfig = ICONS) -> list[SceneObject]:
    world = World(config, "pair", split=split)
    return [thing for i in range(count) for thing in world.scene(i).objects]


def test_training_never_shows_a_held_out_drawing() -> None:
    train, val, drawing = shown("train", 3000), shown("val", 1500), shown("drawing", 1500)
    seen = {(o.concept.name, o.drawing.set) for o in train + val if o.drawing}
    assert len({o.concept.name for o in train}) == 200
    held_out = {(o.concept.name, o.drawing.set) for o in drawing if o.drawing}
    assert seen.isdisjoint(held_out)
    assert {name for name, _ in held_out} == {thing.name for thing in things()[:200] if thing.held_out}
    colours = {(o.concept.name, o.colour) for o in train + val + drawing}  # only the drawing is new
    assert len(colours) == 200 * 3
    assert colours.isdisjoint((o.concept.name, o.colour) for o in shown("attributes", 500))


def test_training_never_shows_or_names_an_unseen_thing() -> None:
    count = 1 + max(i for i, thing in enumerate(things()[:2000]) if thing.unseen)
    config = WorldConfig(concepts=0, icons=count)
    unseen = {thing.name for thing in things()[:count] if thing.unseen}
    assert {o.concept.name for o in shown("unseen", 600, config)} == unseen
    for split in ("train", "val", "attributes", "drawing"):
        assert unseen.isdisjoint(concept.name for concept in World(config, "text", split=split)._make.concepts)


def test_characters_and_icons_are_equally_likely() -> None:
    things_shown = shown("train", 6000, WorldConfig(concepts=30, icons=70, max_objects=1))
    share = np.mean([o.concept.kind == "icon" for o in things_shown])
    assert abs(share - 0.7) < 0.03  # five standard deviations
    assert {o.concept.kind for o in shown("font", 100, WorldConfig(concepts=30, icons=70))} == {"letter"}
    assert {o.concept.kind for o in shown("handwriting", 100, WorldConfig(concepts=30, icons=70))} == {"digit"}


def test_icons_stand_in_the_picture_as_the_scene_says() -> None:
    world = World(ICONS, "pair", patch=8)
    for i in range(100):
        sample, scene = world[i], world.scene(i)
        assert sample.image is not None
        for slot, o in enumerate(scene.objects, 1):
            assert o.drawing is not None
            assert o.face == o.drawing.face
            left, top, right, bottom = o.box
            ink = np.abs(sample.image[top:bottom, left:right] - np.array(COLOURS[o.colour])).sum(-1) < 30
            full = icon_mask(o.drawing.font, o.drawing.code, right - left) > 250
            assert (ink >= full).all()
            at = sample.patch_factors["object"].index(str(slot))
            known = {name: sample.patch_factors[name][at] for name in ("concept", "kind", "script", "face")}
            assert known == {"concept": o.concept.name, "kind": "icon", "script": "common", "face": o.face}


def test_a_grid_of_four_has_larger_things_in_its_corners() -> None:
    config = WorldConfig(concepts=20, icons=20, max_objects=4, grid=2)
    for o in shown("train", 300, config):
        assert o.place in CORNERS
        side, (row, column) = o.box[2] - o.box[0], o.cell
        assert side == {"large": 24, "small": 16}[o.size]
        assert {0: 0, 2: 24}[column] <= o.box[0] <= {0: 24, 2: 48}[column] - side
        assert {0: 0, 2: 24}[row] <= o.box[1] <= {0: 24, 2: 48}[row] - side
    assert {o.place for o in shown("train", 300, config)} == set(CORNERS)


def test_a_grid_of_one_fills_the_picture_with_one_thing() -> None:
    config = WorldConfig(image_size=32, concepts=0, icons=20, max_objects=1, grid=1)
    made = shown("train", 300, config)
    assert {o.place for o in made} == {"centre"}
    assert {o.box[2] - o.box[0] for o in made} == {32, 22}
    small = [o.box[:2] for o in made if o.size == "small"]
    assert {x for x, _ in small} == {y for _, y in small} == set(range(11))
    assert all(o.box == (0, 0, 32, 32) for o in made if o.size == "large")


def test_captions_may_be_the_name_alone() -> None:
    config = WorldConfig(concepts=0, icons=200, max_objects=1, grid=2, captions="names")
    world = World(config, "pair")
    for i in range(50):
        (thing,) = world.scene(i).objects
        sample = world[i]
        assert sample.text == thing.concept.name
        (span,) = sample.spans
        assert (span.start, span.stop) == (0, len(thing.concept.name))
        assert (span.factors["word_class"], span.factors["concept"]) == ("name", thing.concept.name)
    characters = World(WorldConfig(concepts=60, max_objects=1, captions="names"), "text")
    assert {"digit seven", "latin capital letter a"} <= {characters.text(i) for i in range(2000)}


def test_captions_may_be_name_and_code_of_what_is_drawn() -> None:
    world = World(WorldConfig(concepts=0, icons=200, max_objects=1, grid=2, captions="codes"), "pair")
    for i in range(50):
        (thing,) = world.scene(i).objects
        sample = world[i]
        assert thing.drawing is not None
        assert sample.text == f"{thing.concept.name} {thing.drawing.code:04X}"
        name, code = sample.spans
        assert sample.text[code.start : code.stop] == f"{thing.drawing.code:04X}"
        assert [s.factors["word_class"] for s in (name, code)] == ["name", "code"]
        assert code.factors["object"] == "1"
    characters = World(WorldConfig(concepts=60, max_objects=1, captions="codes"), "text")
    assert {"digit seven 0037", "latin capital letter a 0041"} <= {characters.text(i) for i in range(2000)}


def test_splits_follow_the_dial() -> None:
    assert available_splits(ICONS) == ("train", "val", "attributes", "drawing")
    assert available_splits(WorldConfig(icons=len(things()))) == (
        "train", "val", "handwriting", "font", "attributes", "drawing", "unseen"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"icons": 10**6}, "train", rf"data.world.icons' got 1000000, wanted 0 to {len(things())}"),
        ({"icons": -1}, "train", "data.world.icons"),
        ({"icons": 5, "concepts": -1}, "train", f"data.world.concepts.*0 to {MAX_CONCEPTS}"),
        ({"icons": 5, "concepts": 0}, "handwriting", "data.world.concepts.*at least 1"),
        ({"icons": 5}, "unseen", "data.world.icons.*at least"),
        ({}, "drawing", "data.world.icons.*at least 1"),
        ({"grid": 4}, "train", "data.world.grid.*1, 2 or 3"),
        ({"grid": 1, "max_objects": 2}, "train", "data.world.max_objects.*got 2, wanted 1 to 1 where grid is 1"),
        ({"captions": "short"}, "train", "data.world.captions.*sentences, names or codes"),
        ({"captions": "names", "max_objects": 2}, "train", "data.world.captions.*data.world.max_objects"),
        ({"held_out_scenes": 1.0}, "train", "data.world.held_out_scenes.*0 to below 1"),
        ({"facts": 10**6}, "train", f"data.world.facts.*0 to {len(named_characters())}"),
        ({"facts": -1}, "train", "data.world.facts"),
    ],
)
def test_errors_name_the_key(change: dict, split: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        World(WorldConfig(**change), "text", split=split)


# ---------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "a large red shopping cart at the top left"),
        ("de", "ein großes rotes Piktogramm shopping cart oben links"),
        ("fr", "un grand pictogramme shopping cart rouge en haut à gauche"),
        ("es", "un pictograma shopping cart grande y rojo arriba a la izquierda"),
    ],
)
def test_captions_name_things_in_every_language(code: str, text: str) -> None:
    concept = next(c for c in all_icons() if c.name == "shopping cart")
    assert concept.thing is not None
    drawing = concept.thing.drawings[0]
    thing = SceneObject(concept, "red", "large", "top left", drawing.face, -1, (0, 0, 16, 16), drawing)
    spoken = dict(captioner(code).speak(Scene((thing,), "white"), Draws(str(i))) for i in range(200))
    assert text in spoken
    (name,) = [span for span in spoken[text] if span.factors["word_class"] == "name"]
    assert text[name.start : name.stop] == "shopping cart"
    known = {key: name.factors[key] for key in ("concept", "kind", "script", "object")}
    assert known == {"concept": "shopping cart", "kind": "icon", "script": "common", "object": "1"}


def test_facts_about_icons_are_true() -> None:
    """Each against the set's own table, looked up from what the sentence says."""
    font_of = {(FONTS[f].title, "" if f != "far" else "regular"): f for f in FONTS}
    tables, words, kinds = {font: charmap(font) for font in FONTS}, LANGUAGES["en"], set()
    for concept in all_icons()[:400]:
        name = re.escape(concept.name)
        for i in range(4):
            text, spans = state_fact(concept, words, Draws(f"{concept.name} {i}"))
            assert any(s.factors.get("concept") == concept.name for s in spans)
            if m := re.fullmatch(
                rf"in (.+) the code point of {name} is (\w+)|in (.+) {name} has the code point (\w+)", text
            ):
                face, code = m[1] or m[3], int(m[2] or m[4], 16)
                title = next(t for t, _ in font_of if face.startswith(t))
                style = face.removeprefix(title).strip()
                table = tables[font_of.get((title, style), font_of[title, ""])]
                called = [n for n, c in table.items() if c == code]
                assert any(set(concept.name.split()) <= set(n.split("-")) for n in called), text
                assert (
                    style == "regular" or any(set(style.split("-")) <= set(n.split("-")) for n in called) or not style
                )
                kinds.add("glyph")
            else:
                m = re.fullmatch(rf"(.+) draws {name}|there is a drawing of {name} in (.+)", text)
                assert m, text
                assert (m[1] or m[2]) in {font.title for font in FONTS.values()}
                kinds.add("set")
    assert kinds == {"glyph", "set"}


def test_the_table_of_characters_is_unicodes() -> None:
    """Names never change; the rest is compared where this Python has the table's version."""
    assert TABLE.stat().st_size < 600_000
    named = named_characters()
    assert len(named) == len(set(named)) > 31_000
    same = unicode_version() == unicodedata.unidata_version
    for character in named:
        data = character_data(character)
        assert unicodedata.name(character).lower() == data.name
        if same:
            fields = (data.name, data.category, data.value, data.lower, data.upper, data.parts)
            assert row(character) == f"{ord(character):X};" + ";".join(fields).rstrip(";")
    e, half = character_data("é"), character_data("½")
    assert (e.name, e.category, e.upper, e.lower, e.parts) == (
        "latin small letter e with acute", "Ll", "É", "", "e\u0301"
    )  # fmt: skip
    assert (half.category, half.value) == ("No", "1/2")
    assert row("一") is None  # its name follows from its code point


def test_facts_about_all_characters_can_be_said() -> None:
    words = LANGUAGES["en"]
    for character in named_characters()[::7]:
        concept = character_concept(character)
        facts = facts_of(concept)
        assert facts[0].value == f"U+{ord(character):04X}"
        assert all(fact.kind in words.facts for fact in facts)
        drawn = unicodedata.category(character)[0] not in "MZC"
        assert any(fact.kind == "character" for fact in facts) == drawn
        text, _ = state_fact(concept, words, Draws(character))
        assert concept.name in text


def test_texts_state_facts_of_as_many_characters_as_the_dial_says() -> None:
    config = WorldConfig(concepts=0, icons=50, facts=150, captions_in_text=0.0)
    world = World(config, "text")
    named = {s.factors["concept"] for i in range(3000) for s in world[i].spans if s.factors.get("word_class") == "name"}
    icons_named = {thing.name for thing in things()[:50]}
    told = {character_data(c).name for c in named_characters()[:150]}
    partners = named - icons_named - told  # "the uppercase form of ... is ..."
    assert icons_named | told <= named
    assert len(partners) < 40
    assert "latin capital letter a" in told
    beside = World(WorldConfig(concepts=1488, facts=150), "text")
    assert not {c.character for c in beside._make.concepts} & set(beside._told)
    assert not World(config, "text", split="drawing")._told
