"""The embedded world's captions and facts, in every language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from vlmoe.config import WorldConfig
from vlmoe.data.sample import Sample
from vlmoe.data.world import FACTORS, LANGUAGES, MAX_CONCEPTS, World, concepts
from vlmoe.data.world.captions import captioner
from vlmoe.data.world.choose import NEAR, candidates, masks_of, nearest
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.facts import facts_of, state_fact
from vlmoe.data.world.languages import CATEGORIES
from vlmoe.data.world.phrases import WORD_CLASSES
from vlmoe.data.world.scene import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SIZES, Scene, SceneObject, relations
from vlmoe.data.world.world import BETWEEN

CODES = list(LANGUAGES)
ENGLISH_PLACES = {LANGUAGES["en"].places[p]: p for p in PLACES}


def captioned(code: str, count: int = 400, **dial: Any) -> list[tuple[Scene, Sample]]:
    """Scenes and what is said of them; of pairs it is said in the same way, but their pictures take time to draw."""
    config = WorldConfig(concepts=150, colours=12, max_objects=4, languages=[code], captions_in_text=1.0)
    world = World(replace(config, **dial), "text")
    return [(world.scene(i), world[i]) for i in range(count)]


# ------------------------------------------------------------------------------------------------------------ captions
def test_english_captions_read_back_give_the_scene() -> None:
    """Read by a grammar of its own, without the spans: every object, place, relation, count and ground must be true."""
    colours, sizes = "|".join(COLOURS), "|".join(SIZES)
    places = "|".join(sorted(ENGLISH_PLACES, key=len, reverse=True))
    names = "|".join(re.escape(c.name) for c in sorted(concepts(150), key=lambda c: -len(c.name)))
    thing = rf"(?:an? (?:({sizes}) )?({colours}) ({names})|({names}), ({sizes}) and ({colours}),)"
    found: Counter[str] = Counter()
    for scene, sample in captioned("en", 1500):
        text = sample.text or ""
        matches = list(re.finditer(thing, text))
        assert 1 <= len(matches) <= 2, text
        assert len(matches) == 2 or len(scene.objects) != 2, text
        who = []
        for m in matches:
            size, colour, name = m[1] or m[5], m[2] or m[6], m[3] or m[4]
            who.append([o for o in scene.objects if (o.concept.name, o.colour) == (name, colour)])
            who[-1] = [o for o in who[-1] if size in (None, o.size)]
            assert who[-1], text
            after = re.match(rf"(?: is)? ({places})\b", text[m.end() :])
            before = re.search(rf"({places}),? $", text[: m.start()])
            place = after or before
            if place:
                found["place"] += 1
                assert any(o.place == ENGLISH_PLACES[place[1]] for o in who[-1]), text
        relation = re.search(rf"\b({'|'.join(RELATIONS)}) an? ", text)
        if relation:
            found["relation"] += 1
            assert any(relation[1] in relations(a, b) for a in who[0] for b in who[1] if a is not b), text
        count = re.search(r"\b(one|two|three|four) objects?\b", text)
        if count:
            found["count"] += 1
            assert ["one", "two", "three", "four"].index(count[1]) + 1 == len(scene.objects)
        ground = re.search(rf"({'|'.join(BACKGROUNDS)}) background", text)
        if ground:
            found["background"] += 1
            assert ground[1] == scene.background
    assert min(found[k] for k in ("place", "relation", "count", "background")) > 100


@pytest.mark.parametrize("code", CODES)
def test_spans_cover_the_right_words(code: str) -> None:
    words = LANGUAGES[code]
    tables = {"place": words.places, "relation": words.relations, "background": words.backgrounds}
    for scene, sample in captioned(code):
        text = sample.text or ""
        covered = np.zeros(len(text), bool)
        for span in sample.spans:
            said, known = text[span.start : span.stop], span.factors
            covered[span.start : span.stop] = True
            assert said == said.strip()
            assert said
            assert set(known) <= set(FACTORS["span"])
            assert known["word_class"] in WORD_CLASSES
            assert known["language"] == code
            owner = scene.objects[int(known["object"]) - 1] if "object" in known else None
            kind = known["word_class"]
            if kind in tables:
                assert said == tables[kind][known[kind]]
            if kind == "place":
                assert owner is not None
                assert known["place"] == owner.place
            if kind == "background":
                assert known["background"] == scene.background
            if kind in {"colour", "size"}:
                assert owner is not None
                assert known[kind] == getattr(owner, kind)
                table = words.colours if kind == "colour" else words.sizes
                assert said.startswith(table[known[kind]])  # German adds an ending
                assert len(said) - len(table[known[kind]]) <= 2
            if kind in {"name", "kind"}:
                assert owner is not None
                assert known["concept"] == owner.concept.name
                digit = owner.concept.kind == "digit"
                if kind == "name":
                    label = owner.concept.label
                    number = unicodedata.digit(owner.concept.character) if digit else 0
                    assert said == (words.digits[number] if digit else label)
                else:
                    assert said == (
                        words.noun["digit"] if digit else f"{words.noun['character']} {owner.concept.sort}".strip()
                    )
            if kind == "number":
                assert ["one", "two", "three", "four"].index(known["number"]) + 1 == len(scene.objects)
        assert all(covered[i] or c == " " for i, c in enumerate(text))


@pytest.mark.parametrize("code", CODES)
def test_captions_and_facts_are_well_formed(code: str) -> None:
    config = WorldConfig(concepts=MAX_CONCEPTS, colours=12, max_objects=4, languages=[code])
    for kind in ("pair", "text"):
        world = World(config, kind)
        texts = [world.text(i) or "" for i in range(1500)]
        assert not [t for t in texts if re.search(r"  |[{}<>]| ,|,,|^ | $", re.sub(r"(^| )\S( |$)", "", t))]
        assert len(set(texts)) > 1400


def test_articles_and_endings_agree() -> None:
    for _, sample in captioned("en", 800):
        assert not re.search(r"(?<!letter)(?: |^)(a [aeiou]|an [^aeiou])", sample.text or ""), sample.text
    for _, sample in captioned("de", 800):
        for article, adjectives, noun in re.findall(
            r"\b(ein\w*) ((?:[a-zäöüß]+ ){1,2})(Ziffer|Zeichen)\b", sample.text or ""
        ):
            ending = {"eine": "e", "ein": "es", "einer": "en", "einem": "en"}[article]
            assert (noun == "Ziffer") == (article in {"eine", "einer"})
            assert all(word.endswith(ending) for word in adjectives.split()), sample.text
        for relation in re.findall(r"\b(?:links von|rechts von|über|unter) (\w+)", sample.text or ""):
            assert relation in {"einer", "einem"}, sample.text
    relations_fr = set(LANGUAGES["fr"].relations)
    for _, sample in captioned("fr", 800):
        text = sample.text or ""
        for before, span in pairwise(sample.spans):
            if text[span.start : span.stop] in {"un", "d'un"}:
                after_relation = before.factors.get("relation") in relations_fr
                assert (text[span.start : span.stop] == "d'un") == after_relation, text
    for _, sample in captioned("es", 800):
        for relation in re.findall(r"(?:encima|debajo|a la izquierda|a la derecha) de (\w+)", sample.text or ""):
            assert relation == "un", sample.text


@pytest.mark.parametrize("code", CODES)
def test_every_phrasing_of_every_word_can_be_said(code: str) -> None:
    """All templates of the language, over scenes that use every colour, size, place, relation and ground."""
    speaker = captioner(code)
    said: dict[str, set[str]] = {}
    for scene, _ in captioned(code, 3000):
        text, spans = speaker.speak(scene, Draws(repr(scene)))
        for span in spans:
            known = span.factors
            for name in ("colour", "size", "place", "relation", "background", "number"):
                if known["word_class"] == name:
                    said.setdefault(name, set()).add(known[name])
        assert text
    assert said["colour"] == set(COLOURS)
    assert said["size"] == set(SIZES)
    assert said["place"] == set(PLACES)
    assert said["relation"] == set(RELATIONS)
    assert said["background"] == set(BACKGROUNDS)
    assert said["number"] == {"three", "four"}  # "one object:" and "two objects:" are set phrases


def test_captions_of_the_small_dial_are_short() -> None:
    for code in CODES:
        longest = max(len((s.text or "").split()) for _, s in captioned(code, 1500, concepts=40, max_objects=2))
        assert longest <= (25 if code == "en" else 32)


def test_relations_follow_the_grid() -> None:
    one, other = World(WorldConfig(max_objects=2), "pair"), concepts(1)[0]

    def at(place: str) -> SceneObject:
        return SceneObject(other, "red", "small", place, "sans", -1, (0, 0, 1, 1))

    assert relations(at("top left"), at("bottom centre")) == ["left of", "above"]
    assert relations(at("middle right"), at("top right")) == ["below"]
    assert relations(at("centre"), at("middle left")) == ["right of"]
    assert isinstance(one.scene(0), Scene)


# --------------------------------------------------------------------------------------------------------------- facts
def test_facts_are_true() -> None:
    """Each fact against the database, looked up from what the sentence says and not from what it was made of."""
    kinds: Counter[str] = Counter()
    words = LANGUAGES["en"]
    categories = {words.categories[code]: code for code in CATEGORIES}
    for concept in concepts(MAX_CONCEPTS):
        for k in range(6):
            text, _ = state_fact(concept, words, Draws(f"{concept.index}/{k}"))
            c = unicodedata.lookup(concept.name.upper())
            name = re.escape(concept.name)
            if m := re.fullmatch(rf"the code point of {name} is U\+(\w+)|{name} has the code point U\+(\w+)", text):
                assert chr(int(m[1] or m[2], 16)) == c
                kinds["code"] += 1
            elif m := re.fullmatch(rf"(.) is {name}|{name} is written (.)", text):
                assert (m[1] or m[2]) == c
                kinds["character"] += 1
            elif m := re.fullmatch(rf"{name} belongs to the (\w+) script|the script of {name} is (\w+)", text):
                assert (m[1] or m[2]).upper() == unicodedata.name(c).split()[0]
                assert unicodedata.category(c)[0] == "L"
                kinds["script"] += 1
            elif m := re.fullmatch(rf"the numeric value of {name} is (\S+)|{name} has the value (\S+)", text):
                assert float(Fraction(m[1] or m[2])) == pytest.approx(unicodedata.numeric(c))
                kinds["value"] += 1
            elif m := re.fullmatch(rf"the (upper|lower)case form of {name} is (.+)", text):
                other = unicodedata.lookup(m[2].upper())
                assert other == (c.upper() if m[1] == "upper" else c.lower()) != c
                kinds[m[1]] += 1
            elif m := re.fullmatch(rf"in (upper|lower) case {name} becomes (.+)", text):
                assert unicodedata.lookup(m[2].upper()) == (c.upper() if m[1] == "upper" else c.lower())
                kinds[m[1]] += 1
            elif m := re.fullmatch(
                rf"{name} decomposes into (.+) and (combining .+|.+)|(.+) and (.+) compose {name}", text
            ):
                first, second = next(
                    (unicodedata.lookup(a.upper()), unicodedata.lookup(b.upper()))
                    for a, b in _halves(
                        text.replace(f"{concept.name} decomposes into ", "").replace(f" compose {concept.name}", "")
                    )
                )
                assert unicodedata.normalize("NFC", first + second) == unicodedata.normalize("NFC", c)
                kinds["parts"] += 1
            else:
                m = re.fullmatch(rf"(?:in Unicode )?{name} is (an? .+)", text)
                assert m, text
                assert categories[m[1]] == unicodedata.category(c)
                kinds["category"] += 1
    assert min(kinds[k] for k in ("code", "character", "script", "value", "upper", "lower", "parts", "category")) > 20


def _halves(text: str):
    """Both sides of an "and", where both are names of characters."""
    for m in re.finditer(" and ", text):
        left, right = text[: m.start()], text[m.end() :]
        try:
            unicodedata.lookup(left.upper()), unicodedata.lookup(right.upper())
        except KeyError:
            continue
        yield left, right


@pytest.mark.parametrize("code", CODES)
def test_every_fact_can_be_said_in_every_language(code: str) -> None:
    words = LANGUAGES[code]
    assert set(words.categories) == set(CATEGORIES)
    kinds = set()
    for concept in concepts(MAX_CONCEPTS, 300):
        kinds |= {fact.kind for fact in facts_of(concept)}
        text, spans = state_fact(concept, words, Draws(f"{code}/{concept.index}"))
        assert "{" not in text.replace(concept.character or " ", "")
        named = [s for s in spans if s.factors.get("concept") == concept.name]
        assert named, text
        assert all(set(s.factors) <= set(FACTORS["span"]) for s in spans)
    assert kinds == set(words.facts)


def test_share_of_captions_among_texts() -> None:
    for share in (0.0, 0.3, 1.0):
        world = World(WorldConfig(captions_in_text=share), "text")
        captions = sum(any(s.factors["word_class"] in {"colour", "place"} for s in world[i].spans) for i in range(2000))
        assert abs(captions / 2000 - share) < 0.05


def test_a_scene_said_twice_is_the_same_scene() -> None:
    """The first caption is the one that stands alone without the key; the second names things of the same scene."""
    once = World(WorldConfig(captions_in_text=1.0), "text")
    twice = World(WorldConfig(captions_in_text=1.0, said_twice=1.0), "text")
    reworded = 0
    for i in range(200):
        sample, first = twice[i], once.text(i)
        assert first is not None and sample.text is not None and sample.text.startswith(first + BETWEEN)
        assert sample.spans[: len(once[i].spans)] == once[i].spans
        second = len(first + BETWEEN)
        reworded += sample.text[second:] != first
        scene = twice.scene(i)
        known = {"concept": {o.concept.name for o in scene.objects}, "colour": {o.colour for o in scene.objects}}
        again = [span for span in sample.spans if span.start >= second]
        assert any("concept" in span.factors for span in again)
        for span in again:
            assert all(span.factors[name] in values for name, values in known.items() if name in span.factors)
            assert sample.text[span.start : span.stop].strip() == sample.text[span.start : span.stop]
    assert reworded > 150
    mixed = World(WorldConfig(captions_in_text=1.0, said_twice=0.3), "text")
    assert abs(sum(BETWEEN in (mixed.text(i) or "") for i in range(2000)) / 2000 - 0.3) < 0.05


# ------------------------------------------------------------------------------------------------------------ concepts
def test_concepts_have_real_names() -> None:
    known = concepts(MAX_CONCEPTS)
    assert len({c.name for c in known}) == MAX_CONCEPTS
    for c in known:
        assert unicodedata.lookup(c.name.upper()) == c.character
        assert f"{c.sort} {c.label}".strip() == c.name
    assert [c.name for c in known[:10]] == [f"digit {w}" for w in LANGUAGES["en"].digits]
    assert "".join(c.character for c in known[10:36]) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    letters = [c for c in known if c.kind == "letter"]
    assert {c.script for c in letters} == {"latin", "greek", "cyrillic", "armenian", "georgian", "common"}
    assert all(c.script == "common" for c in known if c.kind != "letter")


def test_no_two_characters_look_alike() -> None:
    """The first of the dial against each other in all faces, with a margin for other rasterisers' edges."""
    assert set(c.character for c in concepts(MAX_CONCEPTS)[10:]) <= set(candidates())
    earlier = np.zeros((0, 256), np.int16)
    for concept in concepts(160)[10:]:
        new = masks_of(concept.character)
        assert nearest(earlier, new) > 0.8 * NEAR, concept.name
        earlier = np.concatenate([earlier, new])
    assert nearest(earlier, masks_of("Α")) == 0.0  # Greek capital alpha is Latin A's double, and is not in play
