"""The world's downstream tasks: answers follow from the scenes, and words alone do not give them away."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from vlmoe.config import RecipeError, WorldConfig
from vlmoe.data.world.languages import LANGUAGES
from vlmoe.data.world.scene import HELD_OUT_FACE, PLACES, Scene, SceneObject, held_out_colours, relations
from vlmoe.data.world.tasks import WorldExamples, task_splits
from vlmoe.data.world.tasks.examples import TASKS
from vlmoe.data.world.tasks.made import reading_order
from vlmoe.data.world.tasks.vqa import KINDS

WORLD = WorldConfig(image_size=48, concepts=120, max_objects=3, colours=6)
NUMBERS = ("", "one", "two", "three", "four", "five", "six")


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_a_pure_function_of_its_number(task: str) -> None:
    a, b = WorldExamples(task, WORLD, "val", seed=3), WorldExamples(task, WORLD, "val", seed=3)
    b[7]
    one, two, truth = a[5], b[5], a.truth(5)
    assert all(np.array_equal(x, y) for x, y in zip(one.images, two.images, strict=True))
    assert truth.images == ()
    for e in (one, two):
        e.images = ()
    assert one == two == truth
    assert len({a.truth(i).key for i in range(50)}) == 50
    assert WorldExamples(task, WORLD, "val", seed=4).truth(5) != truth
    images = {"nlvr2": 2, "nli": 0}.get(task, 1)
    assert [x.shape for x in a[5].images] == [(48, 48, 3)] * images
    assert len(a.scenes(5)) == images


# ----------------------------------------------------------------------------------------------------------------- vqa
def named(scene: Scene, words: str) -> SceneObject:
    """The one object that words refer to."""
    words = words.removeprefix("the ")
    fitting = [
        o for o in scene.objects
        if words in {o.concept.name, f"{o.colour} object", f"object at the {o.place}", f"object in the {o.place}"}
    ]  # fmt: skip
    assert len(fitting) == 1, words
    return fitting[0]


def answer(question: str, scene: Scene) -> str:
    """Read the question and look at the scene, without the code that asked."""
    q = question.removesuffix(" ?")
    order = reading_order(scene)
    assert [o.place for o in order] == sorted((o.place for o in scene.objects), key=PLACES.index)
    if q.startswith("what is "):
        return named(scene, q.removeprefix("what is ")).concept.name
    if q.startswith("what colour is "):
        return named(scene, q.removeprefix("what colour is ")).colour
    if q.endswith(" small or large"):
        return named(scene, q.removeprefix("is ").removesuffix(" small or large")).size
    if q.startswith("where is "):
        return named(scene, q.removeprefix("where is ")).place
    if q == "how many objects are there":
        return NUMBERS[len(scene.objects)]
    if q.startswith("how many "):
        return NUMBERS[sum(o.colour == q.split()[2] for o in scene.objects)]
    if q == "do the two objects have the same colour":
        a, b = scene.objects
        return "yes" if a.colour == b.colour else "no"
    if q.startswith("which script has "):
        return named(scene, q.removeprefix("which script has ")).concept.script
    if q == "which object is the first in reading order":
        return order[0].concept.name
    if q == "which object is the last in reading order":
        return order[-1].concept.name
    if q.startswith("which object follows "):
        before = named(scene, q.removeprefix("which object follows ").removesuffix(" in reading order"))
        return order[order.index(before) + 1].concept.name
    for relation in ("left of", "right of", "above", "below"):
        if f" {relation} the " in q:
            a, b = (named(scene, words) for words in q.removeprefix("is ").split(f" {relation} "))
            return "yes" if relation in relations(a, b) else "no"
    a, b = (named(scene, words) for words in q.removeprefix("is ").split(" larger than "))
    return "yes" if (a.size, b.size) == ("large", "small") else "no"


def test_every_answer_follows_from_the_scene_and_can_be_given() -> None:
    source = WorldExamples("vqa", WORLD, "train")
    kinds: Counter[str] = Counter()
    for i in range(1500):
        e = source.truth(i)
        assert e.text is not None
        assert set(e.references) == {answer(e.text, source.scenes(i)[0])}
        assert e.references[0] in source.labels
        assert len(e.text.split()) <= 18
        kinds[e.factors["kind"]] += 1
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 100


def blind_accuracy(train: WorldExamples, val: WorldExamples, n: int = 6000, m: int = 2000) -> dict[str, float]:
    """By kind, the accuracy of the most frequent training answer to the very question, or else to the kind."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for i in range(n):
        e = train.truth(i)
        for key in (e.text or "", e.factors["kind"]):
            seen[key][e.references[0]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for i in range(m):
        e = val.truth(i)
        key = e.text if e.text in seen else e.factors["kind"]
        right[e.factors["kind"]].append(seen[key or ""].most_common(1)[0][0] == e.references[0])
    return {kind: sum(r) / len(r) for kind, r in right.items()}


def test_the_words_of_a_question_do_not_tell_its_answer() -> None:
    """Chance is one over the number of answers that a kind has; the margin covers sampling."""
    found = blind_accuracy(WorldExamples("vqa", WORLD, "train"), WorldExamples("vqa", WORLD, "val"))
    chance = {"identity": 1 / 120, "colour": 1 / 6, "size": 1 / 2, "place": 1 / 9, "count": 1 / 3, "comparison": 1 / 2,
              "script": 1 / 3, "order": 1 / 120}  # fmt: skip
    for kind, share in found.items():
        assert share < chance[kind] + 0.09, kind


def test_kinds_of_questions_can_be_chosen() -> None:
    source = WorldExamples("vqa", WORLD, "train", questions=("count", "place"))
    assert {source.truth(i).factors["kind"] for i in range(50)} == {"count", "place"}
    with pytest.raises(RecipeError, match="wanted some of identity"):
        WorldExamples("vqa", WORLD, "train", questions=("taste",))
    single = WorldConfig(image_size=48, concepts=15, max_objects=1, colours=4)
    with pytest.raises(RecipeError, match="only allows identity, colour, size, place"):
        WorldExamples("vqa", single, "train", questions=("count",))


# --------------------------------------------------------------------------------------------------------------- nlvr2
def test_half_of_a_sentences_examples_are_true() -> None:
    for split in ("train", "font"):
        source = WorldExamples("nlvr2", WORLD, split)
        for group in range(150):
            four = [source.truth(4 * group + i) for i in range(4)]
            assert len({e.text for e in four}) == len({e.group for e in four}) == 1
            assert sorted(e.label for e in four if e.label is not None) == [0, 0, 1, 1]
        assert len({source.truth(4 * g).group for g in range(150)}) == 150


def shows(scene: Scene, what: str) -> bool:
    noun = what.removeprefix("an ").removeprefix("a ")
    if noun.endswith(" object"):
        return any(o.colour == noun.removesuffix(" object") for o in scene.objects)
    return any(o.concept.kind == noun for o in scene.objects)


def holds(sentence: str, left: Scene, right: Scene) -> bool:
    both: Callable[[Callable[[Scene], Any]], tuple[Any, Any]] = lambda f: (f(left), f(right))  # noqa: E731
    if sentence.startswith("both images show "):
        return all(both(lambda s: shows(s, sentence.removeprefix("both images show "))))
    if sentence.startswith("only one image shows "):
        return sum(both(lambda s: shows(s, sentence.removeprefix("only one image shows ")))) == 1
    if sentence.startswith("only one image has "):
        colour = sentence.removeprefix("only one image has ").partition(" ")[2].removesuffix(" background")
        return sum(both(lambda s: s.background == colour)) == 1
    if sentence == "both images have the same background":
        return left.background == right.background
    if sentence.startswith("there are "):
        return sum(both(lambda s: len(s.objects))) == NUMBERS.index(sentence.split()[2])
    if " shows more objects than " in sentence:
        a, b = both(lambda s: len(s.objects))
        return a > b if sentence.startswith("the left") else b > a
    one, two = sentence.removeprefix("the left image shows ").split(" and the right image shows ")
    return shows(left, one) and shows(right, two)


def test_every_label_follows_from_the_scenes() -> None:
    source = WorldExamples("nlvr2", WORLD, "train")
    kinds = set()
    for i in range(1200):
        e = source.truth(i)
        left, right = source.scenes(i)
        assert e.text is not None
        assert holds(e.text, left, right) == (e.label == 1), e.text
        kinds.add(e.factors["kind"])
    assert len(kinds) == 6


# ----------------------------------------------------------------------------------------------------------------- nli
@pytest.mark.parametrize("languages", [["en"], ["en", "de", "fr", "es"]])
def test_neither_text_alone_tells_the_class(languages: list[str]) -> None:
    world = replace(WORLD, languages=languages)
    train, val = WorldExamples("nli", world, "train"), WorldExamples("nli", world, "val")
    rows = [[source.truth(i) for i in range(n)] for source, n in ((train, 3000), (val, 1500))]
    for part in ("text", "text_pair"):
        words = CountVectorizer(ngram_range=(1, 2))
        x = words.fit_transform([getattr(e, part) for e in rows[0]])
        model = LogisticRegression(C=0.1, max_iter=200).fit(x, [e.label for e in rows[0]])
        score = model.score(words.transform([getattr(e, part) for e in rows[1]]), [e.label for e in rows[1]])
        assert abs(score - 1 / 3) < 0.045, part
    assert min(Counter(e.label for e in rows[0]).values()) > 900


def test_the_class_follows_from_what_the_premise_says() -> None:
    source = WorldExamples("nli", WORLD, "train")
    values = {"size": ("small", "large"), "colour": ("red", "green", "blue", "yellow", "white", "black"),
              "place": tuple(f"{'in' if p == 'centre' else 'at'} the {p}" for p in PLACES)}  # fmt: skip
    for i in range(800):
        e = source.truth(i)
        assert e.text is not None and e.text_pair is not None
        name, value = e.text_pair.removeprefix("the ").split(" is ")
        said = next(
            p for p in e.text.split(" and ") if p.endswith(name) or f"{name} at the" in p or f"{name} in the" in p
        )
        before, after = said.split(name, 1)
        stated = [v for v in values[e.factors["attribute"]]
                  if (v in before.split() if e.factors["attribute"] != "place" else v == after.strip())]  # fmt: skip
        wanted = 1 if not stated else 0 if stated == [value] else 2
        assert e.label == wanted, (e.text, e.text_pair)


def test_two_languages_say_the_premise_and_the_hypothesis() -> None:
    world = replace(WORLD, languages=["en", "de", "fr", "es"])
    definite = {"en": ("the",), "de": ("die", "das"), "fr": ("le",), "es": ("el",)}
    seen = set()
    for e in map(WorldExamples("nli", world, "train").truth, range(2000)):
        assert e.text is not None and e.text_pair is not None
        first, second = e.factors["languages"].split("-")
        seen.add((first, second))
        assert e.text_pair.split()[0] in definite[second]
        table = f"{e.factors['attribute']}s"  # colours, sizes, places
        words = getattr(LANGUAGES[second], table)
        claimed = max((v for v in words if e.text_pair.endswith(f" {words[v]}")), key=lambda v: len(words[v]))
        assert e.label != 0 or getattr(LANGUAGES[first], table)[claimed] in e.text
    assert len(seen) == 12 and all(a != b for a, b in seen)


@pytest.mark.parametrize(
    ("language", "split", "number", "premise", "hypothesis"),
    [
        ("de", "train", 3, "ein kleines schwarzes Zeichen circumflex accent", "das Zeichen circumflex accent ist weiß"),
        ("de", "mismatched", 7, "man sieht ein großes Zeichen latin capital letter i oben in der Mitte und eine rote "
         "Ziffer drei oben in der Mitte", "oben in der Mitte sieht man die Ziffer drei"),
        ("fr", "train", 0, "il y a un caractère cyrillic capital letter soft sign vert en bas à droite",
         "le caractère cyrillic capital letter soft sign est en bas à droite"),
        ("fr", "mismatched", 0, "on voit un grand caractère greek capital letter omega bleu",
         "grand est le caractère greek capital letter omega"),
        ("es", "train", 1, "un carácter greek capital letter omega pequeño y verde",
         "el carácter greek capital letter omega es grande"),
        ("es", "mismatched", 7, "se ve un carácter latin capital letter i grande arriba en el centro y un dígito tres "
         "rojo arriba en el centro", "arriba en el centro se encuentra el dígito tres"),
    ],
)  # fmt: skip
def test_a_world_of_one_language_says_both_in_it(
    language: str, split: str, number: int, premise: str, hypothesis: str
) -> None:
    e = WorldExamples("nli", replace(WORLD, languages=[language]), split).truth(number)
    assert (e.text, e.text_pair) == (premise, hypothesis)
    assert set(e.factors) == {"attribute"}


def test_an_unknown_language_is_named() -> None:
    with pytest.raises(
        RecipeError, match=r"'data.world.languages' got \['xx'\], wanted at least one of en, de, fr, es"
    ):
        WorldExamples("nli", replace(WORLD, languages=["en", "xx"]), "train")


@pytest.mark.parametrize("language", list(LANGUAGES))
def test_mismatched_wordings_are_others(language: str) -> None:
    ways = LANGUAGES[language]
    assert not set(ways.premises["matched"]) & set(ways.premises["mismatched"])
    assert not set(ways.hypotheses["matched"].values()) & set(ways.hypotheses["mismatched"].values())
    assert {tuple(h) for h in ways.hypotheses.values()} == {("colour", "size", "place")}


def test_mismatched_wordings_are_never_in_training() -> None:
    train, other = WorldExamples("nli", WORLD, "train"), WorldExamples("nli", WORLD, "mismatched")
    starts = [{(e.text_pair or "").split()[0] + str("is the" in (e.text_pair or "")) for e in map(s.truth, range(300))}
              for s in (train, other)]  # fmt: skip
    assert not starts[0] & starts[1]


# -------------------------------------------------------------------------------------------------------------- others
def test_captions_are_of_the_scene_and_differ() -> None:
    for task, count in (("retrieval", 2), ("caption", 5)):
        source = WorldExamples(task, WORLD, "val")
        for i in range(100):
            e, (scene,) = source.truth(i), source.scenes(i)
            assert len(set(e.references)) == count
            for text in e.references:
                assert any(o.concept.label in text for o in scene.objects)


def test_a_class_is_what_the_one_object_is() -> None:
    source = WorldExamples("classify", WORLD, "train")
    for i in range(100):
        (scene,) = source.scenes(i)
        assert len(scene.objects) == 1
        label = source.truth(i).label
        assert label is not None
        assert source.labels[label] == scene.objects[0].concept.name


def test_splits_show_what_training_does_not() -> None:
    assert task_splits("vqa", WORLD) == ("train", "val", "handwriting", "font", "attributes")
    assert task_splits("nli", WORLD) == ("train", "val", "mismatched")
    colours = ["red", "green", "blue", "yellow", "white", "black"]
    for task in ("vqa", "nlvr2", "classify", "caption"):
        for split in ("train", "font", "attributes", "handwriting"):
            source = WorldExamples(task, WORLD, split)
            for thing in [o for i in range(60) for scene in source.scenes(i) for o in scene.objects]:
                assert (thing.face == HELD_OUT_FACE) == (split == "font")
                assert (thing.colour in held_out_colours(thing.concept, colours)) == (split == "attributes")
                assert split != "handwriting" or thing.concept.kind == "digit"


@pytest.mark.parametrize(
    ("task", "split", "words"),
    [("vq", "train", "no task 'vq'"), ("vqa", "test", "no split 'test' for vqa"), ("nli", "font", "no split 'font'")],
)
def test_unknown_tasks_and_splits_are_named(task: str, split: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        WorldExamples(task, WORLD, split)


# --------------------------------------------------------------------------------------------------------------- icons
ICONS = replace(WORLD, concepts=0, icons=150, grid=2)


def test_tasks_about_icons_follow_from_the_scenes() -> None:
    source = WorldExamples("vqa", ICONS, "train")
    kinds: Counter[str] = Counter()
    for i in range(600):
        e = source.truth(i)
        assert e.text is not None
        assert set(e.references) == {answer(e.text, source.scenes(i)[0])}
        assert e.references[0] in source.labels
        kinds[e.factors["kind"]] += 1
    assert set(kinds) == set(KINDS) - {"script"}  # things have none
    assert len(set(source.labels)) == len(source.labels)
    assert not set(source.labels) & (set(PLACES) - {"top left", "top right", "bottom left", "bottom right"})
    pairs = WorldExamples("nlvr2", ICONS, "train")
    for i in range(300):
        e = pairs.truth(i)
        assert e.text is not None
        assert holds(e.text, *pairs.scenes(i)) == (e.label == 1), e.text


def test_icons_are_classes_after_the_characters() -> None:
    source = WorldExamples("classify", replace(WORLD, concepts=12, icons=150), "drawing")
    assert len(source.labels) == 162
    for i in range(200):
        (scene,), label = source.scenes(i), source.truth(i).label
        assert label is not None and label >= 12
        assert source.labels[label] == scene.objects[0].concept.name


def test_premises_name_icons_in_their_language() -> None:
    source = WorldExamples("nli", replace(ICONS, languages=["de"]), "train")
    for e in map(source.truth, range(100)):
        assert e.text is not None and e.text_pair is not None
        assert e.text_pair.startswith("das Piktogramm ")
        assert "ein" in e.text and "Piktogramm" in e.text
    assert task_splits("vqa", ICONS) == ("train", "val", "attributes", "drawing")


def test_entailment_needs_things_that_differ_in_more_than_their_size() -> None:
    world = WorldConfig(concepts=20, colours=1, grid=1, max_objects=1)
    with pytest.raises(RecipeError, match=r"data\.world\.colours' got 1, wanted at least 2 for nli where grid is 1"):
        WorldExamples("nli", world, "train")
    assert WorldExamples("nli", replace(world, colours=2), "train")[0].text
