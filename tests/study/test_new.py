"""`vlmoe new`: from a folder, shards or parquet of one's own to a recipe that trains."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from tests.test_cli import error_of, invoke
from vlmoe.config import Recipe, UserError, load_recipe
from vlmoe.data import survey as surveys
from vlmoe.data.check_recipe import MOST_REPEATS, check_recipe
from vlmoe.data.survey import Survey, survey
from vlmoe.study.new import Draft, Machine, new_recipe

pytestmark = pytest.mark.usefixtures("no_plots")
LAPTOP, GPU = Machine(False, 8, 16 << 30), Machine(True, 16, 80 << 30)


def icon(n: int, edge: int = 40) -> tuple[bytes, str]:
    """A captioned picture of a thing in a colour."""
    colour, thing = ("red", "green", "blue")[n % 3], ("circle", "square")[n // 3 % 2]
    image = Image.new("RGB", (edge, edge + 8), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if thing == "circle" else draw.rectangle)((8, 8, 30, 30), fill=colour)
    raw = io.BytesIO()
    image.save(raw, "PNG")
    return raw.getvalue(), f"a {colour} {thing} on white paper"


def folder_of(path: Path, count: int = 12, captions: bool = True) -> Path:
    path.mkdir()
    for n in range(count):
        raw, text = icon(n)
        (path / f"{n}.png").write_bytes(raw)
        if captions:
            (path / f"{n}.txt").write_text(text)
    return path


def quick(
    found: Survey, out: Path, machine: Machine = LAPTOP, seconds: float = 0.1, minutes: float = 30
) -> tuple[Draft, Recipe]:
    draft = new_recipe(found, out, minutes, machine, lambda recipe, found: seconds)
    return draft, load_recipe(str(out))


def test_the_recipe_of_a_small_folder_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "icons")
    output = invoke("new", "--images", "icons", "--out", "icons.yaml")
    assert "Looked at 12 of 12 samples; 0 cannot be used" in output
    assert "vlmoe pretrain icons.yaml" in output
    written = Path("icons.yaml").read_text()
    assert "s a step on these" in written and "like: demo" in written
    few = ["train.steps=2", "data.visual_tokenizer.steps=2", "data.workers=0", "eval.samples=4", "eval.pictures=1"]
    output = invoke("pretrain", "icons.yaml", *few)
    assert "This model is dense" not in output and "No token" not in output
    assert Path("runs/icons/eval.json").is_file()
    assert "is there already" in error_of(monkeypatch, capsys, "new", "--images", "icons", "--out", "icons.yaml")
    assert Path("icons.yaml").read_text() == written


def test_what_is_chosen_fits_the_data_and_the_machine(tmp_path: Path) -> None:
    pairs = Survey("folder", str(tmp_path / "my photos"), "pair", "image", "text", samples=50_000, looked_at=2000)
    pairs.sides, pairs.texts = (
        [300] * 2000,
        [f"a long caption of photo number {n} with many words" for n in range(2000)],
    )
    draft, plan = quick(pairs, tmp_path / "a.yaml")
    assert (plan.model.width, plan.model.image_size, plan.model.patch) == (128, 64, 8)
    assert vars(plan.data.batch) == {"image": 0, "text": 0, "pair": 64}
    assert plan.data.masking.pair_text == 0.5
    assert plan.name == "my-photos" and plan.data.sources[0].path == str(tmp_path / "my photos")
    assert plan.model.max_text % 4 == 0 and 12 <= plan.model.max_text <= max(draft.tokens) + 6
    assert plan.model.vision.sparse == "odd" and plan.model.vl_ffn == 0
    assert draft.steps == 18_000  # what 30 minutes hold; 40 passes would be 31,250
    big, plan = quick(pairs, tmp_path / "b.yaml", GPU)
    assert (plan.model.width, plan.model.image_size, plan.model.patch) == (384, 224, 16)
    _, tight = quick(pairs, tmp_path / "c.yaml", Machine(True, 16, 4 << 30))
    assert tight.data.batch.pair < plan.data.batch.pair == big.batch
    pairs.texts = ["kettle", "shopping cart", "fox"] * 600
    assert quick(pairs, tmp_path / "d.yaml")[1].data.masking.pair_text == 1


def test_steps_follow_the_data_where_time_allows(tmp_path: Path) -> None:
    found = survey("folder", str(folder_of(tmp_path / "icons")))
    draft, plan = quick(found, tmp_path / "a.yaml")
    assert (draft.steps, plan.train.steps, plan.data.batch.pair, plan.model.width) == (100, 100, 4, 64)
    draft, plan = quick(found, tmp_path / "b.yaml", minutes=1.5, seconds=1.0)
    assert plan.train.steps == 90
    assert "about 2 min after the tokenizers: 1 s a step on these 8 cores" in (tmp_path / "b.yaml").read_text()


@pytest.mark.parametrize("count", [2, 12, 70, 330])
def test_data_check_has_nothing_against_how_often_it_shows_a_sample(tmp_path: Path, count: int) -> None:
    found = survey("folder", str(folder_of(tmp_path / "icons", count)))
    draft, plan = quick(found, tmp_path / "a.yaml")
    assert draft.steps >= 200 or count < 20
    report = check_recipe(plan, samples=2)
    assert 0 < report["sources"][0]["repeats"] <= MOST_REPEATS
    assert not [line for line in report["problems"] if "is shown" in line]


def test_images_alone_shards_and_parquet(tmp_path: Path) -> None:
    alone = survey("folder", str(folder_of(tmp_path / "alone", captions=False)))
    assert (alone.kind, alone.samples, alone.bad_share) == ("image", 12, 0)
    _, plan = quick(alone, tmp_path / "alone.yaml")
    assert vars(plan.data.batch) == {"image": 4, "text": 0, "pair": 0}
    assert "No captions: none beside the images" in (tmp_path / "alone.yaml").read_text()
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        for n in range(6):
            for name, raw in ((f"{n}.png", icon(n)[0]), (f"{n}.txt", icon(n)[1].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    draft, plan = quick(survey("shards", str(tmp_path / "s-*.tar")), tmp_path / "s.yaml")
    assert (plan.name, plan.data.sources[0].type, draft.survey.samples) == ("s", "shards", 6)
    rows = [icon(n) for n in range(6)]
    pq.write_table(pa.table({"picture": [r for r, _ in rows], "said": [t for _, t in rows]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no column 'text'; there are picture, said"):
        survey("parquet", str(tmp_path / "p.parquet"), image_column="picture")
    found = survey("parquet", str(tmp_path / "p.parquet"), image_column="picture", text_column="said")
    source = quick(found, tmp_path / "p.yaml")[1].data.sources[0]
    assert (source.kind, source.image_column, source.text_column) == ("pair", "picture", "said")


def test_scripts_of_captions_and_what_is_held_out_are_said(tmp_path: Path) -> None:
    found = survey("folder", str(folder_of(tmp_path / "icons")))
    assert found.scripts() == {"Latin": 1}
    _, plan = quick(found, tmp_path / "a.yaml")
    assert "# Their letters: Latin." in (tmp_path / "a.yaml").read_text()
    assert plan.data.sources[0].held_out == 0.1  # of few, more
    found.texts, found.samples = ["ab жж 12", "漢字 かな"], 1_000_000
    assert found.scripts() == {"Latin": 0.25, "Cyrillic": 0.25, "Han": 0.25, "Hiragana": 0.25}
    _, plan = quick(found, tmp_path / "b.yaml")
    assert "# Their letters: 25.0% Latin, 25.0% Cyrillic," in (tmp_path / "b.yaml").read_text()
    assert plan.data.sources[0].held_out == 0.01


def test_large_data_are_looked_at_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveys, "LOOKED_AT", 40)
    found = survey("folder", str(folder_of(tmp_path / "icons", 90)))
    assert (found.samples, found.looked_at, len(set(surveys._spread(90)))) == (90, 40, 40)


def test_broken_samples_are_counted_and_too_many_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "icons")
    (folder / "0.png").write_bytes(b"no image")
    (folder / "1.txt").unlink()
    found = survey("folder", str(folder))
    assert dict(found.bad) == {"not an image of a known format": 1, "no caption": 1}
    _, plan = quick(found, tmp_path / "a.yaml")
    assert plan.data.max_bad_share == 0.34  # twice what was seen
    for n in range(2, 5):
        (folder / f"{n}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"5 of 12 samples cannot be used \(3 empty image file.*--kind image"):
        quick(survey("folder", str(folder)), tmp_path / "b.yaml")
    assert not (tmp_path / "b.yaml").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "wanted one of --images DIR"),
        (["--images", "a", "--shards", "b"], "wanted one of --images DIR"),
        (["--images", "none"], "folder none: no such folder"),
        (["--arrow", "none"], "arrow none: no such file"),
        (["--images", "empty"], "folder empty: no images"),
        (["--images", "broken"], "broken: no sample of 1 can be used; the first: x.png"),
        (["--images", "broken", "--kind", "video"], "--kind got 'video'"),
        (["--shards", "none.tar"], "no file none.tar"),
        (["--shards", "hollow.tar"], "hollow.tar: no sample in it"),
        (["--parquet", "none.parquet"], "no such file"),
        (["--images", "empty", "--out", "x.txt"], "--out got x.txt"),
        (["--images", "empty", "--out", "no/x.yaml"], "there is no folder no"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_written(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    tarfile.open(tmp_path / "hollow.tar", "w").close()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    assert words in error_of(monkeypatch, capsys, "new", *options)
    assert not list(tmp_path.rglob("*.yaml"))
